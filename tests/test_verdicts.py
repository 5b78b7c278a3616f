import json
import math
import re
from pathlib import Path

import pytest

from saelib import claims, verdicts


def test_a_verdict_is_held_held_in_part_or_not_held(monkeypatch):
    said = claims.Claim("c", "§0", "x", "p", lambda parts: ("measured", parts))
    monkeypatch.setitem(claims.CLAIMS, "T", said)
    assert [verdicts.judge("T", parts=p)["verdict"] for p in ([True, True], [True, False],
                                                              [False])] == ["held", "held in part", "not held"]


def test_a_claim_that_is_unknown_or_was_given_nothing_is_refused():
    with pytest.raises(ValueError, match="claim_id is 'Z9': it must be one of"):
        verdicts.judge("Z9")
    with pytest.raises(ValueError, match="was given nothing to judge"):
        verdicts.judge("A3.2", ratios={})


HELD, PARTLY, NOT = "held", "held in part", "not held"
GPU = {(32768, 8192): (3.0, 9.0), (32768, 65536): (2.3, 7.0), (131072, 8192): (2.2, 7.0), (131072, 65536): (1.7, 6.0)}
GAPS = {256: {0: 1.0, 1: 1.1, 2: 0.9}, 512: {0: 1.5, 1: 1.63, 2: 1.36}}
AT_BOUNDS = {  # what was measured just inside every bound of a claim, and the verdict on it with one thing changed
    "A1.1": (dict(d_model=10, l0={0: [8.0, 4.0], 1: [8.0, 4.9]}, mse={0: [0.1, 0.2], 1: [0.1, 0.2]},
                  pca={0: [0.05, 0.21], 1: [0.05, 0.21]}),
             {PARTLY: [dict(l0={0: [8.0, 4.0], 1: [4.9, 4.9]}), dict(mse={0: [0.1, 0.2], 1: [0.2, 0.2]}),
                       dict(l0={0: [8.0, 4.0], 1: [8.0, 5.0]}), dict(pca={0: [0.05, 0.21], 1: [0.05, 0.2]})]}),
    "A1.2": (dict(l1_deviation=9e-6, l2_deviation=9e-6, l2_fades=0.0099),
             {PARTLY: [dict(l1_deviation=1e-5), dict(l2_deviation=1e-5), dict(l2_fades=0.01)]}),
    "A1.3": (dict(in_1d={"L1": 1.0, "L2": 0.0}, more_active=[1.01, math.nan, 1.2], l1_zeros=[0.2, 0.4],
                  no_zeros=[0.1, 0.19], l2_zeros=[0.0, 0.0099]),
             {PARTLY: [dict(in_1d={"L1": 0.99, "L2": 0.0}), dict(in_1d={"L1": 1.0, "L2": 0.01}),
                       dict(more_active=[1.0, 1.2]), dict(more_active=[math.nan, 1.0]), dict(more_active=[math.nan]),
                       dict(no_zeros=[0.1, 0.2]), dict(l2_zeros=[0.0, 0.01])]}),
    "A1.4": (dict(different={"a": 0, "b": 0}, control=1, exact_zeros=0.11),
             {PARTLY: [dict(different={"a": 0, "b": 1}), dict(control=0), dict(exact_zeros=0.1)]}),
    "A1.5": (dict(in_1d={"L1": 1.0, "smooth 1": 0.0, "smooth 2": 0.0},
                  without_relu={"L1": 0.0011, "smooth 1": 0.0, "smooth 2": 0.0009}),
             {PARTLY: [dict(in_1d={"L1": 0.99, "smooth 1": 0.0, "smooth 2": 0.0}),
                       dict(in_1d={"L1": 1.0, "smooth 1": 0.0, "smooth 2": 0.01}),
                       dict(without_relu={"L1": 0.0011, "smooth 1": 0.0, "smooth 2": 0.001}),
                       dict(without_relu={"L1": 0.001, "smooth 1": 0.0, "smooth 2": 0.0})]}),
    "A1.6": (dict(norms=[2.01, 3.0], l1=[0.3, 0.49], l0=[1.01, 2.0], spread={"s": 1.51, "t": 2.0}),
             {PARTLY: [dict(norms=[2.0, 3.0]), dict(l1=[0.3, 0.5]), dict(l0=[1.0, 2.0]),
                       dict(spread={"s": 1.5, "t": 2.0})]}),
    "A1.7": (dict(shift={0.1: [1.0, 1.0], 0.2: [1.049, 0.951]}, large={0.1: [1.0, 1.0], 0.2: [1.099, 0.901]}),
             {PARTLY: [dict(shift={0.1: [1.0, 1.051], 0.2: [1.0, 1.0]}),
                       dict(shift={0.1: [1.0, 1.0], 0.2: [0.949, 1.0]}),
                       dict(large={0.1: [1.0, 1.101], 0.2: [1.0, 1.0]}),
                       dict(large={0.1: [1.0, 1.0], 0.2: [0.899, 1.0]})]}),
    "A2.1": (dict(terms=["squared_error"], same={"s": 1.0, "t": 1.0}, by_magnitude={"s": 0.51, "t": 0.9}),
             {PARTLY: [dict(terms=["squared_error", "auxk"]), dict(same={"s": 1.0, "t": 0.999}),
                       dict(by_magnitude={"s": 0.5, "t": 0.9})]}),
    "A2.2": (dict(mask=9e-13, differences=9e-7, straight_through=0.11,
                  errors={"topk": [0.1, 0.2], "topk_ste": [0.11, 0.21]}),
             {PARTLY: [dict(mask=1e-12), dict(differences=1e-6), dict(straight_through=0.1),
                       dict(errors={"topk": [0.1, 0.2], "topk_ste": [0.11, 0.2]})]}),
    "A2.3": (dict(kept={"topk": 0.91, "relu": 0.19}, changed=[(0.3, 0.29), (0.3, 0.1)]),
             {PARTLY: [dict(kept={"topk": 0.9, "relu": 0.19}), dict(kept={"topk": 0.91, "relu": 0.2}),
                       dict(changed=[(0.3, 0.3), (0.3, 0.1)])]}),
    "A2.4": (dict(largest_excess=0.0, shortfall={"s": 0.0, "t": 0.0099}),
             {PARTLY: [dict(largest_excess=1.0), dict(shortfall={"s": 0.0, "t": 0.01})]}),
    "A2.5": (dict(searches={"s": [9.0, 33.5], "t": [60.0, 30.5]}, target=32, spreads={0.1: 1.5, 0.2: 2.01}),
             {PARTLY: [dict(searches={"s": [33.5], "t": [60.0, 30.5]}), dict(spreads={0.1: 1.5, 0.2: 2.0}),
                       dict(searches={"s": [9.0, 33.7], "t": [60.0, 30.5]})]}),
    "A2.6": (dict(shift={"s": [0.019, -0.019], "t": [0.0]}),
             {PARTLY: [dict(shift={"s": [0.019, -0.02], "t": [0.0]}), dict(shift={"s": [0.02, 0.0], "t": [0.0]})],
              NOT: [dict(shift={"s": [0.0, -0.02]})]}),
    "A3.1": (dict(shift={"s": {"relu": [0.1, 0.08], "topk": [0.01, -0.019]}},
                  change={"s": {"relu": [0.2, 0.2], "topk": [0.1, 0.19]}}),
             {PARTLY: [dict(change={"s": {"relu": [0.2, 0.2], "topk": [0.1, 0.2]}}),
                       dict(shift={"s": {"relu": [0.1, 0.08], "topk": [0.01, -0.02]}}),
                       dict(shift={"s": {"relu": [0.1, 0.08], "topk": [0.025, 0.0]}})],
              NOT: [dict(shift={"s": {"relu": [0.1, 0.0], "topk": [0.0, 0.0]}},
                         change={"s": {"relu": [0.2, 0.2], "topk": [0.1, 0.2]}})]}),
    "A3.2": (dict(ratios={"s": {32.0: {0: 1.2, 1: 1.01}}, "t": {8.0: {0: 1.2}}}),
             {PARTLY: [dict(ratios={"s": {32.0: {0: 1.2, 1: 1.0}}, "t": {8.0: {0: 1.2}}}),
                       dict(ratios={"s": {32.0: {0: 1.2, 1: 1.1}, 64.0: {0: 1.0}}})],
              NOT: [dict(ratios={"s": {32.0: {0: 1.2, 1: 1.0}}})]}),
    # growth within the noise
    "A3.3": (dict(ratios=GAPS), {NOT: [dict(ratios=GAPS | {512: {0: 1.1, 1: 1.0, 2: 1.0}})]}),
    "A3.4": (dict(topk_spread=0.0099, relu_spread=0.01),
             {PARTLY: [dict(topk_spread=0.01, relu_spread=0.011), dict(relu_spread=0.0099)],
              NOT: [dict(topk_spread=0.01)]}),
    "A3.5": (dict(ratios={30: {0: 1.1, 1: 1.01}, 100: {0: 1.2, 1: 1.4}, 1000: {0: 1.1001, 1: 1.3}}),
             {PARTLY: [dict(ratios={30: {0: 1.1, 1: 1.0}, 100: {0: 1.2, 1: 1.4}, 1000: {0: 1.1001, 1: 1.3}}),
                       dict(ratios={100: {0: 1.2, 1: 1.4}, 1000: {0: 1.099, 1: 1.3}})],
              NOT: [dict(ratios={100: {0: 1.2}, 1000: {0: 0.99}}), dict(ratios={100: {0: 0.9}, 1000: {0: 0.95}}),
                    dict(ratios={100: {0: 1.0}, 1000: {0: 1.0}})]}),
    "M1": (dict(margin=0.011, pair="a, b", definitions="c, d"), {NOT: [dict(margin=0.01), dict(margin=0.0)]}),
    "Y1": (dict(errors=[0.3, 0.2, 0.19], changes=[0.0, -0.0099, 0.0099]),
           {PARTLY: [dict(errors=[0.3, 0.2, 0.2]), dict(changes=[0.0, 0.01]), dict(changes=[0.0, -0.01]),
                     dict(changes=[0.0, math.nan])]}),
    "S1": (dict(topk=1.5, auxk=2.0, fit=1.5), {PARTLY: [dict(topk=1.51), dict(auxk=2.01), dict(fit=1.51)]}),
    "S2": (dict(topk=1.0), {NOT: [dict(topk=1.01)]}),
    "S3": (dict(ours=1.0, others={"plain loop": 5.0, "sparsify": 2.8, "SAELens, dense": 8.0}),
           {PARTLY: [dict(others={"plain loop": 4.99, "sparsify": 2.8, "SAELens, dense": 8.0}),
                     dict(others={"plain loop": 5.0, "sparsify": 2.79, "SAELens, dense": 8.0}),
                     dict(others={"plain loop": 5.0, "sparsify": 2.8, "SAELens, dense": 7.99}),
                     dict(others={"plain loop": 5.0, "SAELens, dense": 8.0})],  # not measured
            NOT: [dict(ours=2.0)]}),
    "S4": (dict(by_precision={"bf16": 2.4, "fp32": 5.0}, others={"plain loop": 9.0, "sparsify": 2.5}),
           {PARTLY: [dict(by_precision={"bf16": 2.41, "fp32": 5.0}), dict(by_precision={"bf16": 2.4, "fp32": 5.01}),
                     dict(others={"plain loop": 9.0, "sparsify": 2.4})]}),
    "S5": (dict(ours={"fp32": 1.01, "bf16": 1.01}, plain=1.0),
           {PARTLY: [dict(ours={"fp32": 1.01, "bf16": 1.011})], NOT: [dict(plain=0.99)]}),
    "S6": (dict(ratios={"first": 1.29, "wide": 1.29}), {PARTLY: [dict(ratios={"first": 1.29, "wide": 1.3})],
                                                        NOT: [dict(ratios={"first": 1.3, "wide": 1.3})]}),
    "S7": (dict(step=100.0, parts={"slow": (30.0, 89.0), "quick": (20.0, 6.7), "small": (1.0, 4.9)}),
           {HELD: [dict(parts={"all": (50.0, 50.0)}), dict(parts={"all": (100.0, 100.0)})],
            PARTLY: [dict(parts={"all": (49.0, 49.0)}), dict(parts={"all": (101.0, 101.0)}),
                     dict(parts={"slow": (30.0, 91.0), "quick": (20.0, 6.7)}),
                     dict(parts={"slow": (30.0, 89.0), "quick": (20.0, 6.6)}),
                     dict(parts={"slow": (50.0, 89.0), "small": (1.0, 5.1)})]}),
    "S8": (dict(speeds={"s": 0.91, "t": 0.91}, loaders={"s": 0.049, "t": 0.049}),
           {PARTLY: [dict(speeds={"s": 0.91, "t": 0.9}), dict(loaders={"s": 0.049, "t": 0.05})]}),
    "S9": (dict(steps=GPU, excess=0.01),
           {PARTLY: [*(dict(steps=GPU | {size: (own + 0.01, 4 * own)}) for size, (own, _) in GPU.items()),
                     dict(steps=GPU | {(32768, 8192): (3.0, 8.9)}), dict(excess=0.011),
                     dict(steps=dict(list(GPU.items())[1:]))]}),  # what was not measured has not held
    "S10": (dict(members=12, seconds=179.0), {PARTLY: [dict(members=11), dict(seconds=180.0)],
                                              NOT: [dict(members=11, seconds=180.0)]}),
    "C1": (dict(topk=[0.91, 0.95], relu=[0.8, 0.949], wide=[0.8, 0.949]),
           {PARTLY: [dict(topk=[0.9, 0.95]), dict(relu=[0.8, 0.95]), dict(wide=[0.8, 0.95])]}),
}


