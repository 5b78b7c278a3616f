import json
import sys

import pytest
import torch

import saelib
from saelib import methods, profiles, runs, sweeps
from saelib.runs import RunConfig


def config(**changes):
    return RunConfig(**({"subject": "synthetic", "method": "topk", "sparsity": 4, "n_latents": 64, "n_tokens": 2000, "batch_size": 200} | changes))


def metrics_of(row):
    return {k: v for k, v in row["metrics"].items() if k not in ("seconds", "tokens_per_second")}


def test_fit_returns_an_sae_its_metrics_and_its_history():
    result = saelib.fit(torch.randn(500, 8), "topk", 3, n_latents=16, n_tokens=1000, batch_size=100, progress=False)
    assert result.sae.W_dec.shape == (16, 8) and len(result.history) == 10
    assert {"normalized_mse", "l0", "dead_fraction", "explained_variance", "tokens_per_second"} <= set(result.metrics)


def test_fit_takes_a_source_and_records_its_normalisation():
    result = saelib.fit(saelib.open_source("synthetic", 500), "relu", 0.01, n_latents=16, n_tokens=500, batch_size=100, progress=False)
    assert result.sae.normalisation == "unit_norm"


def test_a_planted_dictionary_is_found():
    source = saelib.sources.synthetic(40_000, d_model=32, n_features=48, l0=3, exponent=0.0, seed=1)
    sae = saelib.fit(source, "topk", 3, n_latents=64, n_tokens=200_000, batch_size=500, lr=3e-3, progress=False).sae
    best = (source.truth @ sae.W_dec.t()).max(1).values
    assert best.mean() > 0.95


@pytest.mark.parametrize("changes, message", [
    ({"n_latents": 0}, "n_latents is 0: it must be 1 or more"), ({"n_tokens": 0}, "n_tokens is 0"), ({"batch_size": 0}, "batch_size is 0"),
    ({"sparsity": 100}, "sparsity is 100: k must be a whole number from 1 to n_latents = 64"), ({"sparsity": 0}, "sparsity is 0"),
    ({"method": "topq"}, "method is 'topq': it must be one of"),
])
def test_a_bad_argument_is_one_line_that_names_it(changes, message):
    arguments = {"method": "topk", "sparsity": 4, "n_latents": 64, "n_tokens": 100, "batch_size": 50} | changes
    with pytest.raises(ValueError, match=message) as error:
        saelib.fit(torch.randn(200, 8), **arguments, progress=False)
    assert "\n" not in str(error.value)


def test_the_batch_is_never_larger_than_the_run():
    assert saelib.fit(torch.randn(50, 4), "topk", 2, n_latents=8, n_tokens=40, batch_size=1000, progress=False).history[-1]["tokens"] == 40


def test_a_row_says_what_was_asked_measured_and_where(tmp_path):
    row = saelib.run(config())
    assert row["config"]["sparsity"] == 4 and row["metrics"]["l0"] <= 4
    assert {"saelib", "torch", "python", "hardware", "commit", "code", "precision", "path"} == set(row["provenance"])
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
    for module in (runs, sweeps):
        monkeypatch.setattr(module, "code_hash", lambda: "changed")
    runs.provenance.cache_clear()
    saelib.sweep([config()], store, progress=False)
    runs.provenance.cache_clear()
    assert [r["provenance"]["code"] for r in sweeps.read_rows(store)][1] == "changed"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_members_of_a_sweep_equal_the_same_runs_alone(precision):
    configs = [config(seed=s, method=m, sparsity=k, precision=precision) for s in (0, 1) for m, k in (("topk", 4), ("relu", 0.01))]
    together = saelib.sweep(configs, progress=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = [saelib.run(c) for c in configs]
    torch.set_num_threads(threads)
    assert [metrics_of(r) for r in together] == [metrics_of(r) for r in alone]


def test_one_failing_member_stops_the_sweep_and_keeps_what_was_done(tmp_path):
    store = tmp_path / "rows.jsonl"
    with pytest.raises(ValueError, match="sparsity is 500"):
        saelib.sweep([config(), config(sparsity=500)], store, progress=False)
    assert all(r["config"]["sparsity"] == 4 for r in sweeps.read_rows(store))


def test_progress_goes_to_stderr_and_can_be_silent(capsys):
    saelib.fit(torch.randn(100, 4), "topk", 2, n_latents=8, n_tokens=100, progress=True)
    shown = capsys.readouterr()
    assert "topk 2" in shown.err and not shown.out
    saelib.fit(torch.randn(100, 4), "topk", 2, n_latents=8, n_tokens=100, progress=False)
    assert not capsys.readouterr().err


def test_progress_counts_as_many_tokens_as_were_asked_for():
    seen = []
    runs.fit_source(saelib.sources.from_tensor(torch.randn(100, 4)), config(n_latents=8, sparsity=2, n_tokens=250, batch_size=60), on_tokens=seen.append)
    assert seen == [60, 60, 60, 60, 10]


def test_an_unknown_profile_or_setting_is_refused():
    with pytest.raises(ValueError, match="profile is 'lapptop': it must be one of quick, laptop, gpu, paper"):
        profiles.settings("frontier", "lapptop")
    with pytest.raises(ValueError, match="n_sheep is 3: chapter 'frontier' has no such setting"):
        profiles.settings("frontier", "quick", n_sheep=3)


def test_importing_saelib_loads_no_transformers_and_no_plots():
    import subprocess
    code = "import sys, saelib; print([m for m in ('transformers', 'datasets', 'IPython', 'pandas', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


@pytest.mark.parametrize("method, wanted", [("topk", "graph"), ("relu", "graph"), ("batchtopk", "sparse")])
def test_the_path_is_recorded_steps_on_a_gpu_with_kernels_for_methods_that_do_not_wait(method, wanted, monkeypatch):
    made = methods.make(method, 64, 4)
    for has_kernels in (False, True):
        monkeypatch.setattr(runs, "has_kernels", lambda device: has_kernels and device.type == "cuda")
        assert runs.pick_path("auto", "cuda", made) == (wanted if has_kernels else "sparse")
    assert runs.pick_path("auto", "cpu", made) == "sparse"
    assert runs.pick_path("dense", "cuda", made) == "dense"


def test_the_precision_is_chosen_by_hardware_and_size_and_can_be_set():
    assert runs.pick_precision("auto", "cpu", runs.BF16_WEIGHTS - 1) == "fp32" == runs.pick_precision("fp32", "cpu", 2**20)
    fast = runs.subjects.fast_dtype("cpu") == torch.bfloat16
    assert runs.pick_precision("auto", "cpu", runs.BF16_WEIGHTS) == ("bf16" if fast else "fp32")


def test_tasks_side_by_side_keep_their_order_have_a_core_each_and_stop_at_the_first_error():
    before = torch.get_num_threads()
    assert sweeps.side_by_side(lambda item: (item, torch.get_num_threads()), range(5)) == [(item, 1) for item in range(5)]
    with pytest.raises(ZeroDivisionError):
        sweeps.side_by_side(lambda item: 1 / item, [1, 0, 2])
    assert torch.get_num_threads() == before


def test_a_clone_that_is_not_installed_says_so_in_its_rows(monkeypatch):
    def missing(name):
        raise runs.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(runs.importlib.metadata, "version", missing)
    assert runs.provenance.__wrapped__("cpu")["saelib"] == "not installed"
