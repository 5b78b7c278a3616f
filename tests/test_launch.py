"""The launch cell, run as on Colab: by a Python that has no saelib, and whose pip only notes what it was asked for."""
import os
import subprocess
import sys
import venv
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from tools.launch import is_launch, launch_source, put_launch_cell, repository_url
from tools.run import code_hash

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("[!.]*.ipynb"))
URL = "https://github.com/someone/fork"
STUB_PIP = ("import os, sys; open(os.environ['ASKED'], 'a').write(' '.join(sys.argv[1:])); "
            "sys.exit(int(os.environ['PIP_EXIT']))")


def launch(python, folder, source, pip_exit=0, pip_folder=""):
    """Run the cell. Returns the finished process, and what pip was asked for."""
    asked = folder / "asked"
    environment = os.environ | {"ASKED": str(asked), "PIP_EXIT": str(pip_exit), "PYTHONPATH": str(pip_folder)}
    done = subprocess.run([str(python), "-c", source], cwd=folder, env=environment, capture_output=True, text=True,
                          check=False)
    return done, asked.read_text() if asked.exists() else ""


@pytest.fixture
def pip(tmp_path):
    """A folder whose `python -m pip` notes what it was asked for."""
    (tmp_path / "stub" / "pip").mkdir(parents=True)
    (tmp_path / "stub" / "pip" / "__main__.py").write_text(STUB_PIP)
    return tmp_path / "stub"


@pytest.fixture
def stranger(tmp_path):
    """A Python without saelib."""
    venv.create(tmp_path / "venv", symlinks=True)
    return tmp_path / "venv" / "bin" / "python"


def test_without_saelib_the_cell_installs_it_from_the_repository(stranger, pip, tmp_path):
    done, asked = launch(stranger, tmp_path, launch_source(URL), pip_folder=pip)
    assert done.returncode == 0, done.stderr
    assert asked == f"install -q saelib[minilm] @ git+{URL}"


def test_without_an_address_it_installs_from_the_clone_around_the_notebook(stranger, pip, tmp_path):
    assert launch(stranger, tmp_path, launch_source(None), pip_folder=pip)[1] == "install -q ..[minilm]"


def test_an_installation_that_fails_stops_the_notebook(stranger, pip, tmp_path):
    done, _ = launch(stranger, tmp_path, launch_source(URL), pip_exit=1, pip_folder=pip)
    assert done.returncode and "CalledProcessError" in done.stderr


def test_with_saelib_the_cell_says_and_does_nothing(pip, tmp_path):
    done, asked = launch(sys.executable, tmp_path, launch_source(URL), pip_folder=pip)
    assert (done.returncode, done.stdout, done.stderr, asked) == (0, "", "", "")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_notebook_begins_with_the_launch_cell_of_this_repository(path):
    first = next(cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code")
    assert is_launch(first) and first.source == launch_source(repository_url()), "run `python tools/launch.py`"


def test_the_launch_cell_comes_once_keeps_the_outputs_and_leaves_the_hash():
    shown = new_output("execute_result", {"text/plain": "1"}, execution_count=1)
    notebook = new_notebook(cells=[new_markdown_cell("# Toy"), new_code_cell("1", execution_count=1, outputs=[shown]),
                                   new_code_cell("2")])
    before = code_hash(notebook)
    for url in (None, URL, URL):
        put_launch_cell(notebook, url)
    assert [cell.get("execution_count") for cell in notebook.cells] == [None, 1, 2, None]
    assert notebook.cells[2].outputs == [shown] and shown.execution_count == 2
    assert notebook.cells[1].source == launch_source(URL) and code_hash(notebook) == before


@pytest.mark.parametrize(("urls", "found"), [
    ("", None),
    ('[project.urls]\nRepository = "https://github.com/someone/fork.git"\n', URL),
])
def test_the_address_is_read_from_pyproject_and_may_be_unset(tmp_path, urls, found):
    (tmp_path / "pyproject.toml").write_text(f'[project]\nname = "saelib"\n{urls}')
    assert repository_url(tmp_path / "pyproject.toml") == found
