"""The page in a real headless Chromium: figures drawn, nothing on the console, no foreign script, no network."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import big_page
import pytest
from browser import Page, chromium
from frames import add_analyses, overlay_frame
from PIL import Image
from reading import THREE
from run_folders import TASKS, make_joint, make_run

from dymoe.analysis import store
from dymoe.report.page import write_report

FIRST_MATRIX = "document.querySelector('#matrices figure > .plots .heat')"
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
    page.scroll_through()
    page.wait(DRAWN)


def test_every_figure_is_drawn_and_the_console_is_silent(page: Page, report: Path) -> None:
    show(page, report)
    ids = page.evaluate("[...document.querySelectorAll('figure')].map((f) => f.closest('section').id)")
    assert ids == ["losses", "side-by-side", "over-stages", "matrices", "lost", "routing-drift", "routing-maps"]
    drawn = "[...document.querySelectorAll('figure')].every((f) => f.querySelector('svg.main-svg, .heat td[style]'))"
    assert page.evaluate(drawn)
    assert page.evaluate("document.querySelectorAll('#over-stages .plot svg.main-svg').length") >= len(TASKS)
    # Not only frames: one trace per method, and a number in every cell of the lower triangle.
    assert page.evaluate("document.querySelectorAll('#side-by-side .scatterlayer .trace').length") == 4
    assert page.evaluate(f"{FIRST_MATRIX}.querySelectorAll('td[style]').length") == 36
    colours = f"[...{FIRST_MATRIX}.querySelectorAll('td[style]')].map((c) => getComputedStyle(c).backgroundColor)"
    assert len(set(page.evaluate(colours))) > 20
    assert page.evaluate("[...document.querySelectorAll('img')].every((i) => i.complete && i.naturalWidth > 0)")
    assert page.messages == []
    assert {url.split(":")[0] for url in page.requests} <= {"file", "data", "blob"}
    assert [url for url in page.requests if url.startswith("file:")] == [report.as_uri()]


def test_a_fold_opens_by_keyboard_and_draws_its_figures(page: Page, report: Path) -> None:
    show(page, report)
    page.evaluate("document.querySelector('#matrices summary').focus()")
    for kind in ("keyDown", "keyUp"):
        page.send("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13, text="\r")
    seen = "[...document.querySelectorAll('#matrices details[open] .heat')].filter((m) => m.offsetHeight > 100).length"
    page.wait(f"{seen} === 6")
    assert page.messages == []


def test_plots_are_drawn_when_they_come_near_the_screen_and_all_for_paper(page: Page, report: Path) -> None:
    page.messages.clear()
    page.size(1280, 900)
    page.open(report)
    page.settle()
    count = "document.querySelectorAll('.plot svg.main-svg').length"
    before = page.evaluate(count)
    assert before < page.evaluate("document.querySelectorAll('.plot').length")
    assert page.evaluate("document.querySelector('#routing-drift .main-svg')") is None
    page.evaluate("document.querySelector('#routing-drift').scrollIntoView({ behavior: 'instant' })")
    page.wait("document.querySelector('#routing-drift .main-svg') !== null")
    assert page.evaluate(f"{count} - {before}") > 0
    page.open(report)
    page.send("Page.printToPDF")
    assert page.evaluate(DRAWN)
    assert page.messages == []


def test_a_heatmaps_cell_says_what_it_is_under_the_pointer(page: Page, report: Path) -> None:
    show(page, report)
    cell = f"{FIRST_MATRIX}.rows[3].cells[2]"
    page.evaluate(f"{cell}.dispatchEvent(new PointerEvent('pointerover', {{ bubbles: true }}))")
    told = page.evaluate(f"{cell}.title")
    match = re.fullmatch(rf"after learning 3 {TASKS[2]}: (\d+\.\d) % on 2 {TASKS[1]}", told)
    assert match, told
    assert f"{float(match[1]):.0f}" == page.evaluate(f"{cell}.textContent")


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


def choose(page: Page, select: str, downs: int = 1) -> str:
    """Move a select's choice down by keyboard; returns the option chosen."""
    page.evaluate(f"document.querySelector({json.dumps(select)}).focus()")
    for _ in range(downs):
        page.send("Input.dispatchKeyEvent", type="rawKeyDown", key="ArrowDown", windowsVirtualKeyCode=40)
        page.send("Input.dispatchKeyEvent", type="keyUp", key="ArrowDown", windowsVirtualKeyCode=40)
    return str(page.evaluate(f"document.querySelector({json.dumps(select)}).selectedOptions[0].textContent"))


