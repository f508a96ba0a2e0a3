"""The report at full size, from synthetic run folders: its weight and how long a browser takes to load it.

    python tests/report/big_page.py [FOLDER]

Twelve methods on eight tasks, eleven of them with every analysis (thirty layers), twenty samples a task with pictures.
"""

import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from browser import Page, chromium
from frames import activation_frame, add_analyses, drift_frame
from run_folders import TASKS, make_run

from dymoe.analysis import store
from dymoe.report.page import write_report

METHODS = (
    *("dymoe", "lora", "incmoelora", "moelora", "inclora", "olora"),
    *("ewc", "lwf", "proglora", "cmoe", "same", "sefe"),
)
LAYERS = 30
# Before anything of the page runs: the page's own clock at the first frame after headline and first figure stood in it.
WATCH = """window.firstScreen = new Promise((resolve) => {
  const look = () => {
    const cells = [...document.querySelectorAll('#losses figure > .plots .heat')].map((map) => map.rows.length);
    const there = document.querySelector('h1')?.textContent && cells.length === 2 && Math.min(...cells) === 13;
    requestAnimationFrame(there ? () => setTimeout(() => resolve(performance.now() / 1000), 0) : look);
  };
  requestAnimationFrame(look);
});
window.ready = new Promise((resolve) => addEventListener('load', () => resolve(performance.now() / 1000)))"""

# Scrolls to the first plot and gives the seconds until it is drawn.
FIRST_PLOT = """new Promise((resolve) => {
  const start = performance.now();
  const first = document.querySelector('.plot');
  first.scrollIntoView({ behavior: 'instant' });
  const look = () => {
    if (first.querySelector('svg.main-svg')) setTimeout(() => resolve((performance.now() - start) / 1000), 0);
    else requestAnimationFrame(look);
  };
  requestAnimationFrame(look);
})"""


@dataclass(frozen=True)
class Loading:
    """Seconds since the page was asked for: by the clock, and the page's own computing time, which is steadier.

    The *first screen* is painted with headline, cards and the first figure; *ready* is when all of the page has been
    read and its script has run; at *library* the plotting library, run while the browser is idle, stands too. *Plot* is
    the wait for the first plot when it is scrolled to then; *whole* is all computing of a reader who scrolls through
    the page.
    """

    screen: float
    screen_computing: float
    ready: float
    library: float
    library_computing: float
    plot: float
    whole_computing: float


def make(folder: Path, methods: Sequence[str] = METHODS) -> Path:
    """The page of these methods; returns its path."""
    first = make_run(folder / methods[0], methods[0], samples=20)
    add_analyses(first, names=("overlay", "dynamics"))
    store(first, "drift", drift_frame(0, TASKS, LAYERS, ("v_proj",)), {})
    store(first, "activation", activation_frame(0, TASKS, LAYERS), {})
    runs = [first]
    for method in methods[1:]:
        runs.append(make_run(folder / method, method, samples=20, routed=method != "lora"))
        if method != "lora":
            shutil.copytree(first / "analysis", runs[-1] / "analysis")
    return write_report(runs, folder / "report.html")


def load(page: Path, profile: Path) -> Loading:
    """How long a fresh tab of a fresh browser takes."""
    with chromium(profile) as tab:
        tab.size(1280, 900)
        tab.scheme("light")
        tab.send("Performance.enable", timeDomain="threadTicks")
        tab.send("Page.addScriptToEvaluateOnNewDocument", source=WATCH)
        tab.send("Page.navigate", url=page.resolve().as_uri())
        screen = float(tab.evaluate("window.firstScreen"))
        screen_computing = computing(tab)
        ready = float(tab.evaluate("window.ready"))
        tab.wait("window.Plotly !== undefined", 60)
        library, library_computing = float(tab.evaluate("performance.now() / 1000")), computing(tab)
        plot = float(tab.evaluate(FIRST_PLOT))
        tab.scroll_through()
        return Loading(screen, screen_computing, ready, library, library_computing, plot, computing(tab))


def computing(tab: Page) -> float:
    """Processor seconds of the page's main thread so far."""
    metrics = {entry["name"]: entry["value"] for entry in tab.send("Performance.getMetrics")["metrics"]}
    return float(metrics["ThreadTime"])


def main(folder: Path) -> None:
    """Print weight and loading time; several times, since the first start of a browser is slow."""
    page = make(folder)
    print(f"{page.stat().st_size / 1e6:.2f} MB")
    for number in range(3):
        told = load(page, folder / f"profile-{number}")
        print(
            f"first screen {told.screen:.2f} s ({told.screen_computing:.2f} computing), ready {told.ready:.2f} s, "
            f"library {told.library:.2f} s ({told.library_computing:.2f} computing), then a plot in {told.plot:.2f} s; "
            f"all plots {told.whole_computing:.2f} computing"
        )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as place:
            main(Path(place))
