"""The report at full size, from synthetic run folders: its weight and how long a browser takes to load it.

    python tests/report/big_page.py [FOLDER]

Twelve methods on eight tasks, eleven of them with every analysis (thirty layers), twenty samples a task with pictures.
"""

import shutil
import sys
import tempfile
import time
from pathlib import Path

from browser import chromium
from frames import activation_frame, add_analyses, drift_frame
from run_folders import TASKS, make_run

from dymoe.analysis import store
from dymoe.report import write_report

METHODS = (
    *("dymoe", "lora", "incmoelora", "moelora", "inclora", "olora"),
    *("ewc", "lwf", "proglora", "cmoe", "same", "sefe"),
)
LAYERS = 30
VISIBLE = "document.querySelectorAll('#losses .plots > .panel svg.main-svg').length >= 2"


def make(folder: Path) -> Path:
    """The page of twelve methods; returns its path."""
    first = make_run(folder / METHODS[0], METHODS[0], samples=20)
    add_analyses(first, names=("overlay", "dynamics"))
    store(first, "drift", drift_frame(0, TASKS, LAYERS, ("v_proj",)), {})
    store(first, "activation", activation_frame(0, TASKS, LAYERS), {})
    runs = [first]
    for method in METHODS[1:]:
        runs.append(make_run(folder / method, method, samples=20, routed=method != "lora"))
        if method != "lora":
            shutil.copytree(first / "analysis", runs[-1] / "analysis")
    return write_report(runs, folder / "report.html")


def load(page: Path, profile: Path) -> tuple[float, float]:
    """Seconds until a fresh tab shows the first screen with its figures: by the clock, and its own computing time.

    The second hardly depends on what else the machine is doing.
    """
    with chromium(profile) as tab:
        tab.size(1280, 900)
        tab.scheme("light")
        tab.send("Performance.enable", timeDomain="threadTicks")
        start = time.monotonic()
        tab.open(page)
        tab.wait(VISIBLE, 60)
        clock = time.monotonic() - start
        metrics = {entry["name"]: entry["value"] for entry in tab.send("Performance.getMetrics")["metrics"]}
        return clock, float(metrics["ThreadTime"])


def main(folder: Path) -> None:
    """Print weight and loading time; several times, since the first start of a browser is slow."""
    page = make(folder)
    print(f"{page.stat().st_size / 1e6:.2f} MB")
    for number in range(3):
        clock, computing = load(page, folder / f"profile-{number}")
        print(f"first screen after {clock:.2f} s, of these {computing:.2f} s computing")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as place:
            main(Path(place))
