"""What tools/run.py lets through to the terminal, and which outputs it keeps."""
import os
import shutil
import subprocess
import sys

import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

from tools import run
from tools.run import QUIET, quieten

WARNS_AS_TQDM_DOES = "import warnings; warnings.warn('IProgress not found. Please update jupyter and ipywidgets.')"
LOADS_A_MODEL = "from saelib import subjects; subjects.load('pygpt')"


def stderr_of(code, **environment):
    kept = {name: value for name, value in os.environ.items() if name not in QUIET}
    return subprocess.run([sys.executable, "-c", code], env=kept | environment, capture_output=True, text=True,
                          check=True).stderr


def test_other_libraries_write_nothing_over_the_progress_line():
    code = f"{WARNS_AS_TQDM_DOES}; {LOADS_A_MODEL}"
    noise = stderr_of(code)
    assert "IProgress" in noise and "Loading weights" in noise, "there is nothing to keep quiet any more"
    assert stderr_of(code, **QUIET) == ""


def test_what_the_reader_has_set_stays(monkeypatch):
    for name in QUIET:
        monkeypatch.setenv(name, "0")
    quieten()
    assert {os.environ[name] for name in QUIET} == {"0"}


@pytest.mark.parametrize("tags, text, kept", [([run.MEASURED], "the step: 9.25 ms", True),
                                              ([run.MEASURED], "the step: 9.25 ms\nanother: 3 ms", False),
                                              ([], "the step: 9.25 ms", False)])
def test_the_output_of_a_cell_that_measures_time_stays_until_it_says_something_else(tags, text, kept):
    committed, executed = (new_code_cell("pass", metadata={"tags": tags},
                                         outputs=[new_output("stream", name="stdout", text=t)])
                           for t in ("the step: -8.5 ms", text))
    assert run.stays(committed, executed) is kept


@pytest.mark.parametrize("seconds, said", [(9.6, "10 s"), (119.7, "2 min 0 s"), (185, "3 min 5 s")])
def test_a_duration_is_rounded_once(seconds, said):
    assert run.duration(seconds) == said


def test_a_run_is_kept_where_there_is_no_git(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    made = run.provenance("quick", {}, 1.0)
    assert (made["commit"], made["uncommitted_changes"]) == ("unknown", False)


def test_a_chapter_that_shows_committed_rows_is_of_those(monkeypatch, tmp_path):
    shutil.copytree(run.ROOT / "saelib", tmp_path / "saelib")
    monkeypatch.setattr(run, "ROOT", tmp_path)
    *show, other = (new_notebook(cells=[new_code_cell(source)])
                    for source in ("speed_rows.committed('steps')", "frontiers.by_length('pygpt', 32)", "1 + 1"))
    before = [run.code_hash(notebook) for notebook in (*show, other)]
    with open(tmp_path / "saelib" / "rows" / "speed.jsonl", "a") as rows:
        rows.write("{}\n")
    assert [run.code_hash(notebook) == old for notebook, old in zip((*show, other), before)] == [False, False, True]
