"""The workflows on GitHub: actions pinned by commit, no right that a job does not need, and the README's own
commands."""
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PUBLISHING = {"pages": "write", "id-token": "write"}

every_workflow = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)


def jobs(path):
    return yaml.safe_load(path.read_text())["jobs"]


def steps(path):
    return [step for job in jobs(path).values() for step in job["steps"]]


@every_workflow
def test_actions_are_pinned_by_commit_and_name_their_version(path):
    pinned = re.findall(r"uses: \S+@[0-9a-f]{40}  # v[\d.]+\n", path.read_text())
    assert len(pinned) == sum("uses" in step for step in steps(path)) > 0


@every_workflow
def test_a_workflow_may_read_and_only_publishing_may_write(path):
    assert yaml.safe_load(path.read_text())["permissions"] == {"contents": "read"}
    for job in jobs(path).values():
        publishes = any("deploy-pages" in step.get("uses", "") for step in job["steps"])
        assert job.get("permissions", {}) == (PUBLISHING if publishes else {})
        assert "timeout-minutes" in job


@every_workflow
def test_no_checkout_leaves_its_credentials_behind(path):
    for step in steps(path):
        if "actions/checkout@" in step.get("uses", ""):
            assert step["with"]["persist-credentials"] is False


def test_they_run_the_commands_of_the_readme():
    run = [step["run"] for path in WORKFLOWS for step in steps(path)
           if "run" in step] + [(ROOT / ".ci" / "run").read_text()]
    made = set(re.findall(r"make (\w+)", "\n".join(line for text in run for line in text.splitlines()
                                                   if not line.startswith("#"))))
    told = set(re.findall(r"^make (\w+)", (ROOT / "README.md").read_text(), re.M))
    assert made == {"book", "test"} <= told
