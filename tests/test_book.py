"""The local Sphinx extensions, on a small book of their own."""
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from tools import keep
from tools.check_site import Site
from tools.run import RECORD, code_hash

ROOT = Path(__file__).resolve().parents[1]

CONF = f"""\
import sys
sys.path.insert(0, {str(ROOT / "book/_ext")!r})
extensions = ["myst_nb", "executed", "scoreboard"]
myst_enable_extensions = ["colon_fence", "dollarmath"]
nb_execution_mode = "off"
suppress_warnings = ["mystnb.unknown_mime_type"]
exclude_patterns = ["_build", "runs"]
"""
FRONT_PAGE = """\
# Front

The gap is {number}`01_toy:gap:.1%`.

```{scoreboard}
```

```{toctree}
notebooks/01_toy
```
"""
VERDICT = {
    "id": "A3.2",
    "claim": "TopK is below ReLU",
    "section": "§5.2",
    "criterion": "in every seed",
    "paper": "15 %",
    "ours": "12 %",
    "verdict": "held in part",
}
RUN_ON = {
    "date": "2026-01-02",
    "seconds": 75,
    "hardware": "2 cores of a toy",
    "python": "3.11",
    "packages": {"torch": "2.13.0"},
    "commit": "abc1234",
    "uncommitted_changes": False,
}


def source_notebook():
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    cells = [
        new_markdown_cell("# Toy", id="title"),
        new_code_cell('profile = "quick"', id="parameters", metadata={"tags": ["parameters"]}),
        new_code_cell("show()", id="show"),
    ]
    return new_notebook(cells=cells, metadata=metadata)


def executed_notebook(gap=0.271, profile="laptop", **record):
    """The same notebook as papermill leaves it: a cell injected, outputs with records."""
    notebook = source_notebook()
    code = code_hash(notebook)
    data = {
        "text/plain": "plain form",
        "text/html": f'<div class="verdict">shown form, gap {gap}</div>',
        "application/vnd.saelib.numbers+json": {"gap": gap},
        "application/vnd.saelib.verdict+json": VERDICT,
    }
    notebook.cells[2].outputs = [new_output("display_data", data)]
    injected = new_code_cell(f'profile = "{profile}"', id="injected", metadata={"tags": ["injected-parameters"]})
    notebook.cells.insert(2, injected)
    parameters = {"profile": profile, "seed": "7"}
    notebook.metadata[RECORD] = {"profile": profile, "code": code, "parameters": parameters, **RUN_ON, **record}
    return notebook


class SmallBook:
    def __init__(self, folder):
        self.folder = folder
        self.source = folder / "notebooks" / "01_toy.ipynb"
        self.run = folder / "runs" / "laptop" / "01_toy.ipynb"
        self.source.parent.mkdir()
        self.run.parent.mkdir(parents=True)
        (folder / "conf.py").write_text(CONF)
        (folder / "index.md").write_text(FRONT_PAGE)
        nbformat.write(source_notebook(), self.source)
        nbformat.write(executed_notebook(), self.run)

    def build(self, profile="laptop"):
        """Build strictly, as `make book` does. Returns the warnings; empty when the build succeeded."""
        command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-n", "-q", "-b", "html", ".", "_build/html"]
        environment = {**os.environ, "BOOK_PROFILE": profile, "NO_COLOR": "1"}
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, check=False)
        assert bool(done.returncode) == ("WARNING" in done.stderr), done.stderr
        return done.stderr

    def page(self, name):
        return (self.folder / "_build/html" / f"{name}.html").read_text()


@pytest.fixture
def book(tmp_path):
    return SmallBook(tmp_path)


def test_a_page_shows_the_run_and_where_it_comes_from(book):
    assert book.build() == ""
    page = book.page("notebooks/01_toy")
    assert "shown form, gap 0.271" in page
    assert "plain form" not in page
    box = re.sub("<[^>]+>", "", re.search(r'class="provenance.*?</div>', page, re.DOTALL)[0])
    for fact in ("laptop", "seed = 7", "2026-01-02", "75 s", "2 cores of a toy", "torch 2.13.0", "abc1234"):
        assert fact in box
    assert page.index("<h1>") < page.index("provenance") < page.index("shown form")


