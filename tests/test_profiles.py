import json
import math
from collections import defaultdict
from pathlib import Path

import pytest

from saelib import frontiers, profiles
from saelib.checks import check_number

LR_ROWS = Path(__file__).parents[1] / "book" / "results" / "lr.jsonl"
MIDDLE = {"synthetic": 8, "pygpt": 32, "minilm": 32}  # the L0 that learning rates are compared at


def test_an_override_replaces_a_value_and_none_keeps_it():
    kept, changed = (profiles.settings("frontier", "laptop", n_seeds=n) for n in (None, 7))
    assert kept.n_seeds == profiles.PROFILES["frontier"]["laptop"]["n_seeds"] != 7 and changed.n_seeds == 7
    assert vars(changed) == vars(kept) | {"n_seeds": 7}


def test_each_profile_keeps_the_rows_of_a_chapter_in_a_store_of_its_own_and_quick_keeps_none(monkeypatch, tmp_path):
    monkeypatch.setenv("SAELIB_RUNS", str(tmp_path))
    stores = {profile: profiles.settings("frontier", profile).store for profile in profiles.PROFILES["frontier"]}
    assert stores == {"quick": None} | {profile: tmp_path / profile / "frontier.jsonl"
                                        for profile in ("laptop", "gpu", "paper")}


def test_tuned_rates_are_for_the_laptop_and_elsewhere_all_methods_share_one():
    for (subject, method), lr in profiles.LRS.items():
        assert profiles.lr_of(subject, method, "laptop") == lr
        assert all(profiles.lr_of(subject, method, profile) == other for profile, other in profiles.OTHER_LR.items()
                   if profile != "laptop")
    assert profiles.lr_of("synthetic", "batchtopk", "laptop") == profiles.OTHER_LR["laptop"]


@pytest.mark.parametrize("subject, method", profiles.LRS)
def test_the_tuned_rate_has_the_least_error_at_the_middle_l0_of_the_search(subject, method):
    points = defaultdict(list)
    for row in map(json.loads, LR_ROWS.read_text("utf8").splitlines()):
        if (row["config"]["subject"], row["config"]["method"]) == (subject, method):
            points[row["config"]["lr"]].append((row["metrics"]["l0"], row["metrics"]["normalized_mse"]))
    scores = {lr: found[0][1] if method == "topk" else frontiers.at_l0(found, MIDDLE[subject])
              for lr, found in points.items()}
    reached = {lr: score for lr, score in scores.items() if not math.isnan(score)}
    assert profiles.LRS[subject, method] == min(reached, key=reached.get)


def test_there_is_no_chapter_of_no_seeds():
    with pytest.raises(ValueError, match="n_seeds is 0: it must be above 0"):
        profiles.settings("l1_zeros", "quick", n_seeds=0)


def test_one_is_a_number_of_seeds():
    assert profiles.settings("frontier", "laptop", n_seeds=1).n_seeds == 1


def test_rows_are_kept_in_the_clone_from_whatever_folder_a_notebook_runs(monkeypatch, tmp_path):
    monkeypatch.delenv("SAELIB_RUNS", raising=False)
    clone = Path(profiles.__file__).parents[1]
    monkeypatch.chdir(tmp_path)
    assert profiles.store_of("frontier", "laptop") == clone / "runs" / "laptop" / "frontier.jsonl"
    monkeypatch.setattr(profiles, "__file__", str(tmp_path / "site" / "saelib" / "profiles.py"))
    assert profiles.store_of("frontier", "laptop") == tmp_path / "runs" / "laptop" / "frontier.jsonl"


def test_the_ends_of_a_range_belong_to_it():
    for value in (0, 1):
        check_number("x", value, 0, 1)
    for value in (-1e-9, 1 + 1e-9, float("nan")):
        with pytest.raises(ValueError, match="x is .*: it must be a number from 0 to 1"):
            check_number("x", value, 0, 1)
