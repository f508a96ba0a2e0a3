"""What the repository says of itself: its citation, its versions, its workflow."""

import ast
import importlib
import importlib.util
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import dymoe

ROOT = Path(__file__).resolve().parent.parent
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))


def test_one_version_stands_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)[1]
    assert {project["version"], dymoe.__version__, CITATION["version"], newest} == {dymoe.__version__}


def test_every_paper_that_is_named_is_cited():
    works = [CITATION["preferred-citation"], *CITATION["references"]]
    cited = {work["url"].rpartition("/")[2] for work in works}
    files = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "src").rglob("*.py")]
    papers = {number for file in files for number in re.findall(r"arXiv (\d{4}\.\d{5})", file.read_text("utf-8"))}
    assert len(papers) > 10
    assert papers <= cited
    assert all(work["title"] and work["authors"] and work["year"] for work in works)


def test_the_workflow_runs_what_a_commit_must_pass():
    workflow = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text(encoding="utf-8"))
    steps = workflow["jobs"]["test"]["steps"]
    assert [step["run"] for step in steps if "run" in step] == [".ci/run"]
    assert (ROOT / ".ci/run").stat().st_mode & 0o111


def test_the_files_that_contributors_are_sent_to_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    links = [target for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in target]
    paths = re.findall(r"`((?:src|tests|tools|recipes|docs|benchmarks)/[\w/.-]+)`", text)
    assert len(paths) > 10
    assert [path for path in links + paths if "NAME" not in path and not (ROOT / path).exists()] == []


# From the ground up: a room imports those that stand before it (and the modules beside the rooms), never one behind it.
ROOMS = ("tasks", "adapter", "models", "methods", "evaluation", "learning", "sweep", "preflight", "share", "analysis")
ROOMS += ("report", "play", "cli")


def imports(path: Path) -> set[str]:
    """The modules of dymoe that a file imports, at its top, in functions and for types."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in names if name.startswith("dymoe.")}


def test_imports_go_down():
    package = ROOT / "src" / "dymoe"
    assert {path.parent.name for path in package.glob("*/__init__.py")} == set(ROOMS)
    up = []
    for level, room in enumerate(ROOMS):
        above = tuple(f"dymoe.{other}." for other in ROOMS[level + 1 :])
        for path in (package / room).rglob("*.py"):
            up += [f"{path.relative_to(package)}: {name}" for name in imports(path) if f"{name}.".startswith(above)]
    assert up == []


# A name says what a value is; these say only what happened to it. Names of functions, classes, arguments and variables.
REFUSED = ("found", "kept", "told", "made", "held", "asked", "said", "seen", "given", "taken", "own", "place", "places")
REFUSED += ("whole", "wanted")


def names(path: Path) -> Iterator[tuple[int, str]]:
    """Line and name of everything that a file gives a name to; keys, and what others name, it does not choose."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.lineno, node.attr
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.lineno, node.name
        elif isinstance(node, ast.alias) and node.asname:
            yield node.lineno, node.asname


def test_names_say_what_a_value_is():
    files = [*(ROOT / "src").rglob("*.py"), *(ROOT / "scripts").rglob("*.py")]
    refused = [f"{path}:{line}: {name}" for path in files for line, name in names(path) if word(name) in REFUSED]
    assert len(files) > 100
    assert refused == []


def word(name: str) -> str:
    return name.strip("_").lower()


def test_a_name_that_says_nothing_is_listed(tmp_path):
    file = tmp_path / "file.py"
    file.write_text(
        "class Made:\n    def _kept(self, own):\n        self._said = place = own.told\n        own.held = 1\n"
    )
    assert {(line, name) for line, name in names(file) if word(name) in REFUSED} == {
        (1, "Made"),
        (2, "_kept"),
        (2, "own"),
        (3, "_said"),
        (3, "place"),
    }


@pytest.mark.parametrize("folder", ["benchmarks", "examples", "scripts", "tools"])
def test_what_stands_beside_the_package_imports_names_that_it_has(folder):
    """Programs that the suite does not run, or only with an extra installed, follow when a name moves."""
    checked = 0
    for file in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or (node.module or "").split(".")[0] != "dymoe":
                continue
            module = importlib.import_module(str(node.module))
            for name in node.names:
                inside = hasattr(module, "__path__") and importlib.util.find_spec(f"{node.module}.{name.name}")
                assert hasattr(module, name.name) or inside, f"{file}:{node.lineno}: {node.module} has no {name.name}"
                checked += 1
    assert checked
