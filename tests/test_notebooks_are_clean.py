"""nbval passes a cell that was never run, and compares only what it finds: refuse notebooks that evade it."""
from pathlib import Path

import nbformat
import pytest

from tools.run import RECORD, code_hash, parameters_of, run_record

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("[!.]*.ipynb"))
KEPT_CELL_METADATA = {"tags", "mystnb"}

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells_of(path):
    return [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]


@every_notebook
def test_outputs_are_those_of_one_run_from_top_to_bottom(path):
    counts = [cell.execution_count for cell in code_cells_of(path)]
    assert counts == list(range(1, len(counts) + 1)), "run `make notebooks`"


@every_notebook
def test_code_cells_are_short(path):
    assert all(len(cell.source.splitlines()) <= 12 for cell in code_cells_of(path))


@every_notebook
def test_outputs_are_of_todays_code(path):
    notebook = nbformat.read(path, 4)
    record = run_record(notebook)
    assert (record["profile"], record["code"]) == ("quick", code_hash(notebook)), "run `make notebooks`"
    assert set(record) == {"profile", "code", "python"} and record["python"].startswith("3.")


@every_notebook
def test_every_picture_and_every_html_has_text_that_nbval_compares(path):
    outputs = [output for cell in code_cells_of(path) for output in cell.outputs]
    assert outputs
    for output in outputs:
        assert output.output_type != "error"
        assert output.output_type == "stream" or output.data["text/plain"].strip()


@every_notebook
def test_no_output_is_progress(path):
    for cell in code_cells_of(path):
        assert not any(output.get("name") == "stderr" for output in cell.outputs)
        assert not any("widget" in mime for output in cell.outputs for mime in output.get("data", {}))


@every_notebook
def test_metadata_holds_nothing_that_changes_from_run_to_run(path):
    notebook = nbformat.read(path, 4)
    assert set(notebook.metadata) == {"kernelspec", "language_info", RECORD}
    assert notebook.metadata.language_info == {"name": "python"}
    for cell in notebook.cells:
        assert set(cell.metadata) <= KEPT_CELL_METADATA
        assert "injected-parameters" not in cell.metadata.get("tags", [])


@every_notebook
def test_parameters_can_be_set_by_papermill(path):
    assert len(parameters_of(path)) <= 8
