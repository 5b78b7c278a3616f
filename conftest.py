"""nbval with a numeric tolerance: words and integers must match exactly, floats closely.

`pytest`                    floats agree to a relative 1e-3, or to one unit in their last printed place
a cell tagged `rtol-1e-1`   that cell's floats agree to 1e-1
`pytest --nbval-rtol 0`     everything agrees exactly

The committed outputs are of one Python, whose standard library the models read. On another the cells run, and what
comes out is not compared.
"""
import math
import os
import platform
import re
from pathlib import Path

import nbformat
import pytest
import torch
from jaxtyping import install_import_hook
from nbval.plugin import IPyNbCell, IPyNbFile

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any test imports Triton: it decides when it sees a kernel
install_import_hook("saelib", "tests.check")  # shapes and types are checked wherever the tests call saelib

NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d+\.\d*|\.\d+|\d+)(?:[eE][-+]?\d+)?(?![\w.])")
INTEGER = re.compile(r"[-+]?\d+")
HERE = ".".join(platform.python_version_tuple()[:2])

# Figures are checked by the numbers beside them, verdicts by their text; progress goes to stderr.
NOT_COMPARED = (
    "stderr",
    "image/svg+xml",
    "text/html",
    "application/vnd.saelib.verdict+json",
    "application/vnd.saelib.numbers+json",
    "application/vnd.saelib.rows+json",
)


def last_place(number):
    """One unit in the last printed place: 0.01 for '3.14', 0 for an integer."""
    if INTEGER.fullmatch(number):
        return 0.0
    mantissa, _, exponent = number.lower().partition("e")
    return 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))


def close(ours, theirs, rtol):
    if ours == theirs:
        return True
    if INTEGER.fullmatch(ours) and INTEGER.fullmatch(theirs):
        return False
    unit = max(last_place(ours), last_place(theirs))
    return math.isclose(float(ours), float(theirs), rel_tol=rtol, abs_tol=1.01 * unit)


class TolerantText(str):
    """Output text that equals another text with the same words and close numbers."""

    rtol = 1e-3

    def words_and_numbers(self):
        words = re.sub(r"[ \-]+", " ", NUMBER.sub("#", self))  # a changed width or sign moves the padding
        return words, NUMBER.findall(self)

    def moved_numbers(self, other):
        """The pairs of numbers that differ too much; None when the texts differ in more than numbers."""
        (words, numbers), (other_words, other_numbers) = self.words_and_numbers(), other.words_and_numbers()
        if words != other_words or len(numbers) != len(other_numbers):
            return None
        return [(a, b) for a, b in zip(numbers, other_numbers) if not close(a, b, self.rtol)]

    def __eq__(self, other):
        if str.__eq__(self, other):
            return True
        return isinstance(other, TolerantText) and self.rtol > 0 and self.moved_numbers(other) == []

    def __ne__(self, other):
        return not self == other

    __hash__ = str.__hash__


def pytest_addoption(parser):
    parser.addoption("--nbval-rtol", type=float, default=1e-3, help="tolerance of floats in notebooks (0: exact)")


exact_sanitize, exact_format = IPyNbCell.sanitize, IPyNbCell.format_output_compare


def tolerant_sanitize(cell, text):
    text = exact_sanitize(cell, text)
    if not isinstance(text, str):
        return text
    text = TolerantText(text)
    text.rtol = cell.config.getoption("--nbval-rtol")
    for tag in cell.cell.metadata.get("tags", []):
        if tag.startswith("rtol-") and text.rtol > 0:
            text.rtol = float(tag.removeprefix("rtol-"))
    return text


def format_moved_numbers(cell, key, left, right):
    both_text = isinstance(left, TolerantText) and isinstance(right, TolerantText)
    moved = left.moved_numbers(right) if both_text else None
    if not moved:
        return exact_format(cell, key, str(left), str(right))
    cell.comparison_traceback.append(f"numbers in {key} further apart than {left.rtol:g} (committed -> now):")
    for committed, now in moved:
        change = f"   ({float(now) / float(committed) - 1:+.2%})" if float(committed) else ""
        cell.comparison_traceback.append(f"    {committed} -> {now}{change}")


IPyNbCell.sanitize = tolerant_sanitize
IPyNbCell.format_output_compare = format_moved_numbers


def python_of(notebook):
    """The Python that made a notebook's committed outputs."""
    return notebook.metadata.get("saelib_run", {}).get("python", HERE)


@pytest.hookimpl
def pytest_collection_modifyitems(items):
    for cell in items:
        if isinstance(cell, IPyNbCell) and python_of(cell.parent.nb) != HERE:
            cell.options["check"] = False
    for notebook in {item.parent for item in items if isinstance(item.parent, IPyNbFile)}:
        notebook.skip_compare = (*notebook.skip_compare, *NOT_COMPARED)


def pytest_terminal_summary(terminalreporter):
    committed = Path(__file__).parent.glob("notebooks/[!.]*.ipynb")
    for other in {python_of(nbformat.read(path, 4)) for path in committed} - {HERE}:
        terminalreporter.line(f"outputs of notebooks were not compared: they are of Python {other}, this is {HERE}, "
                              "and its standard library is another text")
