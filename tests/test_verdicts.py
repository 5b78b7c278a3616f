import json
import re
from pathlib import Path

import pytest

from saelib import claims, verdicts


def test_a_verdict_is_held_held_in_part_or_not_held(monkeypatch):
    said = claims.Claim("c", "§0", "x", "p", lambda parts: ("measured", parts))
    monkeypatch.setitem(claims.CLAIMS, "T", said)
    assert [verdicts.judge("T", parts=p)["verdict"] for p in ([True, True], [True, False], [False])] == ["held", "held in part", "not held"]


def test_a_claim_that_is_unknown_or_was_given_nothing_is_refused():
    with pytest.raises(ValueError, match="claim_id is 'Z9': it must be one of"):
        verdicts.judge("Z9")
    with pytest.raises(ValueError, match="was given nothing to judge"):
        verdicts.judge("A3.2", ratios={})


def test_the_headline_fails_when_a_single_seed_fails():
    good, bad = {"s": {32: {0: 1.2, 1: 1.1}}}, {"s": {32: {0: 1.2, 1: 0.99}}}
    assert verdicts.judge("A3.2", ratios=good)["verdict"] == "held" and verdicts.judge("A3.2", ratios=bad)["verdict"] == "not held"


def test_a_gap_that_grows_within_the_noise_does_not_count():
    steady = {256: {0: 1.0, 1: 1.1, 2: 0.9}, 512: {0: 1.1, 1: 1.0, 2: 1.0}}
    growing = {256: {0: 1.0, 1: 1.1, 2: 0.9}, 512: {0: 1.5, 1: 1.63, 2: 1.36}}
    assert verdicts.judge("A3.3", ratios=steady)["verdict"] == "not held" and verdicts.judge("A3.3", ratios=growing)["verdict"] == "held"


def test_what_a_notebook_keeps_is_text_a_box_and_data():
    bundle = verdicts.judge("A3.4", topk_spread=0.0, relu_spread=0.1)._repr_mimebundle_()
    assert bundle["text/plain"].startswith("A3.4 held:") and 'class="verdict held"' in bundle["text/html"]
    assert set(json.loads(json.dumps(bundle[verdicts.VERDICT_MIME]))) == {"id", "claim", "section", "criterion", "paper", "ours", "verdict"}
    assert verdicts.Numbers(a=0.123456)._repr_mimebundle_()["text/plain"] == "a = 0.1235"


@pytest.mark.parametrize("claim", claims.CLAIMS.values(), ids=list(claims.CLAIMS))
def test_every_claim_says_its_words_section_criterion_and_the_papers_figure(claim):
    assert all(len(text) > 2 for text in (claim.claim, claim.section, claim.criterion, claim.paper))


def test_a_gpu_step_is_judged_at_every_size_against_the_loop_and_by_its_error():
    good = {(32768, 8192): (3.0, 9.0), (32768, 65536): (2.3, 7.0), (131072, 8192): (2.2, 7.0), (131072, 65536): (1.7, 6.0)}
    assert verdicts.judge("S9", steps=good, excess=0.01)["verdict"] == "held"
    for bad, excess in (({(131072, 8192): (2.21, 7.0)}, 0.0), ({(32768, 8192): (3.0, 8.9)}, 0.0), ({}, 0.011)):
        assert verdicts.judge("S9", steps=good | bad, excess=excess)["verdict"] == "held in part"
    assert verdicts.judge("S9", steps=dict(list(good.items())[1:]), excess=0.01)["verdict"] == "held in part"  # what was not measured has not held
    assert [verdicts.judge("S10", members=members, seconds=100)["verdict"] for members in (12, 11)] == ["held", "held in part"]


PART_A = [*(f"A1.{i}" for i in range(1, 8)), *(f"A2.{i}" for i in range(1, 7)), *(f"A3.{i}" for i in range(1, 5))]


def test_every_claim_is_judged_by_exactly_one_notebook_and_part_a_is_whole():
    judged = []
    for path in (Path(__file__).parents[1] / "notebooks").glob("*.ipynb"):
        code = "\n".join("".join(c["source"]) for c in json.loads(path.read_text("utf8"))["cells"] if c["cell_type"] == "code")
        judged += re.findall(r'verdicts\.judge\(\s*"([\w.]+)"', code)
    assert sorted(judged) == sorted(claims.CLAIMS) and set(PART_A) <= set(judged)
