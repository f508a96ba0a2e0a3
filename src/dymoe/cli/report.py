"""`dymoe report RUN [RUN ...]`: one self-contained HTML page."""

from collections.abc import Sequence
from pathlib import Path

from dymoe.cli.options import Command
from dymoe.errors import DymoeError
from dymoe.libraries import require_extra
from dymoe.messages import say

HELP = """usage: dymoe report RUN [RUN ...] [--output FILE]

Write one self-contained HTML page about the runs, side by side.

  RUN            a run folder, or the results of `dymoe sweep` (for example results/leaderboard.jsonl), which stand for
                 all their runs; the results of `dymoe analyze dilemma` make a page of their own
  --output FILE  the page (default: RUN/report.html, or RESULTS.html beside the results, of the first RUN)"""

COMMAND = Command("report", HELP, "RUN ...", {"--output": str})


def main(argv: Sequence[str]) -> int:
    """Write the page and print its path."""
    arguments = COMMAND.parse(argv)
    runs = [Path(word) for word in arguments.words]
    first = runs[0]
    beside = first.with_suffix(".html") if first.suffix == ".jsonl" else first / "report.html"
    target = Path(arguments["--output"] or beside)
    studies = [run for run in runs if run.suffix == ".jsonl" and _of_dilemma(run)]
    if studies and len(runs) > 1:
        raise DymoeError(f"{studies[0]}: the results of the token's dilemma make a page of their own; give them alone")
    require_extra("report", "report")
    if studies:
        from dymoe.report.page import write_dilemma

        write_dilemma(first, target)
    else:
        from dymoe.report.page import write_report

        write_report(runs, target)
    say(target)
    return 0


def _of_dilemma(file: Path) -> bool:
    """Whether the results are those of the token's dilemma."""
    from dymoe.analysis import is_dilemma
    from dymoe.learning.formats import read_results

    return is_dilemma(read_results(file)["rows"])