SHOWN = "[...document.querySelectorAll('#samples article')].filter((a) => !a.hidden)"


def test_two_methods_are_compared_by_keyboard(page: Page, report: Path) -> None:
    show(page, report)
    status = "document.querySelector('#samples [role=status]').textContent"
    indices = {"lora": "0", "incmoelora": "1", "dymoe": "2", "joint": "3"}
    for downs in (0, 1):
        page.evaluate("document.querySelector('#samples select[name=kept]').selectedIndex = 1")
        kept = choose(page, "#samples select[name=kept]", downs)
        page.evaluate("document.querySelector('#samples select[name=lost]').selectedIndex = 2")
        lost = choose(page, "#samples select[name=lost]", 1)
        assert (kept, lost) == (("lora", "incmoelora")[downs], "dymoe")
        shown = page.evaluate(f"{SHOWN}.map((a) => [a.dataset.kept, a.dataset.lost])")
        assert shown
        assert all(indices[kept] in keeps.split() and indices[lost] in loses.split() for keeps, loses in shown)
        rows = "[...a.querySelectorAll('.fates li')].filter((r) => !r.hidden).map((r) => r.dataset.method)"
        assert all(
            set(methods) == {indices[kept], indices[lost]} for methods in page.evaluate(f"{SHOWN}.map((a) => {rows})")
        )
        assert page.evaluate(status).startswith(f"{len(shown)} of 32 samples are shown. Of all, {kept} still answers ")
    task = choose(page, "#samples select[name=task]")
    assert set(page.evaluate(f"{SHOWN}.map((a) => a.dataset.task)")) <= {str(TASKS.index(task))}
    assert page.messages == []


@pytest.fixture(scope="module")
def analysed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("analysed")
    runs = [
        add_analyses(make_run(folder / method, method, 0, THREE), seed, THREE)
        for seed, method in enumerate(("dymoe", "incmoelora"))
    ]
    return write_report(runs, folder / "report.html")


def test_the_routing_figures_are_drawn_and_follow_the_choice(page: Page, analysed: Path) -> None:
    show(page, analysed)
    assert page.messages == []
    figures = ("drift-parts", "drift-layers", "drift-changed", "drift-forgetting", "activation")
    for section in (*figures, "token-types", "loss-terms"):
        assert (
            page.evaluate(
                f"document.querySelectorAll('#{section} .panel:not([hidden]) :is(svg.main-svg, .heat)').length"
            )
            > 0
        )
    panels = "[...document.querySelectorAll('#{} .panel:not([hidden]) h3')].map((h) => h.textContent)"
    assert page.evaluate(panels.format("activation")) == ["dymoe, after stage 3"]
    assert page.evaluate("document.querySelectorAll('#activation .panel:not([hidden]) .point').length") == 15
    choose(page, "#activation select[data-place='0']")
    page.wait(DRAWN)
    assert page.evaluate(panels.format("activation")) == ["incmoelora, after stage 3"]
    rows = "[...document.querySelectorAll('#activation tbody tr')].filter((r) => !r.hidden)"
    assert page.evaluate(f"{rows}.map((r) => r.children[0].textContent)") == [
        f"incmoelora, stage 3: {task}" for task in THREE
    ]
    choose(page, "#drift-layers select[data-place='1']", 2)
    page.wait(DRAWN)
    assert page.evaluate(panels.format("drift-layers")) == ["dymoe, after stage 3: instruction"]
    assert page.messages == []


def test_without_scripts_heatmaps_and_all_tables_are_read(page: Page, analysed: Path) -> None:
    page.send("Emulation.setScriptExecutionDisabled", value=True)
    try:
        page.size(1280, 900)
        page.open(analysed)
        heights = "[...document.querySelectorAll('{}')].map((part) => part.offsetHeight)"
        assert max(page.evaluate(heights.format(".plot"))) == 0  # no empty places
        maps = page.evaluate(heights.format("#drift-layers .heat"))
        assert len(maps) == 8  # of two methods: all tokens and three parts
        assert min(maps) > 50
        page.evaluate("document.querySelector('#drift-layers details:last-of-type').open = true")
        rows = page.evaluate(heights.format("#drift-layers tbody tr"))
        assert min(rows) > 0
    finally:
        page.send("Emulation.setScriptExecutionDisabled", value=False)


