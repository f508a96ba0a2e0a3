"""Reads the page as a browser would, and makes run folders with given numbers."""

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from run_folders import write_results

from dymoe.report.page import write_report

THREE = ("scienceqa", "textvqa", "imagenet")


class Text(HTMLParser):
    """The page as a browser would read it: text by the id of the section around it, all start tags, cells of tables."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.sections: dict[str, str] = {"": ""}
        self.cells: list[tuple[str, str, dict[str, str | None]]] = []
        self._section, self._skip = "", False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._skip = tag in ("script", "style")
        if tag in ("th", "td"):
            self.cells.append((tag, "", dict(attrs)))
        if tag == "section":
            self._section = dict(attrs)["id"] or ""
            self.sections[self._section] = ""

    def handle_endtag(self, tag: str) -> None:
        self._skip = False
        if tag == "section":
            self._section = ""

    def handle_data(self, data: str) -> None:
        if not self._skip:
            self.sections[self._section] += " " + " ".join(data.split())
            if self.cells:
                tag, text, attributes = self.cells[-1]
                self.cells[-1] = (tag, text + data.strip(), attributes)


def page(tmp_path: Path, *runs: Path) -> Text:
    out = write_report(runs, tmp_path / "report.html")
    assert out == tmp_path / "report.html"
    return Text(out.read_text(encoding="utf-8"))


def matrix_run(folder: Path, method: str, rows: list[list[float]], seed: int = 0, **more: Any) -> Path:
    """A run folder with just these numbers."""
    write_results(folder, method=method, seed=seed, tasks=list(THREE), matrix=rows, **more)
    return folder
