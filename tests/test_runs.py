import importlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from functools import partial
from types import SimpleNamespace

import numpy
import pytest
import torch

import saelib
from saelib import auto, checkpoints, methods, native, origin, profiles, runs, sources, subjects, sweeps, train
from saelib.loop import Loop
from saelib.runs import RunConfig
from saelib.sae import SAE, geometric_median
from tests.test_formats import Spell

X = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))


def config(**changes):
    return RunConfig(**({"subject": "synthetic", "method": "topk", "sparsity": 4, "n_latents": 64, "n_tokens": 2000,
                         "batch_size": 200} | changes))


def metrics_of(row):
    return {k: v for k, v in row["metrics"].items() if k not in ("seconds", "tokens_per_second")}


def test_fit_returns_an_sae_its_metrics_and_its_history():
    result = saelib.fit(torch.randn(500, 8), "topk", 3, n_latents=16, n_tokens=1000, batch_size=100, progress=False)
    assert result.sae.W_dec.shape == (16, 8) and len(result.history) == 10
    assert {"normalized_mse", "l0", "dead_fraction", "explained_variance", "tokens_per_second"} <= set(result.metrics)


def test_fit_takes_a_source_and_records_its_normalisation():
    result = saelib.fit(saelib.open_source("synthetic", 500), "relu", 0.01, n_latents=16, n_tokens=500, batch_size=100,
                        progress=False)
    assert result.sae.normalisation == "unit_norm"


def test_a_planted_dictionary_is_found():
    source = saelib.sources.synthetic(40_000, d_model=32, n_features=48, l0=3, exponent=0.0, seed=1)
    sae = saelib.fit(source, "topk", 3, n_latents=64, n_tokens=200_000, batch_size=500, lr=3e-3, progress=False).sae
    best = (source.truth @ sae.W_dec.t()).max(1).values
    assert best.mean() > 0.95


def test_a_run_is_training_from_its_seed_with_each_of_its_settings():
    source = sources.from_tensor(torch.randn(1000, 8, generator=torch.Generator().manual_seed(0)))
    settings = {"penalty_warmup": 0.7, "auxk_coef": 0.25, "dead_after": 2, "ema_decay": 0.9}

    def trained(**settings):
        sae = SAE(8, 64, "relu", 0.3, seed=3)
        sae.b_pre.data = geometric_median(next(source.batches(900, 1, 3)))
        history = train.train(sae, lambda step: source.batches(2, 10, 3, step), 10, lr=1e-2, **settings)
        return history, sae.W_enc.tolist()

    asked = config(method="relu", sparsity=0.3, n_tokens=20, batch_size=2, lr=1e-2, seed=3, **settings)
    fit, expected = runs.fit_source(source, asked, "cpu"), trained(**settings)
    assert (fit.history, fit.sae.W_enc.tolist()) == expected
    for name in settings:
        assert trained(**{other: value for other, value in settings.items() if other != name}) != expected, name


def test_an_sae_is_judged_by_held_out_activations_and_the_mean_of_those_it_saw():
    source = sources.Source("t", [torch.randn(500, 8)], torch.randn(100, 8) + 1)
    sae, measured, _ = runs.fit_source(source, config(n_latents=16, n_tokens=500, lr=1e-2), "cpu")
    error, spread = source.held_out - sae(source.held_out).detach(), source.held_out - source.shards[0].mean(0)
    assert measured["normalized_mse"] == pytest.approx(float(error.square().sum() / spread.square().sum()), rel=1e-4)


def test_b_pre_starts_at_the_geometric_median_of_what_is_trained_on():
    x = torch.cat([torch.randn(180, 4), torch.randn(20, 4) + 50])
    b_pre = runs.fit_source(sources.Source("t", [x], torch.randn(50, 4) + 3), config(n_latents=8, lr=0.0),
                            "cpu").sae.b_pre.detach()
    torch.testing.assert_close(torch.nn.functional.normalize(x - b_pre).mean(0), torch.zeros(4), atol=1e-4, rtol=0)


@pytest.mark.parametrize("changes, message", [
    ({"n_latents": 0}, "n_latents is 0: it must be a whole number, 1 or more"), ({"n_tokens": 0}, "n_tokens is 0"),
    ({"batch_size": 0}, "batch_size is 0"),
    ({"sparsity": 100}, "sparsity is 100: k must be a whole number from 1 to n_latents = 64"),
    ({"sparsity": 0}, "sparsity is 0"),
    ({"sparsity": float("nan")}, "sparsity is nan"),
    ({"lr": -1.0}, "lr is -1.0: it must be a finite number, 0 or more"),
    ({"lr": float("inf")}, "lr is inf: it must be a finite number, 0 or more"),
    ({"device": "gpu"},
     "device is 'gpu': it must be 'auto' or one that is here: 'cpu'"),
    ({"path": "fast"}, "path is 'fast': it must be one of auto"), ({"seed": -1}, "seed is -1"),
    ({"seed": 2**43}, "seed is .*: it must be below"),
    ({"method": "topq"}, "method is 'topq': it must be one of"),
])
def test_a_bad_argument_is_one_line_that_names_it(changes, message):
    arguments = {"method": "topk", "sparsity": 4, "n_latents": 64, "n_tokens": 100, "batch_size": 50} | changes
    with pytest.raises(ValueError, match=message) as error:
        saelib.fit(torch.randn(200, 8), **arguments, progress=False)
    assert "\n" not in str(error.value)


def test_the_batch_is_never_larger_than_the_run():
    assert saelib.fit(torch.randn(50, 4), "topk", 2, n_latents=8, n_tokens=40, batch_size=1000,
                      progress=False).history[-1]["tokens"] == 40


