"""book/equations.md and the docstrings say the same, both ways."""
import importlib
import inspect
import re
from pathlib import Path

import pytest

import saelib

PAGE = Path(__file__).parents[1] / "book" / "equations.md"
ROWS = [line for line in PAGE.read_text("utf8").splitlines() if line.startswith("| $")]
LINKS = [(paper.strip(), name) for row in ROWS for paper in [row.rsplit("|", 3)[-3]]
         for name in re.findall(r"`(saelib[\w.]+)`", row)]


def resolve(name):
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ImportError:
            continue
        for part in parts[cut:]:
            found = getattr(found, part)
        return found


@pytest.mark.parametrize("paper, name", LINKS, ids=[name for _, name in LINKS])
def test_each_equation_leads_to_code_that_names_it(paper, name):
    assert paper in re.search(r"Paper: (.*)", inspect.getdoc(resolve(name))).group(1)


def test_each_function_that_names_an_equation_is_in_the_table():
    linked = {resolve(name) for _, name in LINKS}
    names = "losses", "kernels", "relu_path", "methods", "sae", "loop", "train"
    for module in (getattr(saelib, name) for name in names):
        owners = [module, *(c for _, c in inspect.getmembers(module, inspect.isclass)
                            if c.__module__ == module.__name__)]
        for owner in owners:
            for name, thing in inspect.getmembers(owner, lambda t: inspect.isfunction(t) or inspect.isclass(t)):
                if thing.__module__ == module.__name__ and re.search(r"Paper: .*Eq\.",
                                                                     inspect.getdoc(thing)
                                                                     or "") and not name.startswith("_"):
                    assert thing in linked, f"{module.__name__}.{name} is not in the table"


def test_the_lines_that_are_equations_are_marked():
    marks = {mark for path in Path(saelib.__file__).parent.glob("*.py")
             for mark in re.findall(r"# (Eq\. \(\d\))$", path.read_text(), re.M)}
    assert marks == {f"Eq. ({number})" for row in ROWS for number in re.findall(r"Eq\. \((\d)\)", row)}