def test_a_page_says_how_long_it_takes_and_offers_the_notebook(book):
    book.build()
    line = re.search(r'class="chapter-line.*?</div>', book.page("notebooks/01_toy"), re.DOTALL)[0]
    for fact in ("min to read", "01_toy.ipynb"):
        assert fact in line


def test_a_page_says_how_long_each_profile_takes_and_which_nobody_measured(book):
    notebook = source_notebook()
    notebook.cells[2].source = 'profiles.settings("frontier", profile)'
    nbformat.write(notebook, book.source)
    executed = executed_notebook()
    executed.cells[3].source = notebook.cells[2].source
    executed.metadata[RECORD]["code"] = code_hash(notebook)
    nbformat.write(executed, book.run)
    write_kept(book, "gpu", {"seconds": 130, "hardware": "one toy GPU"})
    write_kept(book, "laptop", {"seconds": 1, "hardware": "another machine"})  # the page's own run is what it shows
    assert book.build() == ""
    line = re.search(r'class="chapter-line.*?</div>', book.page("notebooks/01_toy"), re.DOTALL)[0]
    text = re.sub("<[^>]+>", "", line)
    assert ("Runs in 75 s at laptop on 2 cores of a toy; 2 min 10 s at gpu on one toy GPU. "
            "Not measured: quick, paper.") in text


def write_kept(book, profile, run):
    keep.kept_path(book.folder, profile).parent.mkdir(parents=True, exist_ok=True)
    keep.kept_path(book.folder, profile).write_text(json.dumps({"01_toy": run}))


def test_what_is_kept_of_a_run_is_its_record_its_numbers_and_its_frontiers(book):
    show_frontier(book, [ROW])
    write_kept(book, "laptop", {"seconds": 1})
    keep.keep(book.folder, "laptop")
    run = keep.kept(book.folder, "laptop")["01_toy"]
    assert (run["seconds"], run["hardware"], run["frontiers"]) == (75, "2 cores of a toy", {"fig-toy": [ROW]})
    assert run["numbers"] == {"gap": 0.271}
    book.run.unlink()
    keep.keep(book.folder, "laptop")
    assert keep.kept(book.folder, "laptop")["01_toy"] == run


@pytest.mark.parametrize(
    ("url", "places"),
    [
        ("https://github.com/someone/fork", {
            "https://colab.research.google.com/github/someone/fork/blob/main/notebooks/01_toy.ipynb",
            "https://mybinder.org/v2/gh/someone/fork/main?urlpath=lab/tree/notebooks/01_toy.ipynb",
            "https://github.com/someone/fork/edit/main/notebooks/01_toy.ipynb",
            "https://github.com/someone/fork/issues/new",
        }),
        ("", set()),
    ],
)
def test_the_buttons_lead_to_the_repository_or_are_not_there(book, url, places):
    theme = 'html_theme = "sphinx_book_theme"\nhtml_theme_options = {}\n'
    conf = CONF.replace('"executed"', '"executed", "repository"') + theme + f'book_repository = "{url}"\n'
    (book.folder / "conf.py").write_text(conf)
    assert book.build() == ""
    page = BeautifulSoup(book.page("notebooks/01_toy"), "html.parser")
    outside = page.select(".article-header-buttons a[href^='https:'], .header-article a[href^='https:']")
    links = {tag["href"].partition("?title")[0] for tag in outside}
    assert links - {url} == places


def test_the_injected_parameters_are_not_shown(book):
    book.build()
    assert "&quot;laptop&quot;" not in book.page("notebooks/01_toy")


def test_a_missing_run_fails_the_build(book):
    book.run.unlink()
    assert "never run at profile 'laptop'" in book.build()


def test_a_run_of_other_code_fails_the_build(book):
    executed = executed_notebook()
    executed.cells[3].source = "show_something_else()"
    nbformat.write(executed, book.run)
    assert "other code than the page's" in book.build()


