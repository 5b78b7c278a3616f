"""Claims, the criterion that each must meet, and the verdict on what was measured.

The criteria stand here, away from the notebooks, and were written before the runs. A claim that fails is
reported as failed.
"""
import html
from collections.abc import Callable
from dataclasses import dataclass

from saelib.frontiers import interval

VERDICT_MIME, NUMBERS_MIME = "application/vnd.saelib.verdict+json", "application/vnd.saelib.numbers+json"


@dataclass(frozen=True)
class Claim:
    """One claim: its words, where the paper makes it, the criterion in words, the paper's own figure, and the same
    criterion as a function from the measured values to (a line that says them, whether each part held)."""
    claim: str
    section: str
    criterion: str
    paper: str
    judge: Callable[..., tuple[str, list[bool]]]


class Verdict(dict):
    """What the scoreboard holds of one claim. A notebook shows it as a box and keeps it as data."""

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict:
        css = self["verdict"].replace(" ", "-")
        rows = "".join(f"<dt>{name}</dt><dd>{html.escape(self[key])}</dd>" for name, key in
                       (("Criterion", "criterion"), ("Paper", "paper"), ("Here", "ours")))
        box = (f'<div class="verdict {css}"><p class="verdict-title"><strong>{self["id"]}: {self["verdict"]}</strong> '
               f'{html.escape(self["claim"])}</p><dl>{rows}</dl></div>')
        return {"text/plain": f"{self['id']} {self['verdict']}: {self['ours']}", "text/html": box, VERDICT_MIME: dict(self)}


class Numbers(dict):
    """Numbers of a run that the prose quotes by name."""

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict:
        lines = [f"{name} = {value:.4g}" if isinstance(value, float) else f"{name} = {value}" for name, value in self.items()]
        return {"text/plain": "\n".join(lines), NUMBERS_MIME: dict(self)}


def judge(claim_id: str, **measured) -> Verdict:
    """The verdict on a claim: `held` if every part of its criterion is met, `not held` if none is, else `held in part`.

    Args:
        claim_id: a key of `CLAIMS`.
        **measured: what the claim's criterion asks for.

    Raises:
        ValueError: no such claim, or nothing was measured.
    """
    if claim_id not in CLAIMS:
        raise ValueError(f"claim_id is {claim_id!r}: it must be one of {', '.join(CLAIMS)}")
    claim = CLAIMS[claim_id]
    ours, parts = claim.judge(**measured)
    if not parts:
        raise ValueError(f"claim {claim_id} was given nothing to judge: {measured}")
    verdict = "held" if all(parts) else "held in part" if any(parts) else "not held"
    return Verdict(id=claim_id, claim=claim.claim, section=claim.section, criterion=claim.criterion, paper=claim.paper,
                   ours=ours, verdict=verdict)


def _headline(ratios: dict[str, dict[float, dict[int, float]]]):
    lines, parts = [], []
    for subject, by_l0 in ratios.items():
        for l0, by_seed in by_l0.items():
            if by_seed:
                mean, low, high = interval(list(by_seed.values()))
                lines.append(f"{subject} L0 {l0:g}: {mean:.2f} times [{low:.2f}, {high:.2f}]")
                parts.append(min(by_seed.values()) > 1)
    return "; ".join(lines), parts


def _gap_grows(ratios: dict[int, dict[int, float]]):
    least, most = min(ratios), max(ratios)
    shared = sorted(set(ratios[least]) & set(ratios[most]))
    growth = [ratios[most][seed] / ratios[least][seed] for seed in shared]
    mean, low, high = interval(growth)
    text = ", ".join(f"n = {n}: {interval(list(by_seed.values()))[0]:.2f}" for n, by_seed in sorted(ratios.items()))
    return f"ReLU's error over TopK's at L0 32, {text}; growth {mean:.2f} [{low:.2f}, {high:.2f}]", [low > 1]


def _equal_l0(topk_spread: float, relu_spread: float):
    return f"largest spread of L0 over seeds: TopK {topk_spread:.2%}, ReLU {relu_spread:.1%}", [topk_spread < 0.01, relu_spread > topk_spread]


def _l0_by_construction(largest_excess: float, shortfall: dict[str, float]):
    text = ", ".join(f"{name} {value:.2%}" for name, value in shortfall.items())
    return f"no token above k: {largest_excess <= 0}; L0 below k at initialisation by {text}", [largest_excess <= 0, max(shortfall.values()) < 0.01]


def _l0_emerges(n_runs: dict[str, int], spread: float):
    text = ", ".join(f"{name} {n}" for name, n in n_runs.items())
    return f"training runs to reach L0 32 within 5 %: {text}; TopK 1. One l1_coef gives L0s {spread:.1f}-fold apart over subjects and n", [
        min(n_runs.values()) > 1, spread > 2]


def _recovery(topk: list[float], relu: list[float], wide: list[float]):
    mean = lambda v: interval(v)[0]
    return (f"mean max cosine at the true L0: TopK {mean(topk):.3f}, ReLU {mean(relu):.3f}; TopK at 4 times the true L0 {mean(wide):.3f}",
            [min(topk) > 0.9, all(t > r for t, r in zip(topk, relu)), all(w < t for w, t in zip(wide, topk))])


CLAIMS = {
    "A2.4": Claim("TopK's L0 is k by construction, before any training", "§2.3",
                  "On every subject no token has more than k active latents, and at initialisation L0 is within 1 % of k for k up to 64",
                  "k is set directly", _l0_by_construction),
    "A2.5": Claim("ReLU's L0 emerges from training and has to be tuned for", "§2.3",
                  "Bisection on the L1 coefficient needs more than one run on every subject, and one coefficient gives L0s more than a factor 2 apart over subjects and n",
                  "tuning the L1 coefficient is called a cost of ReLU; no count is given", _l0_emerges),
    "A3.2": Claim("At equal L0 TopK reconstructs better than ReLU", "§3.1, Fig. 2a",
                  "On every subject and at every L0 compared, ReLU's normalized MSE is more than 1 times TopK's in every seed",
                  "TopK below ReLU at every L0 (read off Fig. 2a)", _headline),
    "A3.3": Claim("The gap between TopK and ReLU grows with the number of latents", "§3.1, Fig. 2b",
                  "At L0 32, the ratio of ReLU's error to TopK's at the largest n over that at the smallest n has a 95 % interval over seeds above 1",
                  "the gap widens with n (read off Fig. 2b)", _gap_grows),
    "A3.4": Claim("TopK runs are compared at exactly equal L0, ReLU runs are not", "§2.3",
                  "Over seeds, TopK's L0 at one k spreads by less than 1 % and ReLU's at one coefficient by more than TopK's",
                  "no figure given", _equal_l0),
    "C1": Claim("On a known dictionary TopK at the true L0 finds the features", "ours",
                "In every seed: mean max cosine above 0.9 at k = true L0; higher than ReLU's at the same L0; and lower at k = 4 times the true L0",
                "not in the paper", _recovery),
}
