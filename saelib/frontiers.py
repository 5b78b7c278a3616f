"""Comparing frontiers: normalized MSE at matched L0, intervals over seeds, and the search for a wanted L0."""
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from scipy import stats

from saelib.checks import require
from saelib.methods import METHODS, find
from saelib.runs import RunConfig
from saelib.sweeps import read_rows, sweep

CONFIDENCE = 0.95
# what tools/lengths.py keeps, in the package, so that an installed one can draw it
LENGTHS = Path(__file__).parent / "rows" / "lengths.jsonl"


def at_l0(points: Sequence[tuple[float, float]], l0: float) -> float:
    """Normalized MSE at a wanted L0, by straight lines between neighbours on logarithmic axes; or any y at a wanted x.

    Args:
        points: (L0, normalized MSE) of one method and one seed.
        l0: where to read.

    Returns:
        The value there; NaN outside the range of the points, for a frontier is not extrapolated.
    """
    ordered = sorted(p for p in points if p[0] > 0 and p[1] > 0)
    if not ordered or not ordered[0][0] <= l0 <= ordered[-1][0]:
        return math.nan
    xs, ys = np.log(np.array(ordered)).T
    return float(np.exp(np.interp(math.log(l0), xs, ys)))


def metric_at(rows: Sequence[dict], method: str, l0: float, metric: str = "normalized_mse") -> dict[int, float]:
    """A metric of one method at a wanted L0, seed by seed: of the run with that k, or between two runs (see `at_l0`).

    Args:
        rows: runs that differ in method, knob and seed.
        method: key of the method.
        l0: where to read.
        metric: which of the rows' metrics.

    Returns:
        Seed -> value; NaN where `at_l0` has none.

    Raises:
        ValueError: a metric that is 0 or less in a run, where it is to be read between runs.
    """
    by_seed: dict[int, list[dict]] = {}
    for row in rows:
        if row["config"]["method"] == method:
            by_seed.setdefault(row["config"]["seed"], []).append(row)
    table = {}
    for seed, members in by_seed.items():
        exact = [row for row in members if METHODS[method].knob == "k" and row["config"]["sparsity"] == l0]
        points = [(row["metrics"]["l0"], row["metrics"][metric]) for row in members]
        require(bool(exact) or all(value > 0 for at, value in points if at > 0), "metric", metric,
                "one that is above 0 in every run, to be read on a logarithmic axis")
        table[seed] = exact[0]["metrics"][metric] if exact else at_l0(points, l0)
    return table


def at_best_rates(rows: Sequence[dict], l0: float) -> list[dict]:
    """Those rows that were trained at their method's best learning rate: of all that reach a wanted L0, that with the
    least error there.

    Args:
        rows: runs that differ in method, learning rate, knob and seed. The rate is chosen by the first seed alone.
        l0: where to compare.
    """
    first, best = min(row["config"]["seed"] for row in rows), {}
    for method in {row["config"]["method"] for row in rows}:
        errors = {}
        for lr in {row["config"]["lr"] for row in rows}:
            error = metric_at([row for row in rows if row["config"]["lr"] == lr], method, l0).get(first, math.nan)
            if not math.isnan(error):
                errors[lr] = error
        if errors:
            best[method] = min(errors, key=errors.get)
    return [row for row in rows if (method := row["config"]["method"]) in best and row["config"]["lr"] == best[method]]


def by_length(subject: str, l0: float) -> dict[int, list[dict]]:
    """The longer and longer runs that come with saelib: training tokens -> rows, each method's at its best rate there.

    Args:
        subject: one that `tools/lengths.py` trained on.
        l0: where rates are compared (see `at_best_rates`).
    """
    rows = [row for row in read_rows(LENGTHS) if row["config"]["subject"] == subject]
    require(len(rows) > 0, "subject", subject, "one that tools/lengths.py trained on")
    return {n: at_best_rates([row for row in rows if row["config"]["n_tokens"] == n], l0)
            for n in sorted({row["config"]["n_tokens"] for row in rows})}


