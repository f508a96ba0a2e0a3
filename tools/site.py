"""MkDocs calls this for every page of its site: a link to what lies outside docs/ becomes its text."""

import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent.parent / "docs"


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The page's text without links that lead out of docs/ or to a folder."""
    folder = (DOCS / page.file.src_uri).parent

    def shown(link: re.Match[str]) -> str:
        target = (folder / link[2].partition("#")[0]).resolve()
        elsewhere = "://" not in link[2] and (target.is_dir() or not target.is_relative_to(DOCS))
        return link[1] if elsewhere else link[0]

    return re.sub(r"(?<!!)\[([^\]]*)\]\(([^)\s]+)\)", shown, markdown)
