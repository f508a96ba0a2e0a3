"""The documentation: its site builds without a warning, its links lead somewhere, what the tour names exists."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))


def defined(file):
    """The functions and classes of a file of the package, methods as `Class.method`."""
    names = set()
    for node in ast.parse((ROOT / "src/dymoe" / file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            inner = [one for one in node.body if isinstance(one, ast.FunctionDef)]
            names |= {node.name, *(f"{node.name}.{one.name}" for one in inner)}
    return names


def test_everything_that_the_tour_names_exists():
    text = (ROOT / "docs/tour.md").read_text(encoding="utf-8")
    references = re.findall(r"`([\w/]+\.py):([\w.]+)`", text)
    assert len(references) > 30
    assert [f"{file}:{name}" for file, name in references if name not in defined(file)] == []
    files = re.findall(r"`([\w/]+\.py)", text)
    assert len(files) == len(references), "every file is named with what is called in it"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_links_of_a_page_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    assert [link for link in targets if "://" not in link and not (page.parent / link).exists()] == []


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lora = (tmp_path / "site/methods/lora/index.html").read_text(encoding="utf-8")
    assert "recipes/pocket/lora.yaml" in lora
    assert 'href="../../recipes' not in lora
