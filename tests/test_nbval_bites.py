"""The comparison of notebooks with their committed outputs fails when it should, and only then."""
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]

USES_SAELIB = """\
import torch

import saelib

x = torch.randn(4096, 16, generator=torch.Generator().manual_seed(0))
fit = saelib.fit(x, "topk", 4, n_latents=64, n_tokens=4096, batch_size=256, progress=False)
metrics = saelib.evaluate(fit.sae, x)
print(f"normalized MSE {metrics['normalized_mse']:.6f}")
latents = fit.sae.encode(x)
print(f"size of the reconstruction {float(fit.sae.decode(latents).norm()):.4f}")
"""

SCALE_DECODER = """

_fit = fit


def fit(*args, **kwargs):
    result = _fit(*args, **kwargs)
    result.sae.W_dec.data *= 1.02
    return result
"""


def write_notebook(folder, *sources):
    """A notebook with its outputs, as if committed."""
    from nbclient import NotebookClient

    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute()
    nbformat.write(notebook, folder / "tried.ipynb")
    shutil.copy(ROOT / "conftest.py", folder)
    return notebook


def nbval(folder, *options):
    """Run nbval on the folder's notebook as `make test` does, in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    command = [sys.executable, "-m", "pytest", "--nbval", "--nbval-current-env", "-p", "no:cacheprovider"]
    command += [*options, "--rootdir", str(folder), "tried.ipynb"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def alter(folder, old, new):
    notebook = nbformat.read(folder / "tried.ipynb", 4)
    output = notebook.cells[0].outputs[0]
    assert old in output.text
    output.text = output.text.replace(old, new)
    nbformat.write(notebook, folder / "tried.ipynb")


@pytest.mark.parametrize(
    ("committed", "passes"),
    [
        ("error 0.36287 at k = 32", True),
        ("error 0.36290 at k = 32", True),
        ("error 0.36650 at k = 32", False),  # 1 % more
        ("error 0.36287 at k = 33", False),
        ("mistake 0.36287 at k = 32", False),
    ],
)
def test_only_a_float_within_the_tolerance_may_differ(tmp_path, committed, passes):
    write_notebook(tmp_path, "print('error 0.36287 at k = 32')")
    alter(tmp_path, "error 0.36287 at k = 32", committed)
    done = nbval(tmp_path)
    assert done.returncode == (0 if passes else 1), done.stdout
    if "0.36650" in committed:
        assert re.search(r"0\.36650 -> 0\.36287 +\(-0\.99%\)", done.stdout)


def test_tolerance_zero_compares_exactly(tmp_path):
    write_notebook(tmp_path, "print('error 0.36287')")
    alter(tmp_path, "0.36287", "0.36290")
    assert nbval(tmp_path).returncode == 0
    assert nbval(tmp_path, "--nbval-rtol", "0").returncode == 1


def test_a_decoder_scaled_by_two_percent_fails(tmp_path):
    write_notebook(tmp_path, USES_SAELIB)
    assert nbval(tmp_path).returncode == 0
    mutant = tmp_path / "saelib"  # beside the notebook, so imported in place of the real one
    shutil.copytree(ROOT / "saelib", mutant)
    with (mutant / "__init__.py").open("a") as module:
        module.write(SCALE_DECODER)
    done = nbval(tmp_path)
    assert done.returncode == 1, done.stdout
    assert "numbers in stdout further apart than 0.001" in done.stdout


def test_outputs_of_another_python_are_not_compared_but_every_cell_must_run(tmp_path):
    notebook = write_notebook(tmp_path, "print('error 0.36287')")
    alter(tmp_path, "0.36287", "0.5")
    assert nbval(tmp_path).returncode == 1
    notebook.metadata["saelib_run"] = {"python": "3.0"}
    nbformat.write(notebook, tmp_path / "tried.ipynb")
    alter(tmp_path, "0.36287", "0.5")
    assert nbval(tmp_path).returncode == 0
    notebook.cells[0].source = "print(no_such_name)"
    nbformat.write(notebook, tmp_path / "tried.ipynb")
    assert nbval(tmp_path).returncode == 1
