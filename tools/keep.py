"""Keep of the runs in runs/ what the site shows of runs that it was not built from: how long each took, its frontiers,
and the numbers that prose quotes of it.

    python tools/keep.py [PROFILE ...]      every profile that has runs, if none is named

book/results/PROFILE.json holds for each notebook the record of its run, its numbers, and the rows of its frontier
figures. A notebook without a run in runs/PROFILE keeps what the file had.
"""
import json
import re
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from saelib.files import write_whole  # noqa: E402
from saelib.verdicts import NUMBERS_MIME  # noqa: E402
from tools.run import code_cells, run_record  # noqa: E402

ROWS_MIME = "application/vnd.saelib.rows+json"
KEPT = ("date", "seconds", "hardware", "commit", "code")
SETTINGS = re.compile(r'profiles\.settings\("(\w+)"')


def rows_of(notebook):
    """The rows behind a notebook's frontier figures, by the figure's name."""
    return {
        cell.metadata.get("mystnb", {}).get("figure", {}).get("name", ""): output["data"][ROWS_MIME]
        for cell in notebook.cells for output in cell.get("outputs", []) if ROWS_MIME in output.get("data", {})
    }


def records(notebook, mime):
    """All records of one kind in a notebook's outputs, in order."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if mime in output.get("data", {}):
                yield output["data"][mime]


def numbers_of(notebook):
    """The numbers that a notebook recorded for prose, by name."""
    return {name: value for record in records(notebook, NUMBERS_MIME) for name, value in record.items()}


def run_of(path):
    """What is kept of one executed notebook."""
    notebook = nbformat.read(path, 4)
    record = run_record(notebook)
    return {name: record[name] for name in KEPT if name in record} | {"numbers": numbers_of(notebook),
                                                                      "frontiers": rows_of(notebook)}


def kept_path(root, profile):
    return Path(root, "book", "results", f"{profile}.json")


def kept(root, profile):
    """Notebook -> what is kept of its run at a profile."""
    path = kept_path(root, profile)
    return json.loads(path.read_text("utf8")) if path.exists() else {}


def profiles_of(notebook):
    """The profiles that a notebook's settings exist for."""
    from saelib.profiles import PROFILES

    chapters = SETTINGS.findall("\n".join(cell.source for cell in code_cells(notebook)))
    return list(dict.fromkeys(profile for chapter in chapters for profile in PROFILES[chapter]))


def keep(root, profile):
    """Write book/results/PROFILE.json; a row of a frontier on a line, so that a change can be read."""
    done = {path.stem: run_of(path) for path in Path(root, "runs", profile).glob("[!.]*.ipynb")}
    everything = dict(sorted((kept(root, profile) | done).items()))
    text = re.sub(r"\n {5,}|\n {4}(?=\})", " ", json.dumps(everything, indent=1, ensure_ascii=False))
    write_whole({kept_path(root, profile): lambda partial: partial.write_text(text + "\n", encoding="utf8")})
    print(f"{len(done)} runs at {profile} kept in {kept_path(root, profile)}")


if __name__ == "__main__":
    there = sorted({path.parent.name for path in ROOT.glob("runs/*/[!.]*.ipynb")})
    for name in sys.argv[1:] or there:
        if name not in there:
            raise SystemExit(f"no runs in runs/{name}")
        keep(ROOT, name)
