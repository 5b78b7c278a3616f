"""The built site in a real browser. `make test` builds it first; the variable SITE names its folder."""
import json
import os
import re
import shutil
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

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

if CHROMIUM is None:
    pytest.skip("no Chromium here: on Debian, apt-get install chromium", allow_module_level=True)
if not (SITE / "index.html").exists():
    pytest.skip(f"no site in {SITE}: run `make book`, or `make test`", allow_module_level=True)

PAGES = sorted(
    str(path.relative_to(SITE))
    for path in SITE.rglob("*.html")
    if "_static" not in path.parts and path.name not in ("index.html", "genindex.html", "py-modindex.html")
)


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


def empty_page(browser):
    """A page that notes what it asks for outside the site, and what goes wrong."""
    page = browser.new_page(viewport=WIDE)
    page.errors, page.outside = [], []
    page.on("console", lambda message: page.errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on("requestfailed", lambda request: page.errors.append(f"not loaded: {request.url}"))
    page.on("request", lambda request: page.outside.append(request.url) if is_outside(request.url) else None)
    return page


@pytest.fixture
def page(browser):
    page = empty_page(browser)
    yield page
    page.close()


@pytest.fixture(scope="module", params=PAGES)
def opened(browser, request):
    """Each page of the book, opened once for all tests that only look at it."""
    page = empty_page(browser)
    open_page(page, request.param)
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


def test_a_page_loads_without_errors_or_outside_requests(opened):
    opened.wait_for_timeout(300)
    assert opened.errors == []
    assert opened.outside == []


def test_maths_is_typeset(opened):
    if opened.locator(".math").count() == 0:
        pytest.skip("no maths on this page")
    # a heading with maths stands in the contents too, which a narrow page hides
    opened.wait_for_selector("article mjx-container")
    opened.wait_for_function("document.querySelectorAll('.math').length <= "
                             "document.querySelectorAll('mjx-container').length")
    assert opened.locator("mjx-merror").count() == 0


def test_a_page_scrolls_down_only_on_a_phone_a_tablet_and_a_screen(opened):
    for width in (390, 820, 1100, 1280):
        opened.set_viewport_size({"width": width, "height": 844})
        opened.wait_for_timeout(300)
        assert opened.evaluate("document.documentElement.scrollWidth") <= width


def test_no_line_of_code_is_cut_off_on_a_phone(opened):
    opened.set_viewport_size(NARROW)
    cut = "pre => pre.scrollWidth > pre.clientWidth && !pre.closest('.output')"
    found = f"[...document.querySelectorAll('article pre')].filter({cut})"
    assert opened.evaluate(f"{found}.map(pre => pre.textContent)") == []


def test_formulas_and_single_figures_fit_on_a_phone(opened):
    opened.set_viewport_size(NARROW)
    opened.wait_for_timeout(300)
    several = "box => parseInt(box.style.getPropertyValue('--drawn-width')) > 500"  # panels side by side may scroll
    every = "[...document.querySelectorAll('mjx-container[display], a.image-reference')]"
    boxes = f"{every}.filter(box => !({several})(box))"
    cut = "box => box.scrollWidth > box.clientWidth + 1"
    assert opened.evaluate(f"{boxes}.filter({cut}).map(box => box.outerHTML)") == []


def test_a_dark_page_is_printed_in_light(page):
    open_page(page, "book/intro.html", theme="dark")
    theme = "document.documentElement.dataset.theme"
    assert page.evaluate(theme) == "dark"
    page.evaluate(f"window.addEventListener('beforeprint', () => {{ window.printed = {theme}; }})")
    page.pdf()
    assert page.evaluate("window.printed") == "light"
    assert page.evaluate(theme) == "dark"


def test_a_box_that_scrolls_sideways_on_a_phone_fades_where_there_is_more(opened):
    opened.set_viewport_size(NARROW)
    opened.wait_for_timeout(300)
    scrolls = ("box => box.scrollWidth > box.clientWidth + 1 && box.clientWidth && "
               "['auto', 'scroll'].includes(getComputedStyle(box).overflowX)")
    boxes = f"[...document.querySelectorAll('.bd-article *')].filter({scrolls})"
    without = f"{boxes}.filter(box => !box.matches('.more-right'))"
    assert opened.evaluate(f"{without}.map(box => box.outerHTML.slice(0, 200))") == []
    assert opened.evaluate(f"[...document.querySelectorAll('.more-left, .more-right')].filter(box => "
                           f"!({scrolls})(box)).length") == 0
    if opened.evaluate(f"{boxes}.length"):
        opened.evaluate(f"{boxes}.forEach(box => box.scrollLeft = 1e6)")
        opened.wait_for_timeout(100)
        assert opened.evaluate(f"{boxes}.filter(box => !box.matches('.more-left:not(.more-right)')).length") == 0
        opened.evaluate(f"{boxes}.forEach(box => box.scrollLeft = 0)")


def test_a_margin_note_touches_no_figure_and_no_other_note(opened):
    opened.set_viewport_size(WIDE)
    opened.wait_for_timeout(300)
    touching = opened.evaluate(
        """() => {
            const boxes = selector => [...document.querySelectorAll(selector)].map(e => e.getBoundingClientRect());
            const touch = (a, b) => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
            const notes = boxes('aside.margin'), wide = boxes('article img, article .full-width');
            return notes.filter((note, i) => [...notes.slice(i + 1), ...wide].some(other => touch(note, other))).length;
        }"""
    )
    assert touching == 0


# what is said of the rest takes a quarter of the time
ONLY_VIOLATIONS = {"resultTypes": ["violations"], "selectors": False}


def serious_violations(axe, page):
    """What axe finds at both widths."""
    found = []
    for viewport in (WIDE, NARROW):
        page.set_viewport_size(viewport)
        page.wait_for_timeout(500)  # what the new width moves has settled: the theme waits 300 ms
        violations = axe.run(page, options=ONLY_VIOLATIONS).response["violations"]
        serious = [violation for violation in violations if violation["impact"] in ("serious", "critical")]
        found += [f"{violation['id']} at {viewport['width']} px: {node['html'][:200]}" for violation in serious
                  for node in violation["nodes"]]
    return found


def test_axe_finds_no_serious_violation(opened, axe):
    assert opened.get_attribute("html", "data-theme") == "light"
    assert serious_violations(axe, opened) == []


@pytest.mark.parametrize("name", PAGES)
def test_axe_finds_no_serious_violation_in_the_dark(page, axe, name):
    open_page(page, name, "dark")
    assert page.get_attribute("html", "data-theme") == "dark"
    frames = page.eval_on_selector_all(".verdict", "all => all.map(one => "
                                       "getComputedStyle(one.closest('.text_html')).backgroundColor)")
    assert set(frames) <= {"rgba(0, 0, 0, 0)"}  # a light frame around a dark box is the brightest thing there
    assert serious_violations(axe, page) == []


def test_search_finds_a_word_of_the_book_opened_as_a_file(page):
    # no look at errors: from a file the browser refuses the results' excerpts, and the results stand without
    open_page(page, "search.html?q=AuxK")
    found = page.locator("#search-results ul.search li a[href*='book/notation.html']").first
    found.wait_for()  # results come one by one
    assert found.is_visible()  # the page whose recipe says what AuxK is


def test_the_site_works_below_a_servers_root(page, served):
    open_page(page, "search.html?q=AuxK", root=served)
    page.wait_for_selector("#search-results ul.search li a")
    page.wait_for_load_state("networkidle")
    quoted = page.locator("#search-results .context").all_inner_texts()
    assert any("AuxK" in text for text in quoted) and not any("\\(" in text or "Contents" in text for text in quoted)
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


# The latent explorer

needs_explorer = pytest.mark.skipif(not (SITE / "book" / "explorer.html").exists(), reason="this site has no explorer")


def open_explorer(page, address="", **options):
    open_page(page, f"book/explorer.html{address}", **options)
    page.wait_for_selector("#latent-explorer[data-ready]")
    return page.locator("#latent-explorer")


@needs_explorer
def test_the_explorer_opens_from_the_folder_with_a_latent_and_a_program(page):
    explorer = open_explorer(page)
    titles = [text.rstrip("#") for text in explorer.locator("h2").all_text_contents()]
    assert titles == ["Latents", "A program through both"]
    assert page.locator("#pst-page-toc-nav a").all_inner_texts()[:2] == titles
    assert explorer.locator(".contexts li").count() > 0
    assert explorer.locator(".program").count() == 2
    assert (page.errors, page.outside) == ([], [])


@needs_explorer
def test_the_explorer_finds_the_latents_that_fire_on_a_token(page):
    explorer = open_explorer(page)
    explorer.locator("#explorer-search").fill("def")
    assert "latents firing on “def”" in explorer.locator("[role=status]").first.text_content()
    assert 0 < explorer.locator(".list li").count() < 500
    explorer.locator("#explorer-search").press("Enter")
    page.wait_for_selector(".facts .tok:has-text('def')")


@needs_explorer
def test_a_link_to_a_latent_opens_it_and_its_twin_is_a_click_away(page):
    explorer = open_explorer(page, "#relu-3")
    assert explorer.locator("#explorer-latent").text_content() == "ReLU + L1, latent 3"
    explorer.locator(".card-box .note a").first.click()
    page.wait_for_function("document.getElementById('explorer-latent').textContent.startsWith('TopK')")
    assert page.evaluate("location.hash").startswith("#topk-")


@needs_explorer
def test_the_back_button_returns_to_the_latent_before(page):
    explorer = open_explorer(page)
    title = explorer.locator("#explorer-latent")
    first = title.text_content()
    explorer.get_by_role("button", name="Next").click()
    page.wait_for_function("first => document.getElementById('explorer-latent').textContent !== first", arg=first)
    page.go_back()
    page.wait_for_function("first => document.getElementById('explorer-latent').textContent === first", arg=first)
    assert title.text_content() == first and page.url.split("#")[0].endswith("explorer.html")


@needs_explorer
def test_the_explorer_goes_by_keyboard(page):
    explorer = open_explorer(page)
    explorer.locator(".list a[tabindex='0']").focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    wanted = page.evaluate("document.activeElement.getAttribute('href')")
    page.wait_for_function("hash => document.querySelector('[aria-current]')?.hash === hash", arg=wanted)
    explorer.locator(".program [data-at][tabindex='0']").first.focus()
    page.keyboard.press("ArrowRight")
    assert "number 2" in explorer.locator("h3", has_text="Token").text_content()


@needs_explorer
def test_relu_misses_more_scale_than_topk(page):
    explorer = open_explorer(page)
    factors = explorer.locator(".program .name strong:nth-of-type(2)").all_text_contents()
    topk, relu = (float(text.removeprefix("× ")) for text in factors)
    assert relu > topk


@needs_explorer
def test_without_javascript_the_explorer_says_what_it_would_show(browser):
    page = browser.new_page(java_script_enabled=False)
    page.goto(f"{SITE.as_uri()}/book/explorer.html")
    assert page.locator("noscript").count() or "draws its latents with JavaScript" in page.content()
    assert page.locator(".explorer-summary thead th").all_text_contents() == ["Autoencoder", "TopK", "ReLU + L1"]
    page.close()


# The interactive frontier

WITH_FRONTIER = [name for name in PAGES if "frontier.js" in (SITE / name).read_text("utf8")]


@pytest.mark.parametrize("name", WITH_FRONTIER)
def test_a_frontier_reads_its_runs_by_pointer_and_by_keyboard(page, name):
    open_page(page, name)
    live = page.locator(".frontier-live").first
    live.locator("select").first.select_option(index=0)
    point = live.locator(".point").first
    point.hover(force=True)
    assert "normalized MSE" in live.locator(".readout").text_content()
    point.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert live.locator("tr.chosen").count() == 1
    assert live.locator("details").get_attribute("open") is not None
    assert page.errors == []


@pytest.mark.parametrize("name", WITH_FRONTIER)
def test_the_numbers_at_a_frontiers_axes_keep_apart_on_a_phone(page, name):
    open_page(page, name, viewport=NARROW)
    page.wait_for_selector(".frontier-live svg text")
    boxes = page.evaluate("""[...document.querySelectorAll('.frontier-live svg text')]
        .filter((t) => /^[0-9.]+$/.test(t.textContent)).map((t) => t.getBoundingClientRect())
        .map((b) => [b.left, b.right, b.top, b.bottom])""")
    assert len(boxes) >= 4
    for i, (left, right, top, bottom) in enumerate(boxes):
        assert not any(left < b[1] and b[0] < right and top < b[3] and b[2] < bottom for b in boxes[i + 1:])


def with_profiles(page, *profiles):
    """Give each frontier of the next page the rows of these profiles: the site's own, with a third of the error at each
    next one."""
    def answer(route):
        text = Path(unquote(urlsplit(route.request.url).path)).read_text("utf8")
        data = json.loads(text.removeprefix("saelibFrontier(").removesuffix(");\n"))
        own = next(iter(data["profiles"].values()))["figures"]
        data["profiles"] = {
            profile: {"about": f"Run at {profile}.",
                      "figures": {name: [row | {"normalized_mse": row["normalized_mse"] / 3**i} for row in rows]
                                  for name, rows in own.items()}}
            for i, profile in enumerate(profiles)
        }
        route.fulfill(body=f"saelibFrontier({json.dumps(data)});", content_type="text/javascript")

    page.route("**/_static/frontier/*.js*", answer)


@pytest.mark.parametrize("name", WITH_FRONTIER[:1])
def test_a_frontier_switches_between_profiles_and_offers_no_choice_of_one(page, name):
    with_profiles(page, "quick", "laptop")
    open_page(page, name)
    live = page.locator(".frontier-live").first
    before = float(live.locator("tbody tr td:nth-child(5)").first.text_content())
    live.locator("select[name=profile]").focus()
    live.locator("select[name=profile]").select_option("laptop")
    assert float(live.locator("tbody tr td:nth-child(5)").first.text_content()) == pytest.approx(before / 3, abs=1e-4)
    assert re.fullmatch(r"Profile laptop: \d seeds?, [\d,]+ training tokens each\. Run at laptop\.",
                        live.locator(".origin").text_content())
    assert page.evaluate("document.activeElement.name") == "profile"
    page.unroute_all()
    with_profiles(page, "quick")
    page.reload()
    page.wait_for_selector(".frontier-live select[name=subject]")
    assert page.locator(".frontier-live select[name=profile]").count() == 0
    assert page.errors == []


@pytest.mark.parametrize("name", WITH_FRONTIER)
def test_a_frontier_is_a_static_picture_without_javascript_and_in_print(page, browser, name):
    plain = browser.new_page(java_script_enabled=False)
    plain.goto(f"{SITE.as_uri()}/{name}")
    assert plain.locator(".frontier-live").count() == 0
    plain.close()
    open_page(page, name)
    page.wait_for_selector(".frontier-live")
    page.emulate_media(media="print")
    assert not page.locator(".frontier-live").first.is_visible()
    assert page.locator("[data-frontier-hidden]").first.is_visible()


@pytest.mark.skipif(not WITH_FRONTIER, reason="this site has no frontier")
def test_the_first_screen_shows_the_headline_figure_and_the_verdicts(page):
    open_page(page, "book/intro.html", viewport={"width": 1280, "height": 800})
    for part in (".scoreboard-summary", ".frontier-live svg.chart"):
        box = page.locator(part).last.bounding_box()
        assert box["y"] > 0 and box["y"] + box["height"] < 800


def minutes_to_read(name):
    return int(re.search(r"(\d+) min to read", (SITE / "notebooks" / f"{name}.html").read_text("utf8"))[1])


@pytest.mark.skipif(not (SITE / "notebooks").exists(), reason="this site has no chapters")
def test_the_route_of_an_hour_takes_about_an_hour_and_all_chapters_about_two_and_a_half():
    route = next(line for line in re.split(r"\n- ", (ROOT / "book" / "intro.md").read_text("utf8"))
                 if "**An hour.**" in line)
    named = re.findall(r"notebooks/(\w+)\.ipynb", route)
    assert 50 <= sum(map(minutes_to_read, named)) <= 65
    assert 130 <= sum(minutes_to_read(path.stem) for path in (SITE / "notebooks").glob("*.html")) <= 150


# The scoreboard's filter

WITH_SCOREBOARD = [name for name in PAGES if 'class="scoreboard' in (SITE / name).read_text("utf8")]


@pytest.mark.parametrize("name", WITH_SCOREBOARD)
def test_the_scoreboard_can_be_filtered_by_words(page, name):
    open_page(page, name)
    rows = page.locator("table.scoreboard tbody tr")
    n_rows = rows.count()
    page.locator(".scoreboard-filter input[type=search]").first.fill("no such words anywhere")
    assert rows.locator("visible=true").count() == 0
    page.locator(".scoreboard-filter input[type=search]").first.fill("")
    counts = page.locator(".scoreboard-filter label:has(input[type=radio])").all_text_contents()[1:]
    shown = sum(int(text.split("(")[1].rstrip(")")) for text in counts)
    assert shown == n_rows == rows.locator("visible=true").count()


@pytest.mark.parametrize("name", WITH_SCOREBOARD)
def test_on_a_phone_each_claim_is_a_card_that_can_be_hidden(page, name):
    open_page(page, name, viewport=NARROW)
    cards = page.locator("table.scoreboard tbody tr")
    boxes = [cell.bounding_box() for cell in cards.first.locator("th, td").all()]
    assert max(box["x"] + box["width"] for box in boxes) <= NARROW["width"]
    page.locator(".scoreboard-filter input[value=not-held]").check(force=True)
    assert cards.locator("visible=true").count() == cards.filter(has=page.locator(".verdict-badge.not-held")).count()