def test_a_run_with_another_saelib_fails_the_build(book):
    nbformat.write(executed_notebook(code="0123456789abcdef"), book.run)
    assert "saelib has changed since the run shown" in book.build()


def test_quick_falls_back_on_the_committed_outputs(book):
    committed = executed_notebook(profile="quick")
    committed.cells.pop(2)
    committed.metadata[RECORD] = {"profile": "quick", "code": code_hash(committed)}
    nbformat.write(committed, book.source)
    assert book.build("quick") == ""
    assert "outputs committed with the notebook" in book.page("notebooks/01_toy")


def test_a_recorded_number_stands_in_prose_with_its_origin(book):
    book.build()
    number = '<span class="recorded-number" title="gap, from notebook 01_toy, profile laptop">27.1%</span>'
    assert number in book.page("index")


def test_a_number_of_a_kept_run_stands_in_prose_whatever_run_is_shown(book):
    write_kept(book, "gpu", {"date": "2026-02-03", "numbers": {"gap": 0.5}})
    (book.folder / "index.md").write_text(FRONT_PAGE.replace("01_toy:gap:.1%", "gpu/01_toy:gap:.1%"))
    assert book.build() == ""
    number = 'title="gap, from notebook 01_toy, profile gpu, run of 2026-02-03">50.0%</span>'
    assert number in book.page("index")


def test_pages_follow_a_new_run(book):
    book.build()
    nbformat.write(executed_notebook(gap=0.5), book.run)
    assert book.build() == ""
    assert "50.0%" in book.page("index")
    assert "gap 0.5" in book.page("notebooks/01_toy")


@pytest.mark.parametrize("name", ["01_toy:no_such", "09_none:gap", "01_toy:gap:nonsense", "gpu/01_toy:gap"])
def test_a_number_that_no_run_recorded_fails_the_build(book, name):
    (book.folder / "index.md").write_text(FRONT_PAGE.replace("01_toy:gap:.1%", name))
    assert f"number '{name}'" in book.build()


def test_the_scoreboard_lists_every_verdict_in_words_with_a_link(book):
    book.build()
    page = book.page("index")
    assert '<span class="verdict-badge held-in-part">◐ held in part</span>' in page
    assert re.search(r'<a class="reference internal" href="notebooks/01_toy.html#verdict-a3-2">A3.2</a>', page)


def test_the_scoreboard_is_data_at_the_sites_root(book):
    book.build()
    rows = json.loads((book.folder / "_build/html" / "scoreboard.json").read_text())
    assert rows == [{**VERDICT, "notebook": "01_toy", "profile": "laptop"}]


def test_a_verdict_outside_the_three_fails_the_build(book):
    executed = executed_notebook()
    executed.cells[3].outputs[0].data["application/vnd.saelib.verdict+json"] = {**VERDICT, "verdict": "perhaps"}
    nbformat.write(executed, book.run)
    assert "'perhaps' is no verdict" in book.build()


def test_no_line_breaks_between_a_letter_and_its_comma(book):
    (book.folder / "conf.py").write_text(CONF.replace('"scoreboard"]', '"scoreboard", "accessible"]'))
    (book.folder / "index.md").write_text(FRONT_PAGE + "\nThe largest $n$, then $k$ and more.\n")
    assert book.build() == ""
    page = book.page("index")
    assert '<span class="unbroken"><span class="math notranslate nohighlight">\\(n\\)</span>,</span>' in page
    assert page.count('class="unbroken"') == 1


def test_each_line_of_code_knows_its_indentation_and_is_copied_as_it_was(book):
    code = 'def twice(x):\n    """Two\n    of it."""\n\n    return 2 * x\n'
    (book.folder / "conf.py").write_text(CONF.replace('"scoreboard"]', '"scoreboard", "accessible"]'))
    (book.folder / "index.md").write_text(f"{FRONT_PAGE}\n```python\n{code}```\n")
    assert book.build() == ""
    block = BeautifulSoup(book.page("index"), "html.parser").find("div", class_="highlight").pre
    assert [line["style"] for line in block.find_all("span",
                                                     class_="line")] == [f"--indent: {n}ch" for n in (0, 4, 4, 0, 4)]
    assert block.get_text() == code


