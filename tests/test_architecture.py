"""What the design fixes about the shape of saelib, read from its source."""
import ast
from pathlib import Path

import pytest

SAELIB = Path(__file__).parents[1] / "saelib"
ORDER = ["checks", "normalisation", "files", "modes", "cache", "checkpoints", "losses", "triton_adam", "triton_kernels",
         "triton_select", "selection", "products", "pairs", "kernels", "native", "relu_path", "methods", "variants",
         "sae", "metrics", "auxk", "graphs", "loop", "train", "sources", "texts", "subjects", "auto", "origin", "runs",
         "formats", "sweeps", "refine", "frontiers", "profiles", "contestants", "peers", "timing", "parts",
         "speed_rows", "data_bench", "bench", "marks", "plots", "speed_plots", "criteria", "speed_criteria", "claims",
         "verdicts", "definitions"]
MODULES = sorted(p for p in SAELIB.glob("*.py") if p.name != "__init__.py")


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" if node.module == "saelib" else node.module
                        for alias in node.names)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_imports_go_one_way(path):
    assert path.stem in ORDER, f"say where {path.stem} stands in the order of imports"
    own = {name.split(".")[1] for name in imports(path) if name.startswith("saelib.")}
    assert all(ORDER.index(name) < ORDER.index(path.stem) for name in own)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_modules_and_functions_stay_small(path):
    source = path.read_text()
    assert len(source.splitlines()) <= 250
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            assert not body or node.end_lineno - body[0].lineno < 40, f"{node.name} has more than 40 lines"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_no_printing_no_trackers_no_global_seed(path):
    source = path.read_text()
    assert "torch.manual_seed(" not in source
    calls = {n.func.id for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    assert "print" not in calls and not {"wandb", "pandas", "IPython"} & {name.split(".")[0] for name in imports(path)}


def test_the_hash_of_the_code_covers_every_module_that_decides_numbers():
    from saelib import origin
    assert set(origin.DECIDING) == set(ORDER[: ORDER.index("runs") + 1])


def test_the_key_of_cached_activations_covers_every_module_that_makes_them():
    from saelib import subjects
    makers = {Path(module.__file__) for module in (subjects, *subjects.MAKERS)}
    own = {name.split(".")[1] for path in makers for name in imports(path) if name.startswith("saelib.")}
    # these refuse, write, and name the type
    assert own - {path.stem for path in makers} == {"checks", "files", "products"}