def test_a_row_says_what_was_asked_measured_and_where(tmp_path):
    row = saelib.run(config(), "cpu")
    assert row["config"]["sparsity"] == 4 and row["metrics"]["l0"] <= 4
    assert [(row["config"][name], row["provenance"][name])
            for name in ("path", "precision")] == [("auto", "sparse"), ("auto", "fp32")]
    assert {"saelib", "torch", "python", "hardware", "commit", "code", "inputs", "precision", "path",
            "source_tokens"} == set(row["provenance"])
    assert json.loads(json.dumps(row)) == row


def test_a_sweep_runs_only_what_the_store_lacks(tmp_path, monkeypatch):
    store = tmp_path / "rows.jsonl"
    first = saelib.sweep([config(), config(seed=1)], store, progress=False)
    ran, run = [], sweeps.run
    monkeypatch.setattr(sweeps, "run", lambda c, *a: (ran.append(c.seed), run(c, *a))[1])
    again = saelib.sweep([config(seed=2), config(), config(seed=1)], store, progress=False)
    assert ran == [2] and again[1:] == first and [r["config"]["seed"] for r in again] == [2, 0, 1]


def test_a_torn_last_line_is_run_again_and_the_rest_is_kept(tmp_path):
    store = tmp_path / "rows.jsonl"
    rows = saelib.sweep([config(), config(seed=1)], store, progress=False)
    lines = store.read_text().splitlines()
    store.write_text(lines[0] + "\n" + lines[1][:40])
    again = saelib.sweep([config(), config(seed=1)], store, progress=False)
    assert sorted(json.dumps(metrics_of(r)) for r in again) == sorted(json.dumps(metrics_of(r)) for r in rows)
    assert len(sweeps.read_rows(store)) == 2


def test_rows_of_other_code_do_not_count(tmp_path, monkeypatch):
    store = tmp_path / "rows.jsonl"
    saelib.sweep([config()], store, progress=False)
    for module in (origin, sweeps):
        monkeypatch.setattr(module, "code_hash", lambda: "changed")
    origin.provenance.cache_clear()
    saelib.sweep([config()], store, progress=False)
    origin.provenance.cache_clear()
    assert [r["provenance"]["code"] for r in sweeps.read_rows(store)][1] == "changed"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_members_of_a_sweep_equal_the_same_runs_alone(precision):
    configs = [config(seed=s, method=m, sparsity=k, precision=precision) for s in (0, 1)
               for m, k in (("topk", 4), ("relu", 0.01))]
    together = saelib.sweep(configs, progress=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = [saelib.run(c) for c in configs]
    torch.set_num_threads(threads)
    assert [metrics_of(r) for r in together] == [metrics_of(r) for r in alone]


def test_a_failing_member_says_which_it_was_once_the_others_have_their_rows(tmp_path, monkeypatch, capsys):
    store = tmp_path / "rows.jsonl"
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})  # one after the other
    with pytest.raises(FloatingPointError, match="not finite") as error:
        saelib.sweep([config(), config(lr=1e30), config(seed=1)], store, progress=False)
    assert "lr=1e+30" in error.value.__notes__[0]
    assert [r["config"]["seed"] for r in sweeps.read_rows(store)] == [0, 1]
    assert capsys.readouterr().err.startswith("a run failed, the others go on: loss is not finite at step")


def test_a_kill_while_an_sae_is_judged_loses_no_training(tmp_path, monkeypatch):
    from saelib import train

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "CHECKPOINT_SECONDS", 0)
    straight, = saelib.sweep([config()], progress=False)
    with monkeypatch.context() as judged:
        judged.setattr(runs.metrics, "evaluate", killed)
        with pytest.raises(KeyboardInterrupt):
            saelib.sweep([config()], tmp_path / "rows.jsonl", progress=False)
    started, one = [], Loop.one
    monkeypatch.setattr(Loop, "one", lambda loop, *args: started.append(loop.step) or one(loop, *args))
    resumed, = saelib.sweep([config()], tmp_path / "rows.jsonl", progress=False)
    assert started == [9] and metrics_of(resumed) == metrics_of(straight)
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_folder_for_saes_that_cannot_be_made_is_refused_before_the_training(tmp_path):
    (tmp_path / "file").write_text("")
    rule = "keep is '.*file/saes': it must be a folder that can be written, or the name of one"
    with pytest.raises(ValueError, match=rule):
        saelib.sweep([config()], keep=tmp_path / "file" / "saes", progress=False)