def test_the_rest_of_a_long_numbered_line_stays_right_of_its_number(book):
    (book.folder / "twice.py").write_text("def twice(x):\n    return 2 * x\n")
    (book.folder / "conf.py").write_text(CONF.replace('"scoreboard"]', '"scoreboard", "accessible"]'))
    (book.folder / "index.md").write_text(f"{FRONT_PAGE}\n```{{literalinclude}} twice.py\n:linenos:\n```\n")
    assert book.build() == ""
    block = BeautifulSoup(book.page("index"), "html.parser").find("div", class_="highlight").pre
    assert [line["style"] for line in block.find_all("span", class_="line")] == ["--indent: 3ch", "--indent: 7ch"]
    assert [space.text for space in block.find_all("span", class_="indent")] == ["    "]
    assert block.text == "1 def twice(x):\n2     return 2 * x\n" or block.text == "1def twice(x):\n2    return 2 * x\n"


def test_an_equation_of_a_docstring_is_set_off_and_its_sections_are_not(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "book/_ext")
    accessible = importlib.import_module("accessible")
    lines = ["What it is.", "", "z = max(0, p)", "L = |z|", "", "Args:", "    p: where a = b.", "", "More words."]
    accessible.set_equations(None, "function", "f", None, None, lines)
    assert lines == ["What it is.", "", ".. code-block:: text", "", "   z = max(0, p)", "   L = |z|", "", "Args:",
                     "    p: where a = b.", "", "More words."]


def test_the_scoreboard_goes_by_id_as_a_reader_counts(book):
    executed = executed_notebook()
    for name in ("S1", "A2.10", "A2.9"):
        data = {"text/plain": "a verdict", "application/vnd.saelib.verdict+json": {**VERDICT, "id": name}}
        executed.cells[3].outputs.append(new_output("display_data", data))
    nbformat.write(executed, book.run)
    assert book.build() == ""
    rows = json.loads((book.folder / "_build/html" / "scoreboard.json").read_text())
    assert [row["id"] for row in rows] == ["A2.9", "A2.10", "A3.2", "S1"]


ROW = {"subject": "toy", "method": "topk", "sparsity": 4, "n_latents": 8, "seed": 0, "n_tokens": 9, "l0": 4.0,
       "normalized_mse": 0.5, "device": "cpu"}


def show_frontier(book, rows, source="show()", **record):
    """The small book with a frontier in its notebook, asked for on its front page."""
    executed = executed_notebook(**record)
    executed.cells[3].source = source
    data = {"text/plain": "TopK, x 4: 0.5", "image/svg+xml": '<svg width="676.8pt" '
            'xmlns="http://www.w3.org/2000/svg"></svg>'}
    executed.cells[3].outputs.append(new_output("display_data",
                                                data | ({"application/vnd.saelib.rows+json": rows} if rows else {})))
    executed.cells[3].metadata["mystnb"] = {"figure": {"name": "fig-toy", "caption": "Toy."},
                                            "image": {"alt": "A toy frontier"}}
    nbformat.write(executed, book.run)
    (book.folder / "conf.py").write_text(CONF.replace('"scoreboard"]', '"scoreboard", "frontier"]'))
    (book.folder / "index.md").write_text(FRONT_PAGE + "\n```{frontier} 01_toy\n```\n")


def frontier_data(book):
    text = (book.folder / "_build/html/_static/frontier/01_toy.js").read_text()
    return json.loads(text.removeprefix("saelibFrontier(").removesuffix(");\n"))


def test_a_frontier_brings_its_picture_and_its_rows(book):
    show_frontier(book, [ROW])
    assert book.build() == ""
    assert 'src="_static/frontier/01_toy.svg" alt="A toy frontier" data-frontier="fig-toy"' in book.page("index")
    assert "frontier/01_toy.js" in book.page("index") and "frontier/01_toy.js" in book.page("notebooks/01_toy")
    data = frontier_data(book)
    assert data["profiles"]["laptop"]["figures"] == {"fig-toy": [ROW]}
    assert data["methods"]["topk"]["label"] == "TopK" and data["methods"]["topk"]["knob"] == "k"


