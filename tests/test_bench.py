"""The benchmark at tiny sizes: everyone runs, on the same work, and the rows say what they promise. Nothing is asserted
of times."""
import importlib.util
import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from saelib import bench, contestants, data_bench, native, parts, peers, profiles, speed_plots, speed_rows, timing
from saelib.contestants import CASES, RELU, Ours, Plain, Setting

TINY = Setting(32, 320, 4, 64)
PROMISED = {"table", "setting", "case", "name", "ms", "ratio", "rounds", "differs"}


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(bench, "FIRST", TINY)
    monkeypatch.setattr(bench, "WIDE", Setting(32, 160, 2, 32))
    monkeypatch.setattr(bench, "AXES", {"n_latents": [160, 320], "k": [2], "batch_size": [32, 64]})
    monkeypatch.setattr(bench, "FIT_STEPS", {"cpu": 12})
    monkeypatch.setattr(data_bench, "SUBJECTS", ("pygpt",))
    monkeypatch.setattr(parts, "COPY_FLOATS", 2**12)


def weights(contestant):
    return [parameter.detach() for parameter in contestant.trained().parameters()]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("path", ["sparse", "dense"])
def test_the_plain_loop_and_ours_do_the_same_work(case, path):
    own, plain = Ours(TINY, case, path), Plain(TINY, case)
    for x in TINY.batches(3):
        own.step(x)
        plain.step(x)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(weights(own), weights(plain)))
    assert not any(torch.equal(a, b) for a, b in zip(weights(own), [p.detach() for p in TINY.start(case).parameters()]))


def test_the_case_with_few_active_latents_starts_with_k_of_them():
    x, = TINY.batches(1)
    l0 = {case: float((TINY.start(case).encode(x) > 0).sum(1).float().mean()) for case in ("relu", "relu_few")}
    assert l0["relu"] > TINY.n_latents / 4 and 0.8 < l0["relu_few"] / TINY.k < 1.25


@pytest.mark.parametrize("kind", [Ours, Plain])
def test_one_latent_in_twenty_stays_dead_and_auxk_trains_it(kind):
    with_dead, start = kind(TINY, "auxk"), TINY.start("auxk")
    for x in TINY.batches(4):
        with_dead.step(x)
    assert with_dead.n_dead() == 16 and kind(TINY, "topk").n_dead() == 0
    moved = (with_dead.trained().W_enc - start.W_enc).detach().norm(dim=1)
    assert (moved[::contestants.DEAD_EVERY] > 0).all()  # no other loss reaches them


@pytest.mark.parametrize("case", CASES)
def test_other_libraries_begin_with_our_weights_and_keep_the_dead_dead(case):
    if not peers.peers(TINY, case):
        pytest.skip("no other library is installed: pip install '.[peers]'")
    for (_, name), make in peers.peers(TINY, case).items():
        theirs = make()
        for x in TINY.batches(2):
            theirs.step(x)
        assert theirs.n_dead() == (16 if case == "auxk" else 0), name
        if case not in RELU:
            assert torch.allclose(theirs.trained().W_dec, TINY.start(case).W_dec, atol=1e-2), name


def test_peers_are_offered_if_and_only_if_they_are_installed():
    libraries = {"SAELens, dense": "sae_lens", "SAELens, sparse COO": "sae_lens",
                 "dictionary_learning": "dictionary_learning", "sparsify": "sparsify"}
    assert {name for _, name in peers.peers(TINY, "topk")} == {name for name, library in libraries.items()
                                                               if importlib.util.find_spec(library)}


@pytest.mark.parametrize("name", ["steps", "few", "wide", "fit", "fit_relu", "curves", "parts", "harvest", "load"])
def test_every_row_keeps_its_promises_and_every_ratio_is_to_the_floor(small, name):
    make, *rest = bench.tables("cpu", 0.0)[name]
    rows = list(make(*rest))
    assert rows and not any("failed" in row for row in rows) and json.loads(json.dumps(rows)) == rows
    for row in rows:
        assert set(row) >= PROMISED and all(set(row[key]) == {"median", "q1", "q3"} for key in ("ms", "ratio"))
        assert row["ms"]["q1"] <= row["ms"]["median"] <= row["ms"]["q3"]
    assert all(row["ratio"] == {"median": 1, "q1": 1, "q3": 1} for row in rows
               if row["name"] in ("GEMM fp32", "GEMM", "forward alone"))