def test_a_store_that_cannot_be_written_is_refused_before_the_training(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(sweeps, "run", lambda *args: pytest.fail("it was trained"))
    with pytest.raises(ValueError, match="store is '.*file/rows.jsonl': it must be a file that can be written"):
        saelib.sweep([config()], tmp_path / "file" / "rows.jsonl", progress=False)


def test_a_failure_is_heard_of_before_those_that_started_earlier_have_ended(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    stop, ended = threading.Event(), []

    def task(item):
        if item == 1:
            raise ZeroDivisionError
        ended.append((item, stop.wait(30)))

    with pytest.raises(ZeroDivisionError):
        sweeps.side_by_side(task, range(9), stop=stop)
    assert (0, True) in ended and len(ended) <= 2


def test_rows_of_other_files_and_of_other_methods_do_not_count(tmp_path, monkeypatch):
    def overwrite(seed):
        numpy.save(tmp_path / "acts.npy", torch.randn(400, 8, generator=torch.Generator().manual_seed(seed)).numpy())

    class Own(methods.TopK):
        key = "own"

    monkeypatch.setitem(methods.METHODS, "own", Own)
    asked = config(subject=str(tmp_path / "acts.npy"), method="own", n_latents=16, n_tokens=400)
    store = tmp_path / "rows.jsonl"
    overwrite(0)
    first, = saelib.sweep([asked], store, progress=False)
    assert saelib.sweep([asked], store, progress=False) == [first]
    overwrite(1)
    second, = saelib.sweep([asked], store, progress=False)
    assert second["metrics"]["normalized_mse"] != first["metrics"]["normalized_mse"]
    Own.forward = lambda self, pre_acts: torch.relu(pre_acts)
    third, = saelib.sweep([asked], store, progress=False)
    assert third["metrics"]["l0"] > second["metrics"]["l0"] and len(sweeps.read_rows(store)) == 3


def test_a_sweep_that_is_killed_within_a_member_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    from saelib import train
    monkeypatch.setattr(train, "CHECKPOINT_SECONDS", 0)
    straight, = saelib.sweep([config()], progress=False)
    one, asked, started = Loop.one, [config()], []

    def killed(loop, *args, **options):
        started.append(loop.step)
        if len(started) == 5:
            raise KeyboardInterrupt
        return one(loop, *args, **options)

    monkeypatch.setattr(Loop, "one", killed)
    with pytest.raises(KeyboardInterrupt):
        saelib.sweep(asked, tmp_path / "rows.jsonl", progress=False)
    assert [p.suffix for p in (tmp_path / "rows.checkpoints").iterdir()] == [".pt"]
    resumed, = saelib.sweep(asked, tmp_path / "rows.jsonl", progress=False)
    assert started == [0, 1, 2, 3, 4, *range(4, 10)] and metrics_of(resumed) == metrics_of(straight)
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


def test_members_that_are_killed_leave_a_checkpoint_each(tmp_path, monkeypatch):
    def killed(bar, n):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "CHECKPOINT_SECONDS", 0)
    monkeypatch.setattr(sweeps.tqdm, "update", killed)
    for seed in range(2):
        with pytest.raises(KeyboardInterrupt):
            saelib.sweep([config(seed=seed)], tmp_path / "rows.jsonl", progress=False)
    assert len(list((tmp_path / "rows.checkpoints").iterdir())) == 2


def test_zero_is_a_value_and_a_whole_number_is_one_however_it_is_written():
    assert config(lr=0.0).resolve().lr == 0 and json.dumps(asdict(config(sparsity=4.0))) == json.dumps(asdict(config()))


WRONG_TYPES = """
import json, pathlib
import numpy, torch
from saelib import SAE, RunConfig, fit
from saelib.train import train
made = RunConfig("synthetic", "topk", numpy.int64(4), numpy.int64(64), 2e3, seed=numpy.int64(1))
assert [type(value) for value in (made.sparsity, made.n_latents, made.n_tokens, made.seed)] == [int] * 4
row = RunConfig(pathlib.Path("x.npy"), "relu", numpy.float32(0.5), 64, 100, lr=numpy.float64(1e-3))
assert json.loads(json.dumps(vars(row))) == vars(row)
assert (row.subject, row.sparsity, type(row.lr)) == ("x.npy", 0.5, float)
x = torch.randn(20, 4)
for source, changes, message in ((x, {"sparsity": "8"}, "sparsity is '8': it must be a number"),
                                 (x, {"n_tokens": None}, "n_tokens is None: it must be a whole number, 1 or more"),
                                 (x, {"n_latents": 16.5}, "n_latents is 16.5: it must be a whole number, 1 or more"),
                                 ([x], {}, "source is 'list': it must be a [n_tokens, d_model] tensor or array")):
    try:
        fit(source, **{"n_latents": 8, "n_tokens": 10} | changes)
    except ValueError as error:
        assert message in str(error), error
    else:
        raise AssertionError(message)
try:
    train(SAE(4, 8, "topk", 2), lambda step: iter([x.numpy()]), 1)
except ValueError as error:
    assert str(error) == "x is 'ndarray': it must be a tensor", error
else:
    raise AssertionError("batches of arrays")
"""


def test_other_types_are_taken_by_their_value_or_refused_in_one_line():
    subprocess.run([sys.executable, "-c", WRONG_TYPES], check=True)  # beside the type checks of these tests


def test_a_store_with_a_damaged_line_is_named(tmp_path):
    (tmp_path / "rows.jsonl").write_text("{]\n{}\n")
    with pytest.raises(ValueError, match=r"store is '.*rows.jsonl': it must hold one JSON object on each line"):
        sweeps.read_rows(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("torn", ['{"config": {"seed"', '{"conf', "{", "\n"])
def test_a_row_that_a_killed_process_tore_costs_no_other(tmp_path, torn):
    store, rows = tmp_path / "rows.jsonl", [{"config": {"seed": i}} for i in range(3)]
    for i, row in enumerate(rows):
        sweeps.add_row(store, row)
        if i == 1:
            with open(store, "a") as file:
                file.write(torn)
    assert sweeps.read_rows(store) == rows


def test_without_git_or_in_somebody_elses_repository_the_commit_is_unknown(tmp_path, monkeypatch):
    monkeypatch.setattr(origin, "PACKAGE", tmp_path)
    assert origin.commit() == "unknown"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert origin.commit() == "unknown"


@pytest.mark.parametrize("source", [torch.randn(60, 4).numpy(), torch.randn(60, 4, requires_grad=True),
                                    torch.randn(60, 4, requires_grad=True) * 2])
def test_arrays_and_tensors_with_a_history_are_activations_too(source):
    assert saelib.fit(source, "topk", 2, n_latents=8, n_tokens=120, batch_size=20, progress=False).metrics["l0"] <= 2
    assert not isinstance(source, torch.Tensor) or not source.is_leaf or source.grad is None


def test_progress_goes_to_stderr_and_can_be_silent(capsys):
    saelib.fit(torch.randn(100, 4), "topk", 2, n_latents=8, n_tokens=100, progress=True)
    shown = capsys.readouterr()
    assert "topk 2" in shown.err and not shown.out
    saelib.fit(torch.randn(100, 4), "topk", 2, n_latents=8, n_tokens=100, progress=False)
    assert not capsys.readouterr().err


def test_progress_counts_as_many_tokens_as_were_asked_for():
    seen = []
    runs.fit_source(sources.from_tensor(torch.randn(100, 4)),
                    config(n_latents=8, sparsity=2, n_tokens=250, batch_size=60), on_tokens=seen.append)
    assert seen == [60, 60, 60, 60, 10]


def test_a_run_that_was_resumed_is_as_fast_as_the_part_that_was_timed(tmp_path, monkeypatch):
    done = []

    def stop_once(n):
        done.append(n)
        if len(done) == 6:
            raise KeyboardInterrupt

    monkeypatch.setattr(train, "CHECKPOINT_SECONDS", 0)
    monkeypatch.setattr(runs, "time", SimpleNamespace(monotonic=lambda: len(done)))  # a step takes a second
    resume = partial(runs.fit_source, sources.from_tensor(torch.randn(100, 8)), config(), "cpu", stop_once,
                     tmp_path / "c.pt")
    with pytest.raises(KeyboardInterrupt):
        resume()
    measured = resume().metrics
    assert (measured["seconds"], measured["tokens_per_second"], len(done)) == (10, 200, 10)


def test_runs_share_a_source_only_where_they_read_the_same(monkeypatch):
    opened = []
    monkeypatch.setattr(runs, "_SOURCES", {})
    monkeypatch.setattr(subjects, "open_source", lambda _, n, *, text, layer, device: opened.append((n, text, layer))
                        or sources.synthetic(10))
    asked = [config(**changes) for changes in ({}, {"source_tokens": 500}, {"text": "english"}, {"layer": 1},
                                               {"layer": 1, "seed": 1})]
    found = [runs.open_source(one, device) for one, device in zip(asked, ("auto", *["cpu"] * 4))]
    assert opened == [(2000, None, None), (500, None, None), (2000, "english", None), (2000, None, 1)]
    assert found[3] is found[4]


def test_an_unknown_profile_or_setting_is_refused():
    with pytest.raises(ValueError, match="profile is 'lapptop': it must be one of quick, laptop, gpu, paper"):
        profiles.settings("frontier", "lapptop")
    with pytest.raises(ValueError, match="n_sheep is 3: chapter 'frontier' has no such setting"):
        profiles.settings("frontier", "quick", n_sheep=3)


def test_importing_saelib_loads_no_transformers_and_no_plots():
    import subprocess
    slow = "transformers", "datasets", "IPython", "pandas", "matplotlib"
    code = f"import sys, saelib; print([name for name in {slow} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


@pytest.mark.parametrize("method, wanted", [("topk", "graph"), ("relu", "graph"), ("batchtopk", "sparse")])
def test_the_path_is_recorded_steps_on_a_gpu_with_kernels_for_methods_that_do_not_wait(method, wanted, monkeypatch):
    made, W_enc = methods.make(method, 1024, 4), torch.empty(1024, 64)
    for has_kernels in (False, True):
        monkeypatch.setattr(auto, "has_kernels", lambda device: has_kernels and device.type == "cuda")
        assert auto.pick_path("auto", "cuda", made, W_enc) == (wanted if has_kernels else "sparse")
    assert auto.pick_path("dense", "cuda", made, W_enc) == "dense"


@pytest.mark.parametrize("compiles", [True, False])
def test_the_path_on_a_cpu_is_compiled_where_that_can_be_and_pays(compiles, monkeypatch):
    def path(method, n_latents, **kind):
        return auto.pick_path("auto", "cpu", methods.make(method, n_latents, 4), torch.empty(n_latents, 64, **kind))

    monkeypatch.setattr(native, "available", lambda: compiles)
    fast = "native" if compiles else "sparse"
    assert [path(method, 1024) for method in ("topk", "multi_topk", "batchtopk", "relu",
                                              "topk_ste")] == [fast, fast, fast, "sparse", "sparse"]
    assert path("topk", 1023) == path("topk", 1024, dtype=torch.float64) == "sparse"


def test_a_row_says_which_path_was_chosen():
    rows = [runs.run(config(n_latents=n, path=path)) for n, path in ((64, "auto"), (1024, "auto"), (1024, "sparse"))]
    assert [row["provenance"]["path"] for row in rows] == ["sparse", "native" if native.available() else "sparse",
                                                           "sparse"]


def test_the_precision_is_chosen_by_hardware_and_size_and_can_be_set():
    assert auto.pick_precision("auto", "cpu", auto.LARGE - 1) == "fp32" == auto.pick_precision("fp32", "cpu", 2**20)
    fast = runs.subjects.fast_dtype("cpu") == torch.bfloat16
    assert auto.pick_precision("auto", "cpu", auto.LARGE) == ("bf16" if fast else "fp32")


def test_tasks_side_by_side_keep_their_order_have_a_core_each_and_stop_at_the_first_error():
    before = torch.get_num_threads()
    assert sweeps.side_by_side(lambda item: (item, torch.get_num_threads()),
                               range(5)) == [(item, 1) for item in range(5)]
    with pytest.raises(ZeroDivisionError):
        sweeps.side_by_side(lambda item: 1 / item, [1, 0, 2])
    assert torch.get_num_threads() == before


def test_a_clone_that_is_not_installed_says_so_in_its_rows(monkeypatch):
    def missing(name):
        raise origin.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(origin.importlib.metadata, "version", missing)
    assert origin.provenance.__wrapped__("cpu")["saelib"] == "not installed"


def test_reading_a_store_leaves_the_file_alone_and_a_last_row_without_a_newline_counts(tmp_path):
    store = tmp_path / "rows.jsonl"
    first, second = (saelib.sweep([config(seed=seed)], store, progress=False)[0] for seed in range(2))
    for text in (store.read_text()[:-1], store.read_text() + '{"config": {"su'):
        store.write_text(text)
        assert sweeps.read_rows(store) == [first, second] and store.read_text() == text
        assert saelib.sweep([config(seed=1)], store, progress=False) == [second]
    third, = saelib.sweep([config(seed=2)], store, progress=False)
    assert sweeps.read_rows(store) == [first, second, third]


def test_sweeps_in_several_threads_share_a_store(tmp_path):
    store = tmp_path / "rows.jsonl"
    sweeps.side_by_side(lambda seed: saelib.sweep([config(seed=seed, n_tokens=400)], store, progress=False), range(12))
    assert sorted(row["config"]["seed"] for row in sweeps.read_rows(store)) == list(range(12))


@pytest.mark.parametrize("text", ['{"precious": 1}', "precious", "[1, 2]\n", '{"precious": 1', "a line\nand another"])
def test_a_file_that_is_no_store_is_refused_and_kept(text, tmp_path):
    store = tmp_path / "notes.json"
    store.write_text(text)
    with pytest.raises(ValueError, match="store is .*notes.json.*: it must (hold one JSON object on each line|be a "
                       "file of rows that a sweep wrote)"):
        saelib.sweep([config()], store, progress=False)
    assert store.read_text() == text


def test_a_method_is_known_by_all_that_it_consists_of(monkeypatch):
    class Base(methods.TopK):
        shift = 0.1

        def __init__(self, n_latents, sparsity):
            super().__init__(n_latents, sparsity)

        @property
        def k(self):
            return 3

    class Own(Base):
        key = "own"

    monkeypatch.setitem(methods.METHODS, "own", Own)
    asked = config(method="own")
    before = origin.inputs(asked)
    assert origin.inputs(asked) == before
    for name, value in (("shift", 0.2), ("__init__", lambda self, n, sparsity: methods.TopK.__init__(self, n, 1)),
                        ("k", property(lambda self: 4))):
        with monkeypatch.context() as patch:
            patch.setattr(Base, name, value)
            assert origin.inputs(asked) != before, name
    typed = {}
    exec("def forward(self, pre_acts): return pre_acts", typed)  # has no source, as at a prompt
    Own.forward = typed["forward"]
    assert origin.inputs(asked) != before


@pytest.mark.parametrize("other", [{"seed": 1}, {"batch_size": 100}, {"n_latents": 24}, {}])
def test_a_checkpoint_of_another_run_is_refused(tmp_path, monkeypatch, other):
    def stop(n):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "CHECKPOINT_SECONDS", 0)
    asked, checkpoint = config(n_tokens=2000), tmp_path / "c.pt"
    source = saelib.open_source("synthetic", 2000)
    with pytest.raises(KeyboardInterrupt):
        runs.fit_source(source, asked, on_tokens=stop, checkpoint=checkpoint)
    data = source if other else sources.from_tensor(torch.randn(2000, source.d_model))
    with pytest.raises(ValueError, match="checkpoint is .*c.pt of a run with .*: it must be of this run"):
        runs.fit_source(data, replace(asked, **other), checkpoint=checkpoint)


FROM_STDIN = """
import saelib, torch
from saelib import methods, origin
class Own(methods.TopK):
    key = "own"
    def forward(self, pre_acts):
        return torch.{name}([a for a in [pre_acts]][0])
methods.METHODS["own"] = Own
print(origin.inputs(saelib.RunConfig("pygpt", "own", 4, 64, 100)))
"""


def test_a_method_typed_at_a_prompt_is_known_in_another_process_and_from_any_folder(tmp_path):
    (tmp_path / "pygpt").mkdir()
    (tmp_path / "pygpt" / "notes").write_text("a folder of that name is not the subject")
    environment = os.environ | {"PYTHONPATH": str(origin.PACKAGE.parent)}
    first, again, other = (subprocess.run([sys.executable, "-"], input=FROM_STDIN.format(name=name), cwd=folder,
                                          env=environment, capture_output=True,
                                          text=True, check=True).stdout
                           for name, folder in (("relu", None), ("relu", tmp_path), ("sigmoid", None)))
    assert first == again != other


@pytest.mark.parametrize("switched", [torch.no_grad, torch.inference_mode,
                                      lambda: torch.autocast("cpu", torch.bfloat16)])
@pytest.mark.parametrize("method, sparsity", [("topk", 2), ("relu", 0.1)])
def test_training_is_the_same_whatever_modes_the_caller_is_in(switched, method, sparsity):
    plain = saelib.fit(X, method, sparsity, n_latents=16, n_tokens=200, batch_size=20, progress=False)
    with switched():
        inside = saelib.fit(X * 1, method, sparsity, n_latents=16, n_tokens=200, batch_size=20, progress=False)
    assert torch.equal(plain.sae.W_dec, inside.sae.W_dec) and inside.sae.W_dec.requires_grad


def test_a_store_keeps_the_rows_of_each_python(tmp_path, monkeypatch):
    store, ran, run = tmp_path / "rows.jsonl", [], sweeps.run
    monkeypatch.setattr(sweeps, "run", lambda c, *a: (ran.append(c), run(c, *a))[1])
    for version in ("3.11.1", "3.12.1", "3.11.1", "3.12.1"):
        monkeypatch.setattr(origin.platform, "python_version", lambda: version)
        saelib.sweep([config(n_tokens=200)], store, progress=False)
    assert len(ran) == len(sweeps.read_rows(store)) == 2


def test_a_checkpoint_of_other_activations_with_the_same_mean_is_refused(tmp_path, monkeypatch):
    def stop(n):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "CHECKPOINT_SECONDS", 0)
    asked, checkpoint = config(n_tokens=60, batch_size=20, n_latents=16), tmp_path / "c.pt"
    with pytest.raises(KeyboardInterrupt):
        runs.fit_source(sources.from_tensor(X), asked, on_tokens=stop, checkpoint=checkpoint)
    with pytest.raises(ValueError, match="checkpoint is .* of a run with data"):
        runs.fit_source(sources.from_tensor(-X), asked, checkpoint=checkpoint)


