"""One self-contained HTML page about one run or several side by side."""

from dymoe.report.page import write_report

__all__ = ["write_report"]