def test_a_ratio_is_the_median_over_rounds_and_not_the_ratio_of_medians():
    assert timing.quartiles([1.0, 4.0, 2.0]) == {"median": 2, "q1": 1.5, "q3": 3}
    assert timing.quartiles([2e-3], 1e3) == {"median": 2, "q1": 2, "q3": 2}


def test_times_are_in_milliseconds():
    makers = {("floor", "f"): lambda: contestants.Floor(lambda x: time.sleep(0.02))}
    row, = timing.compare(makers, [torch.zeros(2, 2)], ("floor", "f"), 0.0, "t")
    assert 20 <= row["ms"]["median"] < 1000


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="only Linux keeps a process's peak")
def test_the_peak_of_memory_is_in_bytes():
    timing.forget_peak()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    assert timing.peak_resident() == pytest.approx(resident, rel=0.01)


def test_committed_rows_are_those_of_one_table_and_device_that_did_not_fail(monkeypatch, tmp_path):
    rows = [{"table": table, "setting": {"device": device}, "name": name} | failed for table in ("steps", "few")
            for device in ("cpu", "cuda")
            for name, failed in (("good", {}), ("bad", {"failed": "no memory left"}))]
    (tmp_path / "speed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(speed_rows, "RESULTS", tmp_path / "speed.jsonl")
    assert speed_rows.committed("steps") == [rows[0]] and speed_rows.committed("steps", device="cuda") == [rows[2]]


def test_the_floor_of_adam_moves_every_weight(monkeypatch):
    sae = TINY.start("topk")
    before = [parameter.detach().clone() for parameter in sae.parameters()]
    monkeypatch.setattr(Setting, "start", lambda setting, case: sae)
    contestants.fused_adam(TINY)(torch.empty(0))
    for old, new in zip(before, sae.parameters()):  # Adam's first step is the learning rate against the gradient's sign
        torch.testing.assert_close(new.detach(), old - contestants.LR, rtol=0, atol=1e-6)


def test_a_contestant_that_cannot_run_leaves_a_row_that_says_why():
    def broken():
        raise RuntimeError("no memory left")

    x = torch.zeros(2, 2)
    rows = timing.compare({("floor", "f"): lambda: contestants.Floor(lambda x: x.sum()), ("topk", "b"): broken}, [x],
                          ("floor", "f"), 0.0, "t")
    assert rows[-1] == {"case": "topk", "name": "b", "failed": "RuntimeError: no memory left"} and len(rows) == 2


def test_the_predictions_of_the_two_floors_are_their_own_times(small):
    make, *rest = bench.tables("cpu", 0.0)["parts"]
    for row in make(*rest):
        if row["name"] in ("encoder product", "large copy"):
            assert row["predicted_ms"] == pytest.approx(row["ms"]["median"], rel=1e-3)
        assert ("predicted_ms" in row) == (row["case"] == "part")


def test_the_count_of_operations_is_that_of_the_paper(small):
    counted = parts.parts(TINY)
    assert counted["encoder product"].operations == 2 * 64 * 32 * 320
    assert counted["decode"].operations == 2 * 64 * 4 * 32 and counted["Adam"].bytes == 28 * 2 * 320 * 32
    assert counted["group by latent"].bytes == 4 * (2 + 8) * 64 * 4  # two passes over 2-byte keys
    assert parts.large_copy("cpu").bytes == 2 * 4 * parts.COPY_FLOATS  # read and written


def test_memory_is_measured_in_a_process_of_its_own(small, monkeypatch):
    monkeypatch.setattr(bench, "PROCESSES", 1)
    weights = 2 * 8192 * 64 + 8192 + 64
    row = next(iter(bench.memory([Setting(64, 8192, 4, 64)])))
    assert row["needed_bytes"] == 4 * (4 * weights + 256 * 8192 + 64 * 64)
    assert row["peak_bytes"] > 4 * 4 * weights  # weights, gradients and moments are there at the end


def test_seconds_to_a_target_come_with_the_error_after_equal_tokens(small, monkeypatch):
    monkeypatch.setattr(bench, "TARGET_STEPS", 10)
    monkeypatch.setattr(bench, "TARGET_TOKENS", 700)
    monkeypatch.setattr(bench, "TARGET_MSE", 1.5)
    rows = {row["name"]: row for row in bench.target("cpu")}
    assert {"saelib, fp32", "plain loop"} <= set(rows)
    assert all(row["tokens"] == 640 and row["seconds"] == row["trace"][0][0] for row in rows.values())
    assert rows["saelib, fp32"]["normalized_mse"] == pytest.approx(rows["plain loop"]["normalized_mse"], rel=1e-3)


def test_the_frontier_is_the_profile_s_and_reports_every_member(monkeypatch):
    monkeypatch.setitem(profiles.PROFILES["frontier"], "gpu", profiles.PROFILES["frontier"]["gpu"] | dict(
        source_tokens=3000, n_tokens=2000, batch_size=500, n_latents={"pygpt": (64, 128)}))
    row, = bench.frontier("cpu")
    assert [(m["method"], m["sparsity"], m["n_latents"])
            for m in row["members"]] == [(*knob, n) for n in (64, 128) for knob in bench.FRONTIER]
    assert row["seconds"] > 0 and all(0 < m["normalized_mse"] < 2 for m in row["members"])
    assert "8 members" in speed_rows.text([row]) and f"{row['seconds']:.1f} s" in speed_rows.text([row])


def test_main_prints_a_table_and_keeps_its_rows_once(small, tmp_path, capsys):
    for _ in range(2):
        bench.main(["--device", "cpu", "--only", "steps", "curves", "--seconds-limit", "0", "--out",
                    str(tmp_path / "speed.jsonl")])
    said = capsys.readouterr().out
    assert "steps: d_model 32, n_latents 320, k 4, batch_size 64, device cpu" in said and "saelib, dense twin" in said
    rows = [json.loads(line) for line in (tmp_path / "speed.jsonl").read_text().splitlines()]
    keys = [(*speed_rows.identity(row), row["case"], row["name"]) for row in rows]
    assert len(keys) == len(set(keys))
    assert {"torch", "hardware", "commit", "processor", "threads"} <= set(rows[0]["provenance"])
    with pytest.raises(SystemExit):
        bench.main(["--only", "nonsense"])


def test_the_figures_list_every_row_they_draw(small):
    at = {"provenance": timing.machine("cpu"), "date": "2026-01-02"}
    rows_of = lambda name: [row | at for row in bench.tables("cpu", 0.0)[name][0](*bench.tables("cpu", 0.0)[name][1:])]
    steps, curves = rows_of("steps"), rows_of("curves")
    apart = [row for row in rows_of("parts") if row["case"] == "part" and row["setting"]["n_latents"] == 320]
    assert len(speed_plots.multiples(steps).numbers) == len(steps)
    assert len(speed_plots.against(curves).numbers) == len({(row["axis"], row["name"]) for row in curves})
    assert len(speed_plots.apart(apart).numbers) == len(apart) == 10
    assert all(picture.svg() for picture in (speed_plots.multiples(steps), speed_plots.against(curves),
                                             speed_plots.apart(apart)))


@pytest.mark.parametrize("case, wanted, others", [("topk", "native", "sparse"), ("relu", "sparse", "native")])
def test_a_whole_fit_is_timed_by_the_step_on_each_path(monkeypatch, case, wanted, others):
    setting, asked = contestants.Setting(64, 1024, 4, 64), []

    def fit(data, method, sparsity, *, path, **rest):
        asked.append((method, path))
        return SimpleNamespace(metrics={"seconds": 24.0 if path == "auto" else 12.0}, history=[{"dead_fraction": 0.25}])

    monkeypatch.setattr(native, "available", lambda: True)
    monkeypatch.setattr(bench, "FIT_STEPS", {"cpu": 12})
    monkeypatch.setattr(bench, "Ours", lambda s, case, path, precision: asked.append((case, path))
                        or SimpleNamespace(step=lambda x: None))
    monkeypatch.setattr(bench.runs, "fit", fit)
    rows = {row["name"]: row for row in bench.whole_fit(setting, case, 0.0)}
    assert set(rows) == {"GEMM", "one step", "fit", f"fit, {others}"}
    assert asked[:3] == [(case, wanted), (case, "auto"), (case, others)]
    assert rows["fit"]["ms"]["median"] == 2000 and rows[f"fit, {others}"]["ms"]["median"] == 1000
    assert rows["fit"]["differs"] == "12 steps, 256 dead at the end" and wanted in rows["fit"]["auto"] + "sparse"
