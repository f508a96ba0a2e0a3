"""Methods, plugins and scoring rules from outside the package.

A name with a file in it, ``my_method.py:Mine``, is what that Python file calls ``Mine``; the path is relative to the
current folder. Any other name that dymoe does not know is looked up among the entry points of installed packages
(groups ``dymoe.methods``, ``dymoe.plugins``, ``dymoe.scorers``). The file is run: a recipe that names one is code,
to be trusted as code is. A run keeps the SHA-256 of every file it used beside the versions of its packages.
"""

import importlib.util
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from dymoe.errors import DymoeError
from dymoe.files import expand, sha256_of
from dymoe.messages import brief, one_line

_FILE = ".py:"
_digests: dict[str, str] = {}  # of the files that this process has run, by path as it was given


def names(group: str) -> list[str]:
    """The names that installed packages have in an entry point group."""
    return sorted(point.name for point in entry_points(group=group))


def find(name: str, group: str) -> Any:
    """What a name from outside stands for; None where no file and no entry point has it.

    Args:
        name: ``file.py:name`` or the name of an entry point.
        group: the entry points' group.

    Raises:
        DymoeError: the file is missing or cannot be run, or has no such name; the package's object cannot be imported.
    """
    if _FILE in name:
        path, _, attribute = name.rpartition(":")
        module = _module(path)
        if not hasattr(module, attribute):
            raise DymoeError(f"{path}: has no {brief(attribute)}")
        return getattr(module, attribute)
    for point in entry_points(group=group, name=name):
        try:
            return point.load()
        except Exception as error:
            raise DymoeError(f"{name}: {point.value} cannot be imported: {one_line(error)}") from error
    return None


def digests() -> dict[str, str]:
    """SHA-256 of every file that this process took a name from, by its path as it was given."""
    return dict(_digests)


def _module(path: str) -> Any:
    """The module of a file; run once in a process, and again where the file has changed."""
    file = Path(expand(path))
    if not file.is_file():
        raise DymoeError(f"{path}: no such file; a path is relative to the current folder")
    digest = sha256_of(file)
    name = f"dymoe_plugin_{digest}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[name]
            raise DymoeError(f"{path}: cannot be run: {type(error).__name__}: {one_line(error)}") from error
    _digests[path] = digest
    return sys.modules[name]