def check_comparable(rows: Sequence[dict]) -> None:
    """Raise ValueError unless these rows can stand on one frontier: all of one subject and one size, and those of one
    method alike but for their knob and their seed, each pair of these once."""
    configs = [row["config"] for row in rows]
    for method in [None, *{config["method"] for config in configs}]:
        members = [config for config in configs if method in (None, config["method"])]
        of_method = sorted({name for config in members for name in config} - {"sparsity", "seed"})
        for name in ("subject", "n_latents") if method is None else of_method:
            values = sorted({str(config.get(name)) for config in members})
            require(len(values) <= 1, "rows", f"of {name} {', '.join(values)} on one frontier",
                    f"alike in it: leave some out, or set them apart by plots.frontier(panel={name!r})")
        pairs = [(config["sparsity"], config["seed"]) for config in members]
        require(method is None or len(set(pairs)) == len(pairs), "rows",
                f"of {method} with one sparsity and seed twice", "of different runs")


def check_drawable(rows: Sequence[dict], panel: str, y: str, logy: bool) -> None:
    """Raise ValueError unless `plots.frontier` can draw these rows: they have the fields, and numbers that its axes
    have room for."""
    require(len(rows) > 0, "rows", list(rows), "one row or more")
    for name, part, there in (("panel", "config", panel), ("y", "metrics", y)):
        require(all(there in row[part] for row in rows), name, there, f"one of {', '.join(rows[0][part])}")
    for name, log, hint in (("l0", True, ""), (y, logy, ", or logy=False")):
        for row in rows:
            config, value = row["config"], row["metrics"][name]
            require(math.isfinite(value) and (value > 0 or not log), "rows",
                    f"with {name} {value:g} ({config['method']}, {config['sparsity']:g}, seed {config['seed']})",
                    f"finite{f' and above 0 in it{hint}' * log}")


def ratios(rows: Sequence[dict], over: str, under: str) -> dict[float, dict[int, float]]:
    """How many times `over`'s normalized MSE is `under`'s, for each run of `under`, at that run's own L0.

    Only `over` is interpolated, along the frontier of the same seed; a run whose L0 lies outside it is left out.

    Args:
        rows: runs of one subject and one size.
        over, under: keys of methods.

    Returns:
        Sparsity of `under` -> seed -> MSE(over) / MSE(under).

    Raises:
        ValueError: runs that differ in more, or a method that there is not.
    """
    methods = [find(key).key for key in (over, under)]
    check_comparable([row for row in rows if row["config"]["method"] in methods])
    frontier: dict[int, list[tuple[float, float]]] = {}
    for row in rows:
        if row["config"]["method"] == over:
            point = row["metrics"]["l0"], row["metrics"]["normalized_mse"]
            frontier.setdefault(row["config"]["seed"], []).append(point)
    table: dict[float, dict[int, float]] = {}
    for row in rows:
        if row["config"]["method"] == under:
            seed, measured = row["config"]["seed"], row["metrics"]
            ratio = at_l0(frontier.get(seed, []), measured["l0"]) / measured["normalized_mse"]
            by_seed = table.setdefault(row["config"]["sparsity"], {})
            if not math.isnan(ratio):
                by_seed[seed] = ratio
    return table


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and 95 % confidence interval by Student's t, over seeds; infinite with a single seed."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, -math.inf, math.inf
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))
    return mean, mean - half, mean + half


def bisect(config: RunConfig, target_l0: float, *, tolerance: float = 0.05, most: int = 12,
           store: Path | str | None = None, device: str = "auto", progress: bool = True) -> list[dict]:
    """Train again and again until L0 is within `tolerance` of `target_l0`: bisection of the knob on a log axis.

    The knob starts at `config.sparsity` and moves by a factor of 4 until the target is bracketed.

    Returns:
        Every run that it took, in order; the last one hit, unless `most` runs were not enough.
    """
    require(METHODS[config.method].knob == "l1_coef", "method", config.method, "one whose knob is an L1 coefficient")
    require(config.sparsity > 0, "sparsity", config.sparsity, "above 0")
    require(target_l0 > 0, "target_l0", target_l0, "above 0")
    rows, below, above = [], None, None  # sparsity with L0 below, above the target
    while len(rows) < most:
        rows += sweep([config], store, device=device, progress=progress)
        l0 = rows[-1]["metrics"]["l0"]
        if abs(l0 / target_l0 - 1) <= tolerance:
            break
        below, above = (config.sparsity, above) if l0 < target_l0 else (below, config.sparsity)
        config = replace(config, sparsity=math.sqrt(below * above) if below and above else below / 4 if below
                         else above * 4)
    return rows
