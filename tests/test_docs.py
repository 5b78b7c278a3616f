"""What the README and the book tell people to paste, pasted."""
import json
import re
from pathlib import Path

import pytest
import torch

import saelib

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "book").glob("*.md")), *sorted((ROOT / "notebooks").glob("*.ipynb"))]


def text_of(page):
    if page.suffix == ".md":
        return page.read_text("utf8")
    return "\n".join("".join(cell["source"]) for cell in json.loads(page.read_text("utf8"))["cells"])


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", text_of(page), re.S)


def parameters(notebook):
    cells = json.loads((ROOT / notebook).read_text("utf8"))["cells"]
    source = "".join(next(c for c in cells if "parameters" in c["metadata"].get("tags", []))["source"])
    return set(re.findall(r"^(\w+) =", source, re.M))


def test_the_five_lines_of_the_readme_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = blocks(ROOT / "README.md", "python")[0].replace("300_000", "2_000").replace("1024", "64")
    assert "topk" in code and len([line for line in code.splitlines() if line.strip()]) == 5
    exec(code, {})
    assert "normalized_mse" in capsys.readouterr().out and (tmp_path / "my_sae" / "sae.safetensors").exists()


def test_the_five_lines_for_your_own_activations_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(torch.randn(300, 12), "activations.pt")
    exec(blocks(ROOT / "book" / "rerun.md", "python")[0].replace("4096", "64"), {})
    assert (tmp_path / "my_sae" / "sae.json").exists()
    block = torch.nn.Linear(12, 12)
    named = {"saelib": saelib, "x": torch.load("activations.pt"), "block": block}
    exec(blocks(ROOT / "book" / "rerun.md", "python")[1], named)
    assert named["latents"].shape == (300, 64)
    ids = torch.randn(2, 5, 12)
    # the hook is at work
    torch.testing.assert_close(block(ids), named["sae"](torch.nn.functional.linear(ids, block.weight, block.bias)))


def test_the_lines_for_many_runs_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = next(block for block in blocks(ROOT / "book" / "rerun.md", "python") if "RunConfig" in block)
    named = {}
    exec(code.replace('"pygpt"', '"synthetic"').replace("300_000", "2_000").replace("1024", "64"), named)
    assert len(named["rows"]) == 4
    assert named["sae"].method.sparsity == 32
    assert len(list((tmp_path / "runs" / "mine").iterdir())) == 4


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_papermill_line_names_a_notebook_and_parameters_that_it_has(page):
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            if "papermill" in line and (named := re.search(r"notebooks/\w+\.ipynb", line)):
                assert set(re.findall(r"-p (\w+)", line)) <= parameters(named.group())


@pytest.mark.parametrize("notebook", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem)
def test_the_changes_to_try_are_of_parameters_that_the_notebook_has(notebook):
    changes = re.findall(r"\| `-p (\w+)", text_of(notebook))
    assert len(changes) >= 3 and set(changes) <= parameters(notebook.relative_to(ROOT))
