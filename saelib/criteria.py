"""The criteria of the claims as functions: from what was measured to (a line that says it, whether each part held).

Their words stand in `saelib.claims`. Both were written before the runs.
"""
import math
from collections.abc import Sequence
from itertools import pairwise

from saelib.frontiers import interval


def said(values: Sequence[float], form: str) -> str:
    """The mean of the seeds and its interval; one seed has none."""
    mean, low, high = interval(values)
    return f"{mean:{form}} [{low:{form}}, {high:{form}}]" if len(values) > 1 else f"{mean:{form}} (one seed)"


def headline(ratios: dict[str, dict[float, dict[int, float]]]):
    lines, parts = [], []
    n_seeds = max((len(by_seed) for by_l0 in ratios.values() for by_seed in by_l0.values()), default=0)
    for subject, by_l0 in ratios.items():
        for l0, by_seed in by_l0.items():
            if by_seed:
                fewer = f", in {len(by_seed)} of {n_seeds} seeds" * (len(by_seed) < n_seeds)
                lines.append(f"{subject} L0 {l0:g}: {said(list(by_seed.values()), '.2f')} times{fewer}")
                parts.append(min(by_seed.values()) > 1)
    return "; ".join(lines), parts


def gap_grows(ratios: dict[int, dict[int, float]]):
    if len(ratios) < 2:
        return "fewer than two sizes have runs on both sides of L0 32", []
    least, most = min(ratios), max(ratios)
    shared = sorted(set(ratios[least]) & set(ratios[most]))
    growth = [ratios[most][seed] / ratios[least][seed] for seed in shared]
    text = ", ".join(f"n = {n}: {interval(list(by_seed.values()))[0]:.2f}" for n, by_seed in sorted(ratios.items()))
    return f"ReLU's error over TopK's at L0 32, {text}; growth {said(growth, '.2f')}", [interval(growth)[1] > 1]