def test_files_are_the_same_inputs_in_every_process(tmp_path):
    asked = ("import saelib; from saelib import origin; "
             "print(origin.inputs(saelib.RunConfig('a.npy', 'topk', 4, 64, 100, text='b.txt')))")
    for name in ("a.npy", "b.txt"):
        (tmp_path / name).write_text("x")
    found = {subprocess.run([sys.executable, "-c", asked], cwd=tmp_path,
                            env=os.environ | {"PYTHONPATH": str(origin.PACKAGE.parent), "PYTHONHASHSEED": seed},
                            capture_output=True, text=True, check=True).stdout
             for seed in "01"}  # in which a set of these names has two orders
    assert len(found) == 1


OF_ANOTHER_KIND = {
    "config(x)": "subject is 'Tensor': it must be a name or a path: save activations of your own as .npy to sweep over "
                 "them",
    "config(text=3)": "text is 'int': it must be a name or a path: save activations of your own as .npy to sweep over "
                      "them",
    "saelib.sweep(config())": "configs is 'a single RunConfig': it must be a list of them",
    "runs.fit_source(x, config())":
        "source is 'Tensor': it must be a saelib source, as `sources.from_tensor` makes one",
    "sources.from_tensor([[1.0]])": "source is 'list': it must be a tensor or an array",
    "sources.from_tensor(x, held_out_fraction='0.1')": "held_out_fraction is '0.1': it must be above 0 and below 1",
    "saelib.open_source(None, 100)": "subject is None: it must be a name or a path",
    "saelib.open_source('pygpt', 100, text=['a'])": "text is 'list': it must be a name or a path",
}