def test_the_token_overlay_is_coloured_by_group_or_type(page: Page, analysed: Path) -> None:
    show(page, analysed)
    patch = "document.querySelector('#overlay .panel:not([hidden]) .view:last-child .patches b')"
    letter = f"getComputedStyle({patch}, '::after').content"
    number = page.evaluate(f"{patch}.dataset.g")
    assert number in ("1", "2", "3")
    assert page.evaluate(letter) in ("attr(data-g)", f'"{number}"')  # older browsers do not resolve it
    before = page.evaluate(f"getComputedStyle({patch}).backgroundColor")
    assert choose(page, "#overlay select[name=colour]") == "token type"
    assert page.evaluate(letter)[1] == page.evaluate(f"{patch}.title.split(', ')[1][0]")
    assert page.evaluate(f"getComputedStyle({patch}).backgroundColor") != "rgba(0, 0, 0, 0)" != before
    assert "data:image/webp" in page.evaluate(f"getComputedStyle({patch}.parentElement).backgroundImage")
    label = page.evaluate(f"{patch}.parentElement.getAttribute('aria-label')")
    assert label.startswith("The picture, 4 by 4 patches. Patches: ")
    assert choose(page, "#overlay select[data-place='1']") == "textvqa: textvqa-0"
    assert page.evaluate("document.querySelector('#overlay .panel:not([hidden]) h3').textContent").startswith(
        "dymoe: textvqa, textvqa-0"
    )
    assert page.messages == []


def test_the_routing_sections_fit_a_phone_and_the_dark(page: Page, analysed: Path) -> None:
    show(page, analysed, "dark", 390)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    wide = "[...document.querySelectorAll('.panel:not(.scroll) .plot svg')].map((s) => s.clientWidth)"
    assert max(page.evaluate(wide)) <= 390
    ink = "getComputedStyle(document.querySelector('#activation .ytick text')).fill"
    assert page.evaluate(ink) == "rgb(228, 231, 235)"
    assert page.messages == []


def test_a_page_of_three_methods_weighs_under_six_megabytes(tmp_path: Path) -> None:
    """Nine tenths of it are the plotting library; a method with every analysis adds 0.3 MB."""
    assert 5_000_000 < big_page.make(tmp_path, big_page.METHODS[:3]).stat().st_size < 6_000_000


@pytest.mark.slow
def test_a_page_of_twelve_methods_weighs_under_ten_megabytes(big: Path) -> None:
    assert 6_000_000 < big.stat().st_size < 10_000_000


@pytest.mark.slow
def test_a_page_of_twelve_methods_is_read_at_once(big: Path, tmp_path: Path) -> None:
    told = [big_page.load(big, tmp_path / str(number)) for number in range(3)]
    assert min(one.screen_computing for one in told) < 0.5, told
    assert min(one.library_computing for one in told) < 3, told


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return big_page.make(tmp_path_factory.mktemp("big"))


def test_hostile_text_stays_text(page: Page, tmp_path: Path) -> None:
    # The first two are short enough to stand unclipped in a label, where plotly would read them as markup.
    tasks = ("<b>bold<i>", "a&lt;b<br>c", "<img src=x onerror=window.hacked=1>", '"onload="hacked=1')
    runs = [make_run(tmp_path / f"r{i}", f"{HOSTILE}{i}", i, tasks, text=HOSTILE) for i in range(2)]
    add_analyses(runs[0], 0, tasks)
    store(runs[0], "overlay", overlay_frame(0, tasks, words=(HOSTILE, "\u202e{{7*7}}")), {"command": HOSTILE})
    show(page, write_report(runs, tmp_path / "report.html"))
    page.evaluate("document.querySelectorAll('details').forEach((fold) => { fold.open = true; })")
    page.wait(DRAWN)
    assert page.evaluate("window.hacked === undefined")
    assert page.messages == []  # the policy would have blocked, and reported, what escaping let through
    assert page.evaluate("document.querySelectorAll('script:not([type])').length") == 2
    assert page.evaluate("document.querySelectorAll('svg a, a[href^=javascript]').length") == 0
    labels = page.evaluate(f"[...{FIRST_MATRIX}.querySelectorAll('tbody th')].map((t) => t.textContent)")
    assert labels == [f"{i} {t[:19]}…" if len(t) > 20 else f"{i} {t}" for i, t in enumerate(tasks, start=1)]
    # Two methods whose names differ only behind the clip still have a line each.
    assert page.evaluate("document.querySelectorAll('#side-by-side .ytick').length") == 2
