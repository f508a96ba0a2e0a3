"""`dymoe report RUN [RUN ...]`: one self-contained HTML page."""

from collections.abc import Sequence
from pathlib import Path

from dymoe.errors import DymoeError

HELP = """usage: dymoe report RUN [RUN ...] [--output FILE]

Write one self-contained HTML page about the runs, side by side (RUN/report.html of the first unless --output)."""


def main(argv: Sequence[str]) -> int:
    """Write the page and print its path."""
    words = list(argv)
    if not words or "-h" in words or "--help" in words:
        print(HELP)
        return 0 if words else 2
    output: Path | None = None
    if "--output" in words:
        at = words.index("--output")
        if at + 1 == len(words):
            raise DymoeError("report: --output: expected a file after it")
        output = Path(words[at + 1])
        del words[at : at + 2]
    unknown = [word for word in words if word.startswith("--")]
    if unknown:
        raise DymoeError(f"report: {unknown[0]}: unknown option; there is --output")
    from dymoe.report import write_report

    runs = [Path(word) for word in words]
    target = output or (runs[0] / "report.html" if runs else Path("report.html"))
    write_report(runs, target)
    print(target)
    return 0