def test_what_is_of_another_kind_is_named():
    # in a process of its own, where annotations are not checked
    code = ("import torch, saelib\nfrom saelib import runs, sources\nx = torch.zeros(9, 4)\n"
            "config = lambda subject='synthetic', text=None: saelib.RunConfig(subject, 'topk', 4, 64, 100, text=text)\n"
            f"for call in {list(OF_ANOTHER_KIND)}:\n    try:\n        eval(call)\n    except ValueError as error:\n    "
            f"    print(error)")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True,
                          text=True).stdout.splitlines() == list(OF_ANOTHER_KIND.values())


def test_a_row_says_how_many_tokens_its_source_had(monkeypatch):
    monkeypatch.setattr(runs, "open_source", lambda config, device: sources.from_tensor(torch.randn(100, 4)))
    assert runs.run(config(n_latents=8, source_tokens=500))["provenance"]["source_tokens"] == 90


def test_a_sweep_keeps_its_saes_and_makes_one_that_is_gone_again(tmp_path):
    configs, store = [config(sparsity=k, n_latents=16) for k in (2, 4)], tmp_path / "rows.jsonl"
    bare = sweeps.sweep(configs, store, progress=False)
    rows = sweeps.sweep(configs, store, keep=tmp_path / "saes", progress=False)
    assert not any("sae" in row for row in bare)
    assert [metrics_of(row) for row in rows] == [metrics_of(row) for row in bare]
    sae, source = saelib.load(rows[1]["sae"]), runs.open_source(configs[1])
    assert saelib.evaluate(sae, source.held_out, source.mean)["normalized_mse"] == rows[1]["metrics"]["normalized_mse"]
    shutil.rmtree(rows[0]["sae"])
    again = sweeps.sweep(configs, store, keep=tmp_path / "saes", progress=False)
    assert again[1] == rows[1]
    assert saelib.load(again[0]["sae"]).method.sparsity == 2
    assert len(store.read_text().splitlines()) == 5


