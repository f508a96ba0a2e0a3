"""`dymoe report RUN [RUN ...]`: one self-contained HTML page."""

from collections.abc import Sequence
from pathlib import Path

from dymoe.cli.options import parse

HELP = """usage: dymoe report RUN [RUN ...] [--output FILE]

Write one self-contained HTML page about the runs, side by side (RUN/report.html of the first unless --output)."""


def main(argv: Sequence[str]) -> int:
    """Write the page and print its path."""
    if not argv or "-h" in argv or "--help" in argv:
        print(HELP)
        return 0 if argv else 2
    options, words = parse("report", argv, ("--output",))
    from dymoe.report import write_report

    runs = [Path(word) for word in words]
    target = Path(options.get("--output") or (runs[0] / "report.html" if runs else "report.html"))
    write_report(runs, target)
    print(target)
    return 0
