"""The page in headless Chromium with the network off: no error, every figure there, keyboard, themes, widths, print."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.reported import Reported

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine"),
    pytest.mark.filterwarnings("default"),  # of playwright's own event loop
]
READY = "#viewer[data-ready=yes]"
SLOW = 120_000  # ms: WebGL is computed on the processor


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield opened
        opened.close()


class Shown:
    """A page that is open, and everything that went wrong in it."""

    def __init__(self, browser: Any, path: Path, width: int = 1280, scheme: str = "light") -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.context.set_offline(True)
        self.page = self.context.new_page()
        self.errors: list[str] = []
        self.page.on("console", lambda one: self.errors.append(one.text) if one.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("requestfailed", lambda request: self.errors.append(request.url[:200]))
        self.page.goto(path.as_uri())

    def __enter__(self) -> "Shown":
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()

    def ask(self, script: str) -> Any:
        return self.page.evaluate(script)

    def pixels(self) -> bytes:
        return bytes(self.page.locator("#cortex").screenshot())


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (400, "dark")])
def test_it_opens_without_a_network_and_every_figure_is_there(reported: Reported, browser, width, scheme):
    with Shown(browser, reported.work / "report.html", width, scheme) as shown:
        shown.page.wait_for_selector(READY, timeout=SLOW)
        assert shown.ask("document.documentElement.scrollWidth <= innerWidth")
        shown.ask("for (const one of document.querySelectorAll('details')) one.open = true")
        assert shown.ask("document.documentElement.scrollWidth <= innerWidth")
        sizes = shown.ask(
            "[...document.querySelectorAll('figure img, figure svg, figure canvas, .pictures img')].map("
            "one => { const box = one.getBoundingClientRect(); return [one.tagName, box.width, box.height,"
            " one.tagName != 'IMG' || one.naturalWidth > 0]; })"
        )
        assert len(sizes) > 10 and all(w > 40 and h > 40 and whole for _, w, h, whole in sizes)
        ground, ink = shown.ask(
            "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
        )
        dark, light = (sum(map(int, colour[4:-1].split(", "))) for colour in (ground, ink))
        assert (dark < 150 < 600 < light) if scheme == "dark" else (light < 150 < 600 < dark)
        letters = shown.ask("getComputedStyle(document.querySelector('.chart svg text')).fill")
        assert letters == ink
        assert shown.errors == []


def test_the_selector_changes_the_map_and_the_keyboard_turns_it(reported: Reported, browser):
    with Shown(browser, reported.work / "report.html") as shown:
        page = shown.page
        page.wait_for_selector(READY, timeout=SLOW)
        first = shown.pixels()
        assert len(first) > 5_000  # a brain, and not an empty ground
        options = page.locator("#map option").all_inner_texts()
        assert len(options) == len(set(options)) > 4 and any("Best layer" in one for one in options)
        page.focus("#map")
        page.keyboard.press("End")
        assert shown.ask("document.getElementById('cortex').dataset.map") == str(len(options) - 1)
        assert shown.ask("document.querySelectorAll('.legend-of:not([hidden])').length") == 1
        assert (second := shown.pixels()) != first
        page.focus("#cortex")
        page.keyboard.press("ArrowRight")
        assert shown.pixels() != second and page.input_value("#view") == ""
        page.select_option("#view", "90,0")
        assert page.input_value("#view") == "90,0" and shown.errors == []


def test_the_keyboard_reaches_everything_and_shows_where_it_is(reported: Reported, browser):
    with Shown(browser, reported.work / "report.html") as shown:
        page = shown.page
        page.wait_for_selector(READY, timeout=SLOW)
        n = shown.ask("document.querySelectorAll('a, button, select, summary, canvas, .scroll').length")
        reached, outlined = set(), True
        for _ in range(2 * n):
            page.keyboard.press("Tab")
            reached.add(shown.ask("(e => e.tagName + '.' + e.className + '#' + e.id)(document.activeElement)"))
            outlined &= shown.ask(
                "(e => e == document.body || getComputedStyle(e).outlineStyle != 'none')(document.activeElement)"
            )
        assert {"BUTTON.#theme", "SELECT.#map", "SELECT.#view", "CANVAS.#cortex", "DIV.scroll#", "SUMMARY.#"} <= reached
        assert outlined


def test_the_theme_changes_by_a_key(reported: Reported, browser):
    with Shown(browser, reported.work / "report.html") as shown:
        grounds = []
        for _ in range(3):
            grounds.append(shown.ask("getComputedStyle(document.body).backgroundColor"))
            shown.page.focus("#theme")
            shown.page.keyboard.press("Enter")
        assert grounds[0] == grounds[2] != grounds[1]


def test_on_paper_everything_is_open_and_white(reported: Reported, browser):
    with Shown(browser, reported.work / "report.html", scheme="dark") as shown:
        shown.page.wait_for_selector(READY, timeout=SLOW)
        closed = shown.ask("document.querySelectorAll('details:not([open])').length")
        shown.ask("dispatchEvent(new Event('beforeprint'))")
        assert closed and shown.ask("document.querySelectorAll('details:not([open])').length") == 0
        shown.page.emulate_media(media="print")
        assert shown.ask("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert shown.ask("getComputedStyle(document.querySelector('nav')).display") == "none"
        assert shown.page.pdf()[:4] == b"%PDF"
        shown.ask("dispatchEvent(new Event('afterprint'))")
        assert shown.ask("document.querySelectorAll('details:not([open])').length") == closed
        assert shown.errors == []


def test_without_a_viewer_the_pictures_stay_and_a_sentence_says_why(reported: Reported, browser, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(
        reported.html.replace('type="text/plain" id="data-library">', 'type="text/plain" id="data-library">AAAA')
    )
    with Shown(browser, path) as shown:
        shown.page.wait_for_function("document.getElementById('viewer-note').textContent.includes('did not start')")
        assert shown.page.locator(".map img").count() > 2
