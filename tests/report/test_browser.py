"""The page in a real headless Chromium: figures drawn, nothing on the console, no foreign script, no network."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Page, chromium
from PIL import Image
from run_folders import TASKS, make_joint, make_run

from dymoe.report import write_report

DRAWN = """[...document.querySelectorAll('.plot')]
    .filter((plot) => !plot.closest('details:not([open]), [hidden]'))
    .every((plot) => plot.querySelector('svg.main-svg'))"""
HOSTILE = '</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1>"onload="window.hacked=1'


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with chromium(tmp_path_factory.mktemp("chromium")) as tab:
        yield tab


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    runs = [
        make_run(folder / f"{method}-{seed}", method, seed, routed=method != "lora")
        for method in ("lora", "incmoelora", "dymoe")
        for seed in (0, 1)
    ]
    return write_report([*runs, make_joint(folder / "joint")], folder / "report.html")


def show(page: Page, path: Path, scheme: str = "light", width: int = 1280) -> None:
    page.messages.clear()
    page.requests.clear()
    page.size(width, 900)
    page.scheme(scheme)
    page.open(path)
    page.wait(DRAWN)


def test_every_figure_is_drawn_and_the_console_is_silent(page: Page, report: Path) -> None:
    show(page, report)
    ids = page.evaluate("[...document.querySelectorAll('figure')].map((f) => f.closest('section').id)")
    assert ids == ["losses", "side-by-side", "over-stages", "matrices", "lost", "routing-drift", "routing-maps"]
    assert page.evaluate("[...document.querySelectorAll('figure')].every((f) => f.querySelector('svg.main-svg'))")
    assert page.evaluate("document.querySelectorAll('#over-stages .plot svg.main-svg').length") >= len(TASKS)
    # Not only frames: one trace per method, and a number in every cell of the lower triangle.
    assert page.evaluate("document.querySelectorAll('#side-by-side .scatterlayer .trace').length") == 4
    assert page.evaluate("document.querySelectorAll('#matrices-1 .heatmap-label').length") == 36
    assert page.evaluate("[...document.querySelectorAll('img')].every((i) => i.complete && i.naturalWidth > 0)")
    assert page.messages == []
    assert {url.split(":")[0] for url in page.requests} <= {"file", "data", "blob"}
    assert [url for url in page.requests if url.startswith("file:")] == [report.as_uri()]


def test_a_fold_opens_by_keyboard_and_draws_its_figures(page: Page, report: Path) -> None:
    show(page, report)
    assert page.evaluate("document.querySelectorAll('#matrices details .main-svg').length") == 0
    page.evaluate("document.querySelector('#matrices summary').focus()")
    for kind in ("keyDown", "keyUp"):
        page.send("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13, text="\r")
    page.wait("document.querySelectorAll('#matrices details[open] .plot').length === 6")
    page.wait(DRAWN)
    assert page.messages == []


def test_dark_and_light_follow_the_system(page: Page, report: Path, tmp_path: Path) -> None:
    ink = "getComputedStyle(document.querySelector('#side-by-side .ytick text')).fill"
    show(page, report, "light")
    assert page.evaluate(ink) == "rgb(28, 32, 36)"
    page.scheme("dark")
    page.wait(f"{ink} === 'rgb(228, 231, 235)'")
    page.screenshot(tmp_path / "dark.png")
    with Image.open(tmp_path / "dark.png") as image:
        assert image.height > 2000
        assert max(image.getpixel((2, image.height // 2))[:3]) < 40


def test_a_phone_needs_no_sideways_scrolling(page: Page, report: Path) -> None:
    show(page, report, width=390)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    labels = "[...document.querySelectorAll('#lost-1 .xtick text')]"
    visible = ".filter((t) => getComputedStyle(t).display !== 'none' && getComputedStyle(t).opacity !== '0')"
    shown = page.evaluate(f"{labels}{visible}.map((t) => t.textContent)")
    assert shown == list(TASKS)
    assert page.evaluate("Math.max(...[...document.querySelectorAll('.plot svg')].map((s) => s.clientWidth))") <= 390
    assert page.messages == []


def test_hostile_text_stays_text(page: Page, tmp_path: Path) -> None:
    # The first two are short enough to stand unclipped in a label, where plotly would read them as markup.
    tasks = ("<b>bold<i>", "a&lt;b<br>c", "<img src=x onerror=window.hacked=1>", '"onload="hacked=1')
    runs = [make_run(tmp_path / f"r{i}", f"{HOSTILE}{i}", i, tasks, text=HOSTILE) for i in range(2)]
    show(page, write_report(runs, tmp_path / "report.html"))
    page.evaluate("document.querySelectorAll('details').forEach((fold) => { fold.open = true; })")
    page.wait(DRAWN)
    assert page.evaluate("window.hacked === undefined")
    assert page.messages == []  # the policy would have blocked, and reported, what escaping let through
    assert page.evaluate("document.querySelectorAll('script:not([type])').length") == 2
    assert page.evaluate("document.querySelectorAll('svg a, a[href^=javascript]').length") == 0
    labels = page.evaluate("[...document.querySelectorAll('#matrices-1 .ytick text')].map((t) => t.textContent)")
    assert sorted(labels) == [f"{i} {t[:19]}…" if len(t) > 20 else f"{i} {t}" for i, t in enumerate(tasks, start=1)]
    # Two methods whose names differ only behind the clip still have a line each.
    assert page.evaluate("document.querySelectorAll('#side-by-side .ytick').length") == 2
