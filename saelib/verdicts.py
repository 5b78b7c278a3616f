"""Claims, the criterion that each must meet, and the verdict on what was measured.

The claims stand in `saelib.claims` and their criteria in `saelib.criteria`, away from the notebooks; both were
written before the runs. A claim that fails is reported as failed.
"""
import html
from collections import UserDict

from saelib.checks import require
from saelib.claims import CLAIMS

VERDICT_MIME, NUMBERS_MIME = "application/vnd.saelib.verdict+json", "application/vnd.saelib.numbers+json"


def anchor(claim_id: str) -> str:
    """Where a page has the verdict on a claim."""
    return f"verdict-{claim_id.lower().replace('.', '-')}"


class Verdict(UserDict):
    """What the scoreboard holds of one claim. A notebook shows it as a box and keeps it as data."""

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict:
        css = self["verdict"].replace(" ", "-")
        rows = "".join(f"<dt>{name}</dt><dd>{html.escape(self[key])}</dd>" for name, key in
                       (("Criterion", "criterion"), ("Paper", "paper"), ("Here", "ours")))
        box = (f'<div class="verdict {css}" id="{anchor(self["id"])}"><p class="verdict-title"><strong>{self["id"]}: '
               f'{self["verdict"]}.</strong> '
               f'{html.escape(self["claim"])}</p><dl>{rows}</dl></div>')
        return {"text/plain": f"{self['id']} {self['verdict']}: {self['ours']}", "text/html": box,
                VERDICT_MIME: dict(self)}


class Numbers(UserDict):
    """Numbers of a run that the prose quotes by name."""

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict:
        lines = [f"{name} = {value:.4g}" if isinstance(value, float) else f"{name} = {value}"
                 for name, value in self.items()]
        return {"text/plain": "\n".join(lines), NUMBERS_MIME: dict(self)}


def judge(claim_id: str, **measured) -> Verdict:
    """The verdict on a claim: `held` if every part of its criterion is met, `not held` if none is, else `held in part`.

    Args:
        claim_id: a key of `CLAIMS`.
        **measured: what the claim's criterion asks for.

    Raises:
        ValueError: no such claim, or nothing was measured.
    """
    require(claim_id in CLAIMS, "claim_id", claim_id, f"one of {', '.join(CLAIMS)}")
    claim = CLAIMS[claim_id]
    ours, parts = claim.judge(**measured)
    if not parts:
        raise ValueError(f"claim {claim_id} was given nothing to judge: {measured}")
    verdict = "held" if all(parts) else "held in part" if any(parts) else "not held"
    return Verdict(id=claim_id, claim=claim.claim, section=claim.section, criterion=claim.criterion, paper=claim.paper,
                   ours=ours, verdict=verdict)