def lead_lasts(ratios: dict[int, dict[int, float]]):
    longest = max(ratios)
    lead = {n: {seed: ratio - 1 for seed, ratio in ratios[n].items()} for n in (longest // 10, longest)}
    kept = [now / lead[longest // 10][seed] if lead[longest // 10][seed] > 0 else math.nan
            for seed, now in lead[longest].items()]
    text = ", ".join(f"{n:,} tokens: {interval(list(by_seed.values()))[0]:.2f}"
                     for n, by_seed in sorted(ratios.items()))
    return (f"ReLU's error over TopK's at L0 32, {text}; what it is above 1 at {longest:,} tokens is "
            f"{said(kept, '.2f')} times that at {longest // 10:,}",
            [min(ratio for by_seed in ratios.values() for ratio in by_seed.values()) > 1,
             all(share >= 0.5 for share in kept)])


def equal_l0(topk_spread: float, relu_spread: float):
    return (f"largest spread of L0 over seeds: TopK {topk_spread:.2%}, ReLU {relu_spread:.1%}",
            [topk_spread < 0.01, relu_spread > topk_spread])


def l0_by_construction(largest_excess: float, shortfall: dict[str, float]):
    text = ", ".join(f"{name} {value:.2%}" for name, value in shortfall.items())
    return (f"active latents above k, for any token: {max(0, largest_excess):g}; L0 below k at initialisation by "
            f"{text}",
            [largest_excess <= 0, max(shortfall.values()) < 0.01])


def l0_emerges(searches: dict[str, list[float]], target: float, spreads: dict[float, float]):
    reached = {name: abs(l0s[-1] / target - 1) <= 0.05 for name, l0s in searches.items()}
    text = ", ".join(f"{name} {'' if reached[name] else 'not in '}{len(l0s)}" for name, l0s in searches.items())
    widest, narrowest = max(spreads, key=spreads.get), min(spreads, key=spreads.get)
    return (f"training runs to reach L0 {target:g} within 5 %: {text}; TopK 1. Over subjects and n, L0s lie "
            f"{spreads[widest]:.2f}-fold apart at l1_coef {widest:g}, {spreads[narrowest]:.2f}-fold at {narrowest:g}",
            [all(reached[name] and len(l0s) > 1 for name, l0s in searches.items()), spreads[widest] > 2])


def recovery(topk: list[float], relu: list[float], wide: list[float]):
    mean = lambda v: interval(v)[0]
    return (f"mean max cosine at the true L0: TopK {mean(topk):.3f}, ReLU {mean(relu):.3f}; TopK at 4 times the true "
            f"L0 {mean(wide):.3f}",
            [min(topk) > 0.9, all(t > r for t, r in zip(topk, relu)), all(w < t for w, t in zip(wide, topk))])


def gamed(norms: list[float], l1: list[float], l0: list[float], spread: dict[str, float]):
    text = ", ".join(f"{name} {value:.2f}" for name, value in spread.items())
    return (f"synthetic: without the constraint, in the seed where it shows least: decoder rows of mean norm "
            f"{min(norms):.2f}, {max(l1):.2f} times the twin's L1, {min(l0):.2f} times its L0. "
            f"Over tokens with equal L0, the 95th percentile of L1 over the 5th: {text}",
            [min(norms) > 2, max(l1) < 0.5, min(l0) > 1, min(spread.values()) > 1.5])


def shrinkage(shift: dict[float, list[float]], large: dict[float, list[float]]):
    lines = [f"l1_coef {coef:g}: {interval(shift[coef])[0]:.3f}, largest quarter {interval(large[coef])[0]:.3f}"
             for coef in shift]
    off = lambda table: max(abs(value - 1) for values in table.values() for value in values)
    return "shift in units of l1_coef / 2, " + "; ".join(lines), [off(shift) < 0.05, off(large) < 0.1]


def refined(shift: dict[str, dict[str, list[float]]], change: dict[str, dict[str, list[float]]]):
    lines, parts = [], []
    for subject, by in shift.items():
        relu, topk = (said(by[method], "+.1%") for method in ("relu", "topk"))
        moved = {method: sum(values) / len(values) for method, values in change[subject].items()}
        lines.append(f"{subject}: the sum of latents changes by ReLU {relu}, TopK {topk}, single ones by "
                     f"{moved['relu']:.1%} and {moved['topk']:.1%} of it")
        parts += [min(by["relu"]) > 0, all(t < r for t, r in zip(change[subject]["topk"], change[subject]["relu"])),
                  all(abs(t) < r / 4 for t, r in zip(by["topk"], by["relu"]))]
    return "; ".join(lines), parts


def unbiased(shift: dict[str, list[float]]):
    text = "; ".join(f"{subject}: {said(values, '+.2%')}" for subject, values in shift.items())
    return f"refinement moves TopK's latents by {text}", [max(map(abs, values)) < 0.02 for values in shift.values()]


def largest_values(terms: list[str], same: dict[str, float], by_magnitude: dict[str, float]):
    text = ", ".join(f"{name} {same[name]:.1%} and {by_magnitude[name]:.1%}" for name in same)
    return (f"terms of the loss: {', '.join(terms)}; tokens whose active latents are the k largest values, and for "
            f"which magnitudes choose others: {text}",
            [terms == ["squared_error"], min(same.values()) == 1, min(by_magnitude.values()) > 0.5])


def exact_jacobian(mask: float, differences: float, straight_through: float, errors: dict[str, list[float]]):
    worse = [ste / exact for ste, exact in zip(errors["topk_ste"], errors["topk"])]
    return (f"autograd is off the mask by {mask:.0e}, off finite differences by {differences:.0e} (straight-through: "
            f"{straight_through:.1f}), relative; "
            f"straight-through's normalized MSE is {min(worse):.2f} to {max(worse):.2f} times TopK's, over subjects "
            f"and seeds",
            [mask < 1e-12, differences < 1e-6, straight_through > 0.1, min(worse) > 1])


def discrete(kept: dict[str, float], changed: list[tuple[float, float]]):
    first, last = (interval([pair[i] for pair in changed])[0] for i in (0, 1))
    return (f"largest step left on a path cut 16 times finer: TopK {kept['topk']:.2f}, ReLU {kept['relu']:.2f}; "
            f"tokens whose active set changed between checkpoints: {first:.1%} at first, {last:.1%} at last",
            [kept["topk"] > 0.9, kept["relu"] < 0.2, all(end < start for start, end in changed)])


def l1_trades(d_model: int, l0: dict[int, list[float]], mse: dict[int, list[float]], pca: dict[int, list[float]]):
    rises = lambda values: all(a < b for a, b in pairwise(values))
    works = [min([m / p for n, m, p in zip(l0[s], mse[s], pca[s]) if 2 * n < d_model], default=float("inf"))
             for s in l0]
    first = next(iter(l0))
    return (f"synthetic: L0 {', '.join(f'{n:.1f}' for n in l0[first])}, normalized MSE "
            f"{', '.join(f'{m:.3f}' for m in mse[first])} (seed {first}); "
            f"where L0 is below half of d_model the error is {max(works):.2f} times that of as many principal "
            f"components at best, in every seed",
            [all(rises(of_seed[::-1]) for of_seed in l0.values()), all(map(rises, mse.values())), max(works) < 1])


def constant_pull(l1_deviation: float, l2_deviation: float, l2_fades: float):
    wrong = " not" * (max(l1_deviation, l2_deviation) >= 1e-5)
    return (f"autograd's derivatives are{wrong} λ and 2λz, to a relative 1e-5; "
            f"L2's pull on the smallest active latent is {l2_fades:.1e} of that on the largest",
            [l1_deviation < 1e-5, l2_deviation < 1e-5, l2_fades < 0.01])


def pull_makes_zeros(in_1d: dict[str, float], more_active: list[float], l1_zeros: list[float], no_zeros: list[float],
                     l2_zeros: list[float]):
    reached = [ratio for ratio in more_active if not math.isnan(ratio)]
    return (f"1-D: zero for {in_1d['L1']:.0%} of 0 < x <= λ/2 under L1 and {in_1d['L2']:.0%} under L2; synthetic: "
            f"at the errors of {len(reached)} of {len(more_active)} runs with L1, "
            f"which L2 reaches too, L2 keeps at least {min(reached, default=math.nan):.1f} times L1's active latents; "
            f"exact zeros with no penalty at most {max(no_zeros):.1%}, with L1 at least {min(l1_zeros):.1%}, with L2 "
            f"and ReLU up to {max(l2_zeros):.1%}",
            [in_1d["L1"] == 1 and in_1d["L2"] == 0, min(reached, default=0) > 1, min(l1_zeros) > max(no_zeros),
             max(l2_zeros) < 0.01])


def smooth_loses_zeros(in_1d: dict[str, float], without_relu: dict[str, float]):
    smooth = [name for name in without_relu if name != "L1"]
    text = ", ".join(f"{name} {share:.2%}" for name, share in without_relu.items())
    return (f"1-D: zero for {in_1d['L1']:.0%} of 0 < x <= λ/2 under L1, for {max(in_1d[name] for name in smooth):.0%} "
            f"under smooth L1; synthetic: exact zeros in SAEs without ReLU: {text}",
            [in_1d["L1"] == 1 and not any(in_1d[name] for name in smooth),
             max(without_relu[name] for name in smooth) < 1e-3, without_relu["L1"] > 1e-3])


def same_bits(different: dict[str, int], control: int, exact_zeros: float):
    text = ", ".join(f"{name} {n}" for name, n in different.items() if n)
    text = text or f"none in any of {len(different)} comparisons"
    return (f"weights that differ from those of choice 0: {text}; "
            f"in the control {'some' if control else 'none'}; {exact_zeros:.1%} of the latents in training were "
            f"exactly 0",
            [not any(different.values()), control > 0, exact_zeros > 0.1])


def opposite_orders(margin: float, pair: str, definitions: str):
    found = f"{pair}, {definitions}: the smaller of the two differences is {margin:.1%}"
    return found if margin else "no pair in opposite orders", [margin > 0.01]


def own_activations(errors: list[float], changes: list[float]):
    return (f"normalized MSE of TopK with growing k: {', '.join(f'{e:.3f}' for e in errors)}; L0 and error are those "
            f"of the same file before, to {max(map(abs, changes)):.2%}",
            [all(abs(change) < 0.01 for change in changes), all(a > b for a, b in pairwise(errors))])