def test_saes_are_found_from_any_folder_and_kept_where_they_are_asked_for(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    one, = sweeps.sweep([config(n_latents=16)], "rows.jsonl", keep="saes", progress=False)
    monkeypatch.chdir(tmp_path / "elsewhere")
    same, = sweeps.sweep([config(n_latents=16)], "../rows.jsonl", keep="../saes", progress=False)
    assert same == one and saelib.load(one["sae"]).n_latents == 16
    other, = sweeps.sweep([config(n_latents=16)], "../rows.jsonl", keep="here", progress=False)
    assert other["sae"].startswith(str(tmp_path / "elsewhere" / "here")) and saelib.load(other["sae"]).n_latents == 16


def test_rows_that_no_sweep_wrote_are_no_store(tmp_path):
    for made in ({}, None, {"hardware": "CPU"}, "x", 3):
        (tmp_path / "rows.jsonl").write_text(json.dumps({"config": {}, "provenance": made}) + "\n")
        with pytest.raises(ValueError, match="store is '.*rows.jsonl': it must be a file of rows that a sweep wrote"):
            sweeps.sweep([config()], tmp_path / "rows.jsonl", progress=False)


def test_few_sources_are_kept_open(monkeypatch):
    monkeypatch.setattr(runs, "_SOURCES", {})
    monkeypatch.setattr(runs, "KEPT", 2)
    first = runs.open_source(config(source_tokens=100))
    assert runs.open_source(config(source_tokens=100)) is first
    for n in (101, 102):
        runs.open_source(config(source_tokens=n))
    assert len(runs._SOURCES) == 2 and runs.open_source(config(source_tokens=100)) is not first


def test_to_compile_is_no_training_time(monkeypatch):
    order = []
    monkeypatch.setattr(runs, "pick_path", lambda *args: order.append("path") or "sparse")
    monkeypatch.setattr(runs, "time", SimpleNamespace(monotonic=lambda: order.append("clock") or 0.1 * len(order)))
    runs.fit_source(sources.from_tensor(X), config(n_latents=8, sparsity=2))
    assert order == ["path", "clock", "clock"]


def test_what_is_no_list_of_configs_is_refused():
    for configs, value in ((config(), "a single RunConfig"), ([config(), ("pygpt", "topk")], "a list with a tuple")):
        done = subprocess.run([sys.executable, "-c", f"import saelib; from saelib import RunConfig; "
                               f"saelib.sweep({configs!r})"], capture_output=True, text=True)
        assert done.stderr.splitlines()[-1].startswith(f"ValueError: configs is {value!r}: it must be a list of")


def interrupt(*args):
    raise KeyboardInterrupt


def steps_taken(monkeypatch):
    started, one = [], Loop.one
    monkeypatch.setattr(Loop, "one", lambda loop, *args: started.append(loop.step) or one(loop, *args))
    return started


def test_a_checkpoint_of_other_code_is_not_gone_on_from(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "CHECKPOINT_SECONDS", 0)
    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr(sweeps.tqdm, "update", interrupt)
        saelib.sweep([config()], tmp_path / "rows.jsonl", progress=False)
    monkeypatch.setattr(sweeps, "code_hash", lambda: "changed")
    started = steps_taken(monkeypatch)
    saelib.sweep([config()], tmp_path / "rows.jsonl", progress=False)
    assert started == list(range(10))


def test_a_checkpoint_of_a_file_that_changed_since_does_not_stand_in_the_way(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "CHECKPOINT_SECONDS", 0)
    asked = config(subject=str(tmp_path / "acts.npy"), n_latents=16, n_tokens=400)
    numpy.save(tmp_path / "acts.npy", torch.randn(400, 8).numpy())
    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr(sweeps.tqdm, "update", interrupt)
        saelib.sweep([asked], tmp_path / "rows.jsonl", progress=False)
    numpy.save(tmp_path / "acts.npy", torch.randn(400, 8).numpy())
    row, = saelib.sweep([asked], tmp_path / "rows.jsonl", progress=False)
    assert row["config"]["subject"] == asked.subject


def test_a_kill_before_the_row_is_written_loses_no_training(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "CHECKPOINT_SECONDS", 0)
    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr(sweeps, "add_row", interrupt)
        saelib.sweep([config()], tmp_path / "rows.jsonl", progress=False)
    started = steps_taken(monkeypatch)
    saelib.sweep([config()], tmp_path / "rows.jsonl", progress=False)
    assert started == [9]


def test_a_sweep_with_nothing_to_do_leaves_the_store_alone(tmp_path):
    store = tmp_path / "rows.jsonl"
    saelib.sweep([config()], store, progress=False)
    text = store.read_text() + '{"config": {"su'  # a row that another process is writing
    store.write_text(text)
    saelib.sweep([config()], store, progress=False)
    assert store.read_text() == text


def test_a_sweep_with_nothing_to_do_shows_no_bar(tmp_path, capsys):
    saelib.sweep([config()], tmp_path / "rows.jsonl", progress=False)
    capsys.readouterr()
    saelib.sweep([config()], tmp_path / "rows.jsonl")
    assert not capsys.readouterr().err


def test_an_interrupt_ends_the_members_under_way(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    ended = []

    def run(asked, device, count, *places):
        if asked.seed == 1:
            raise KeyboardInterrupt
        for _ in range(40):
            time.sleep(0.05)
            count(1)
        ended.append(asked)

    monkeypatch.setattr(sweeps, "run", run)
    with pytest.raises(KeyboardInterrupt):
        saelib.sweep([config(), config(seed=1)], progress=False)
    assert not ended


def test_a_config_that_is_asked_for_twice_is_run_once(tmp_path):
    store = tmp_path / "rows.jsonl"
    first, second = saelib.sweep([config(), config()], store, progress=False)
    assert first == second and len(sweeps.read_rows(store)) == 1


def test_fit_multiplies_in_the_precision_that_is_asked_for():
    x = sources.normalise(torch.randn(2000, 16, generator=torch.Generator().manual_seed(0)))
    found = [saelib.fit(x, "relu", 0.1, n_latents=40, n_tokens=1000, batch_size=100, precision=precision,
                        progress=False).history for precision in ("auto", "fp32", "bf16")]
    assert found[0] == found[1] != found[2]


def test_a_row_names_the_files_as_they_were_when_its_activations_were_read(tmp_path):
    path = tmp_path / "acts.npy"
    numpy.save(path, torch.randn(400, 8).numpy())
    asked = config(subject=str(path), n_latents=16, n_tokens=400)
    before = origin.inputs(asked)
    row = runs.run(asked, "cpu", lambda n: os.utime(path, (0, 0)))  # touched while it trains
    assert row["provenance"]["inputs"] == before != origin.inputs(asked)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_row_says_which_precision_was_used(precision):
    assert runs.run(config(precision=precision))["provenance"]["precision"] == precision


@pytest.mark.parametrize("n_tokens, dead_after", [(5, 1), (5000, 500), (10**9, 10_000_000)])
def test_what_is_left_out_follows_from_the_run(n_tokens, dead_after):
    found = config(n_tokens=n_tokens).resolve()
    assert (found.penalty_warmup, found.dead_after, found.source_tokens,
            found.lr) == (0.1, dead_after, n_tokens, train.paper_lr(64))


def test_the_hash_of_the_code_covers_what_is_compiled(tmp_path, monkeypatch):
    before = origin.code_hash.__wrapped__()
    (tmp_path / "native.cpp").write_text("// other")
    monkeypatch.setattr(native, "SOURCES", [tmp_path / "native.cpp"])
    assert origin.code_hash.__wrapped__() != before


def test_in_somebody_elses_repository_the_commit_is_unknown(tmp_path, monkeypatch):
    for command in (["init", "-q"], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty",
                                     "-m", "theirs"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    (tmp_path / "site-packages" / "saelib").mkdir(parents=True)
    monkeypatch.setattr(origin, "PACKAGE", tmp_path / "site-packages" / "saelib")
    assert origin.commit() == "unknown"


TYPED = """
import saelib
from saelib import methods, origin
class Own(methods.TopK):
    key = "own"
    def forward(self, pre_acts):
        return pre_acts * {constant}
methods.METHODS["own"] = Own
print(origin.inputs(saelib.RunConfig("pygpt", "own", 4, 64, 100)))
"""


def test_a_typed_method_is_known_by_its_constants():
    found = {subprocess.run([sys.executable, "-"], input=TYPED.format(constant=constant), capture_output=True,
                            text=True, check=True,
                            env=os.environ | {"PYTHONPATH": str(origin.PACKAGE.parent)}).stdout
             for constant in (2.5, 3.5)}
    assert len(found) == 2


def test_a_method_in_a_file_is_known_by_what_stands_around_it(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    found = []
    for scale in ("2.0", "30.0"):
        (tmp_path / "own_method.py").write_text(f"from saelib import methods\nSCALE = {scale}\nclass "
                                                f"Own(methods.TopK):\n    key = 'own'\n"
                                                "    def forward(self, pre_acts):\n        return "
                                                "super().forward(pre_acts) * SCALE\n")
        sys.modules.pop("own_method", None)
        importlib.invalidate_caches()
        monkeypatch.setitem(methods.METHODS, "own", importlib.import_module("own_method").Own)
        found.append(origin.inputs(config(method="own")))
    sys.modules.pop("own_method")
    assert found[0] != found[1]


def test_fit_follows_its_seed():
    x = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    one, other, again = (saelib.fit(x, "topk", 2, n_latents=16, n_tokens=100, seed=seed, progress=False).sae.W_dec
                         for seed in (0, 1, 1))
    assert not torch.equal(one, other) and torch.equal(again, other)


def test_the_bar_of_a_sweep_counts_the_tokens_of_its_runs_alone(tmp_path, monkeypatch):
    bars = []

    class Bar(sweeps.tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            bars.append(self)

    monkeypatch.setattr(sweeps, "tqdm", Bar)
    make = lambda seed: RunConfig("synthetic", "topk", 4, 64, 1000, 300, seed=seed)
    saelib.sweep([make(0)], tmp_path / "r.jsonl", progress=False)
    saelib.sweep([make(0), make(1)], tmp_path / "r.jsonl", progress=True)
    assert (bars[1].total, bars[1].n) == (1000, 1000)


def test_a_source_is_opened_again_once_its_file_has_changed(tmp_path):
    asked, found = RunConfig(str(tmp_path / "x.npy"), "topk", 2, 16, 20), []
    for seed in range(2):
        numpy.save(tmp_path / "x.npy", numpy.random.default_rng(seed).normal(size=(40 + seed, 8)))
        found.append(runs.open_source(asked, "cpu").held_out)
    assert not torch.equal(*found)


def test_runs_that_differ_in_their_size_alone_keep_an_sae_each(tmp_path):
    asked = [RunConfig("synthetic", "topk", 4, n_latents, 1000, 200) for n_latents in (16, 32)]
    rows = saelib.sweep(asked, keep=tmp_path, progress=False)
    assert [saelib.load(row["sae"]).n_latents for row in rows] == [16, 32]


def test_reading_a_checkpoint_runs_no_code_of_its_file(tmp_path):
    torch.save({"about": {}, "x": Spell(tmp_path / "cast")}, tmp_path / "c.pt")
    with pytest.raises(ValueError, match="checkpoint is .*c.pt.*: it must be a file that `train` wrote"):
        checkpoints.resume(tmp_path / "c.pt", {}, torch.device("cpu"), lambda state: None)
    assert not (tmp_path / "cast").exists()
