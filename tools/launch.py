"""Put the launch cell on top of every notebook: without saelib, as on Colab, it installs it; elsewhere it does nothing.

    python tools/launch.py       after a change of the repository's address in pyproject.toml

`make notebooks` does the same, so that a new chapter needs no thought of it. The cell decides no number: it is left out
of the hash that says whether a notebook's outputs are of today's code.
"""
import tomllib
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
TAGS = ["launch", "remove-cell"]  # the second keeps it off the page
SOURCE = '''\
# Without saelib, as on Colab: install it. Where it is installed, this does nothing.
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("saelib") is None:
    print("installing saelib: a minute or two")
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "REQUIREMENT"], check=True)
    importlib.invalidate_caches()'''


def repository_url(pyproject=ROOT / "pyproject.toml"):
    """The address of the repository on the web, from pyproject.toml; None where none is set."""
    url = tomllib.loads(pyproject.read_text("utf8"))["project"].get("urls", {}).get("Repository")
    return url.rstrip("/").removesuffix(".git") if url else None


def launch_source(url):
    """The cell's code: it installs from the repository, or, as long as that has no address, from the clone around
    it."""
    return SOURCE.replace("REQUIREMENT", f"saelib[minilm] @ git+{url}" if url else "..[minilm]")


def is_launch(cell):
    return "launch" in cell.metadata.get("tags", [])


def put_launch_cell(notebook, url):
    """Make the launch cell the first code cell of a notebook, as if it had been run there; outputs stay."""
    found = [cell for cell in notebook.cells if is_launch(cell)]
    if not found:
        first = next(i for i, cell in enumerate(notebook.cells) if cell.cell_type == "code")
        for counted in [part for cell in notebook.cells for part in (cell, *cell.get("outputs", []))]:
            if counted.get("execution_count"):
                counted.execution_count += 1
        found = [nbformat.v4.new_code_cell(id="launch", execution_count=1, metadata={"tags": TAGS})]
        notebook.cells.insert(first, found[0])
    found[0].source = launch_source(url)


def main():
    for path in sorted(ROOT.glob("notebooks/[!.]*.ipynb")):
        notebook = nbformat.read(path, 4)
        put_launch_cell(notebook, repository_url())
        nbformat.write(notebook, path)


if __name__ == "__main__":
    main()
