"""`dymoe report RUN [RUN ...]`: one self-contained HTML page."""

from collections.abc import Sequence
from pathlib import Path

from dymoe.cli.options import parse
from dymoe.errors import DymoeError

HELP = """usage: dymoe report RUN [RUN ...] [--output FILE]
       dymoe report RESULTS.json [--output FILE]

Write one self-contained HTML page about the runs, side by side (RUN/report.html of the first unless --output), or
about the results of `dymoe analyze dilemma` (RESULTS.html beside them)."""


def main(argv: Sequence[str]) -> int:
    """Write the page and print its path."""
    if not argv or "-h" in argv or "--help" in argv:
        print(HELP)
        return 0 if argv else 2
    options, words = parse("report", argv, ("--output",))
    runs = [Path(word) for word in words]
    if any(run.suffix == ".json" for run in runs):
        return _study(runs, options.get("--output"))
    from dymoe.report import write_report

    target = Path(options.get("--output") or (runs[0] / "report.html" if runs else "report.html"))
    write_report(runs, target)
    print(target)
    return 0


def _study(files: Sequence[Path], output: str | None) -> int:
    """The page of the token's dilemma."""
    if len(files) > 1:
        raise DymoeError(f"report: {len(files)} inputs: expected run folders, or the results of one study alone")
    from dymoe.report.dilemma import write_dilemma

    print(write_dilemma(files[0], Path(output) if output else files[0].with_suffix(".html")))
    return 0
