"""The built site in a real browser. `make test` builds it first; the variable SITE names its folder."""
import os
import shutil
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

ROOT = Path(__file__).resolve().parents[1]
SITE = (ROOT / os.environ.get("SITE", "_build/html")).resolve()
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
THEMES = ("light", "dark")

if CHROMIUM is None:
    pytest.skip("no Chromium here: on Debian, apt-get install chromium", allow_module_level=True)
if not (SITE / "index.html").exists():
    pytest.skip(f"no site in {SITE}: run `make book`, or `make test`", allow_module_level=True)

PAGES = sorted(
    str(path.relative_to(SITE))
    for path in SITE.rglob("*.html")
    if "_static" not in path.parts and path.name not in ("index.html", "genindex.html", "py-modindex.html")
)
every_page = pytest.mark.parametrize("name", PAGES)


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def served(tmp_path):
    """The address of the site, served two folders below the root of a server on this machine."""
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "book").symlink_to(SITE)
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/some/book"
        server.shutdown()


@pytest.fixture(scope="module")
def axe():
    from axe_playwright_python.sync_playwright import Axe

    return Axe()


@pytest.fixture
def page(browser):
    """An empty page that notes what it asks for outside the site, and what goes wrong."""
    page = browser.new_page(viewport=WIDE)
    page.errors, page.outside = [], []
    page.on("console", lambda message: page.errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on("requestfailed", lambda request: page.errors.append(f"not loaded: {request.url}"))
    page.on("request", lambda request: page.outside.append(request.url) if is_outside(request.url) else None)
    yield page
    page.close()


def is_outside(url):
    return not url.startswith((SITE.as_uri(), "data:", "blob:", "about:"))


def open_page(page, name, theme="light", viewport=WIDE, root=SITE.as_uri()):
    page.set_viewport_size(viewport)
    page.add_init_script(f"localStorage.setItem('mode', '{theme}'); localStorage.setItem('theme', '{theme}')")
    page.goto(f"{root}/{name}")
    page.wait_for_load_state("load")


def test_the_first_page_opens_from_the_folder(page):
    open_page(page, "index.html")
    page.wait_for_selector("article h1")
    assert page.errors == []


@every_page
def test_a_page_loads_without_errors_or_outside_requests(page, name):
    open_page(page, name)
    page.wait_for_timeout(300)
    assert page.errors == []
    assert page.outside == []


@every_page
def test_maths_is_typeset(page, name):
    open_page(page, name)
    if page.locator(".math").count() == 0:
        pytest.skip("no maths on this page")
    page.wait_for_selector("mjx-container")
    page.wait_for_function("document.querySelectorAll('.math').length <= document.querySelectorAll('mjx-container').length")
    assert page.locator("mjx-merror").count() == 0


@every_page
def test_a_phone_scrolls_down_only(page, name):
    open_page(page, name, viewport=NARROW)
    page.wait_for_timeout(300)
    assert page.evaluate("document.documentElement.scrollWidth") <= NARROW["width"]


@every_page
@pytest.mark.parametrize("theme", THEMES)
def test_axe_finds_no_serious_violation(page, axe, name, theme):
    open_page(page, name, theme)
    assert page.get_attribute("html", "data-theme") == theme
    for viewport in (WIDE, NARROW):
        page.set_viewport_size(viewport)
        page.wait_for_timeout(200)  # what the new width moves has settled
        violations = axe.run(page).response["violations"]
        serious = [
            f"{violation['id']}: {node['html'][:200]}"
            for violation in violations
            if violation["impact"] in ("serious", "critical")
            for node in violation["nodes"]
        ]
        assert serious == [], f"at {viewport['width']} px"


def test_search_finds_a_word_of_the_book_opened_as_a_file(page):
    # no look at errors: from a file the browser refuses the results' excerpts, and the results stand without
    open_page(page, "search.html?q=AuxK")
    page.wait_for_selector("#search-results ul.search li a")


def test_the_site_works_below_a_servers_root(page, served):
    open_page(page, "search.html?q=AuxK", root=served)
    page.wait_for_selector("#search-results ul.search li a")
    page.wait_for_load_state("networkidle")
    page.locator("#search-results ul.search li a").first.click()
    page.wait_for_selector("article h1")
    assert page.errors == []


def test_the_keyboard_reaches_the_links_and_shows_where_it_is(page):
    open_page(page, PAGES[0])
    reached = []
    for _ in range(60):
        page.keyboard.press("Tab")
        focused = page.evaluate(
            """() => {
                const element = document.activeElement, style = getComputedStyle(element);
                const ring = style.outlineStyle !== 'none' || style.boxShadow !== 'none';
                return {tag: element.tagName, ring, html: element.outerHTML.slice(0, 120)};
            }"""
        )
        if focused["tag"] == "BODY":
            break
        reached.append(focused)
    assert "A" in {focused["tag"] for focused in reached}
    assert [focused["html"] for focused in reached if not focused["ring"]] == []