def test_a_picture_links_to_itself_and_says_how_wide_it_was_drawn(book):
    show_frontier(book, [ROW])
    (book.folder / "conf.py").write_text(CONF.replace('"scoreboard"]', '"scoreboard", "frontier", "accessible"]'))
    assert book.build() == ""
    drawn = 'style="--drawn-width: 902px"><img'
    link = '<a class="image-reference wide full-width" href="_static/frontier/01_toy.svg"'
    assert f"{link} {drawn}" in book.page("index")
    assert re.search(rf'<a class="image-reference wide full-width" href="../_images/\w+.svg" {drawn}',
                     book.page("notebooks/01_toy"))


def test_a_frontier_has_the_rows_of_every_profile_that_was_run_or_kept(book):
    notebook = source_notebook()
    notebook.cells[2].source = 'profiles.settings("frontier", profile)'
    nbformat.write(notebook, book.source)
    show_frontier(book, [ROW], code=code_hash(notebook), source=notebook.cells[2].source)
    kept_row = ROW | {"method": "relu"}
    write_kept(book, "gpu", {"date": "2026-02-03", "seconds": 3, "hardware": "one toy GPU", "code": "0",
                             "frontiers": {"fig-toy": [kept_row]}})
    assert book.build() == ""
    data = frontier_data(book)
    assert list(data["profiles"]) == ["laptop", "gpu"] and list(data["methods"]) == ["relu", "topk"]
    assert data["profiles"]["gpu"] == {
        "about": "Run on 2026-02-03 on one toy GPU. The code has changed since.", "figures": {"fig-toy": [kept_row]}}
    assert data["profiles"]["laptop"]["about"] == "Run on 2026-01-02 on 2 cores of a toy."


def test_a_frontier_without_rows_fails_the_build(book):
    show_frontier(book, [])
    assert "shows no frontier with its rows" in book.build()


@pytest.mark.parametrize(
    ("html", "problem"),
    [
        ('<script src="https://elsewhere.example/a.js"></script>', "script from another host"),
        ('<a href="gone.html">x</a>', "no such file"),
        ('<a href="#gone">x</a>', "no such anchor"),
        ('<a href="/page.html">x</a>', "breaks in a sub-path"),
        ('<img src="a.svg" alt="a.svg">', "no alternative text"),
        ('<img src="a.svg" alt="../_images/3f2a7c.svg">', "no alternative text"),
        ('<img src="a.svg">', "no alternative text"),
        ("<p>as in ??</p>", "unresolved"),
        ('<a href="https://elsewhere.example/">x</a> <a href="#top">y</a> <code>??</code>', None),
    ],
)
def test_the_site_checker_finds_what_is_wrong(tmp_path, html, problem):
    (tmp_path / "index.html").write_text(f'<article id="top">{html}</article>')
    (tmp_path / "a.svg").write_text("<svg/>")
    problems = list(Site(tmp_path).problems())
    assert (problem in problems[0] and len(problems) == 1) if problem else problems == []


def test_works_of_one_author_and_year_are_told_apart_and_named_alike_in_text_and_list(monkeypatch):
    from pybtex.database import Entry, Person

    monkeypatch.syspath_prepend(ROOT / "book/_ext")
    authors = importlib.import_module("authors")

    def entry(year, *names):
        return Entry("article", {"year": year}, {"author": [Person(name) for name in names]})

    made = [entry("2024", "Gao, Leo", "{Dupr{\\'e} la Tour}, Tom", "Tillman, Henk"),
            entry("2013", "Makhzani, A", "Frey, B"),
            entry("2024", "Rajam, S", "Conmy, A", "Smith, L"), entry("2024", "Rajam, S", "Lieberum, T", "Nanda, N")]
    assert list(authors.Labels().format_labels(made)) == [
        "Gao et al. 2024", "Makhzani and Frey 2013", "Rajam et al. 2024a", "Rajam et al. 2024b"]
