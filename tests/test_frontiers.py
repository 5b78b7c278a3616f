import math

import pytest

from saelib import frontiers
from saelib.runs import RunConfig


def row(method, sparsity, seed, l0, mse, lr=1e-3):
    return {"config": {"method": method, "sparsity": sparsity, "seed": seed, "lr": lr},
            "metrics": {"l0": l0, "normalized_mse": mse}}


def test_a_power_law_is_read_exactly_between_its_points():
    points = [(l0, 3 * l0**-0.5) for l0 in (64, 4, 16)]
    assert frontiers.at_l0(points, 30) == pytest.approx(3 * 30**-0.5)


def test_a_frontier_is_not_extrapolated():
    assert math.isnan(frontiers.at_l0([(4, 0.3), (16, 0.1)], 17)) and math.isnan(frontiers.at_l0([], 5))


def test_ratios_read_the_other_frontier_at_each_runs_own_l0_and_seed():
    rows = [row("relu", c, s, l0, 2 * (1 + s) / l0) for s in (0, 1) for c, l0 in ((0.1, 40), (0.2, 10))]
    rows += [row("topk", k, s, k - 0.5, 1 / (k - 0.5)) for s in (0, 1) for k in (20, 100)]
    found = frontiers.ratios(rows, "relu", "topk")
    assert found[20] == {0: pytest.approx(2), 1: pytest.approx(4)} and found[100] == {}


def test_a_metric_at_an_l0_is_that_of_the_run_with_that_k_or_read_between():
    # where a token has fewer, L0 is below k
    assert frontiers.metric_at([row("topk", 16, 0, 16, 0.5), row("topk", 32, 0, 31.9, 0.4)], "topk", 32) == {0: 0.4}
    relu = [row("relu", 0.1, 0, 16, 0.4), row("relu", 0.2, 0, 64, 0.1), row("relu", 0.1, 3, 32, 0.3)]
    relu += [row("topk", 32, 4, 32, 0.2)]
    assert frontiers.metric_at(relu, "relu", 32) == pytest.approx({0: 0.2, 3: 0.3})
    assert frontiers.metric_at(relu, "relu", 32, "l0") == pytest.approx({0: 32, 3: 32})
    assert math.isnan(frontiers.metric_at([row("relu", 0.1, 0, 16, 0.4)], "relu", 32)[0])


def test_the_best_rate_is_chosen_by_the_first_seed_among_those_that_reach_the_l0():
    relu = [row("relu", c, s, l0, error, lr) for s in (3, 4) for lr, error in ((1, 0.3), (2, 0.2), (3, 0.1))
            for c, l0 in ((0.1, 40), (0.2, 10 if lr < 3 else 35))]
    topk = [row("topk", 32, 3, 32, 0.3, 1), row("topk", 32, 3, 32, 0.2, 3), row("topk", 32, 4, 32, 0.1, 1)]
    kept = frontiers.at_best_rates(relu + topk, 32)
    assert {(r["config"]["method"], r["config"]["lr"]) for r in kept} == {("relu", 2), ("topk", 3)} and len(kept) == 5
    assert frontiers.at_best_rates(relu[:1], 32) == []


def test_the_interval_over_seeds_is_students():
    mean, low, high = frontiers.interval([1.0, 2.0, 3.0])
    assert mean == 2
    assert high - mean == pytest.approx(4.302653 / math.sqrt(3), rel=1e-5)
    assert mean - low == pytest.approx(high - mean)
    assert frontiers.interval([5.0])[1:] == (-math.inf, math.inf)


def test_bisection_ends_at_the_wanted_l0_and_counts_every_run(monkeypatch):
    asked = []

    def fake(configs, store, device, progress):
        asked.append(configs[0].sparsity)
        return [{"config": {}, "metrics": {"l0": 3.0 / configs[0].sparsity}}]

    monkeypatch.setattr(frontiers, "sweep", fake)
    rows = frontiers.bisect(RunConfig("synthetic", "relu", 0.5, 8, 10), 32)
    assert abs(rows[-1]["metrics"]["l0"] / 32 - 1) <= 0.05 and len(rows) == len(asked) > 2
    # by factors of 4, then halfway between exponents: L0 is 32 at 2^-3.415
    assert asked == pytest.approx([2.0**-e for e in (1, 3, 5, 4, 3.5, 3.25, 3.375)])
    asked.clear()
    frontiers.bisect(RunConfig("synthetic", "relu", 2.0**-8, 8, 10), 32)  # from the other side
    assert asked[:5] == pytest.approx([2.0**-e for e in (8, 6, 4, 2, 3)])
    assert len(frontiers.bisect(RunConfig("synthetic", "relu", 3 / 32, 8, 10), 32)) == 1


@pytest.mark.parametrize("change, rule", [
    ({"n_tokens": 9}, "rows is 'of n_tokens 5, 9 on one frontier': it must be alike in it"),
    ({"lr": 0.2}, "of lr 0.1, 0.2 on one frontier"),
    ({"n_latents": 16}, "of n_latents 16, 8 on one frontier"), ({"subject": "b"}, "of subject a, b on one frontier"),
    ({}, "rows is 'of topk with one sparsity and seed twice': it must be of different runs")])
def test_only_runs_that_are_alike_share_a_frontier(change, rule):
    config = {"subject": "a", "method": "topk", "sparsity": 4, "n_latents": 8, "n_tokens": 5, "lr": 0.1, "seed": 0}
    row = lambda **changes: {"config": config | changes, "metrics": {"l0": 4.0, "normalized_mse": 0.5}}
    alike = [row(), row(seed=1), row(sparsity=8), row(method="relu", sparsity=0.1, lr=0.3),
             row(method="relu", sparsity=0.2, lr=0.3)]
    frontiers.check_comparable(alike)
    for compare in (frontiers.check_comparable, lambda rows: frontiers.ratios(rows, "relu", "topk")):
        with pytest.raises(ValueError, match=rule):
            compare([*alike, row(**change)])


def test_a_method_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="method is 'TopK': it must be one of"):
        frontiers.ratios([], "relu", "TopK")


def test_a_metric_of_0_is_not_read_between_runs():
    rows = [row("relu", 0.1, 0, 40, 0.3), row("relu", 0.2, 0, 20, 0.0)]
    with pytest.raises(ValueError, match="metric is 'normalized_mse': it must be one that is above 0 in every run"):
        frontiers.metric_at(rows, "relu", 32)
    with pytest.raises(ValueError, match="subject is 'gpt2': it must be one that tools/lengths.py trained on"):
        frontiers.by_length("gpt2", 32)


def test_a_method_without_a_rate_that_reaches_the_l0_has_no_best_rows():
    rows = [row("topk", 32, 0, 32, 0.2, None), row("relu", 0.1, 0, 40, 0.3, None)]
    assert frontiers.at_best_rates(rows, 32) == rows[:1]


@pytest.mark.parametrize("subject, l0", [("pygpt", 32), ("synthetic", 8)])
def test_the_longer_runs_have_each_method_at_one_rate_and_three_seeds(subject, l0):
    found = frontiers.by_length(subject, l0)
    assert list(found) == [100_000, 300_000, 1_000_000, 3_000_000]
    for rows in found.values():
        for method in ("topk", "relu"):
            assert frontiers.metric_at(rows, method, l0).keys() == {0, 1, 2}
            assert len({r["config"]["lr"] for r in rows if r["config"]["method"] == method}) == 1