@pytest.mark.parametrize("claim", AT_BOUNDS)
def test_a_claim_holds_up_to_every_bound_of_its_criterion_and_not_beyond_in_a_single_seed(claim):
    measured, changed = AT_BOUNDS[claim]
    assert verdicts.judge(claim, **measured)["verdict"] == HELD
    for verdict, changes in changed.items():
        for change in changes:
            assert verdicts.judge(claim, **measured | change)["verdict"] == verdict, change


def test_every_claim_is_tried_at_its_bounds():
    assert set(AT_BOUNDS) == set(claims.CLAIMS)


def test_a_part_is_said_to_take_what_was_measured_over_what_was_predicted():
    judged = verdicts.judge("S7", step=10.0, parts={"Adam": (5.0, 10.0)})
    assert judged["ours"].endswith("0.50 of the step; measured over predicted: Adam 2.0")


def test_what_a_notebook_keeps_is_text_a_box_and_data():
    bundle = verdicts.judge("A3.4", topk_spread=0.0, relu_spread=0.1)._repr_mimebundle_()
    assert bundle["text/plain"].startswith("A3.4 held:") and 'class="verdict held"' in bundle["text/html"]
    fields = {"id", "claim", "section", "criterion", "paper", "ours", "verdict"}
    assert set(json.loads(json.dumps(bundle[verdicts.VERDICT_MIME]))) == fields
    assert verdicts.Numbers(a=0.123456)._repr_mimebundle_()["text/plain"] == "a = 0.1235"


@pytest.mark.parametrize("claim", claims.CLAIMS.values(), ids=list(claims.CLAIMS))
def test_every_claim_says_its_words_section_criterion_and_the_papers_figure(claim):
    assert all(len(text) > 2 for text in (claim.claim, claim.section, claim.criterion, claim.paper))


PART_A = [*(f"A1.{i}" for i in range(1, 8)), *(f"A2.{i}" for i in range(1, 7)), *(f"A3.{i}" for i in range(1, 5))]


def test_every_claim_is_judged_by_exactly_one_notebook_and_part_a_is_whole():
    judged = []
    for path in (Path(__file__).parents[1] / "notebooks").glob("*.ipynb"):
        code = "\n".join("".join(c["source"]) for c in json.loads(path.read_text("utf8"))["cells"]
                         if c["cell_type"] == "code")
        judged += re.findall(r'verdicts\.judge\(\s*"([\w.]+)"', code)
    assert sorted(judged) == sorted(claims.CLAIMS) and set(PART_A) <= set(judged)
