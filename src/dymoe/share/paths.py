"""Text without the paths of the machine it was written on."""

import re
from pathlib import Path
from typing import Any

from dymoe.models.assembled import MODULES

# A path from the root, the home folder, a drive or the folder one is in. Hub ids, rules such as coin/gqa and web
# addresses are none. Regular expressions of layer names have backslashes, so these count behind a drive alone.
START = re.compile(r"(?:file:(?://)?|~[\w.-]*|[A-Za-z]:|\.{1,2})?/|[A-Za-z]:\\|\\\\\w[\w.-]*\\")
INSIDE = re.compile(
    r"(?<![\w.:/\\~-])(?:(?:file:(?://)?|~[\w.-]*|[A-Za-z]:|\.{1,2})?(?:/[^\s/\\'\"<>|:;,()\[\]]+)+/?"
    r"|[A-Za-z]:(?:\\[^\s/\\'\"<>|:;,()\[\]]+)+)"
)


def without_paths(value: Any) -> Any:
    """The value (of JSON or YAML) with every path in its texts and keys cut down to its last part.

    A text that is a path as a whole may have spaces in it; inside a longer text a path ends at the first space.
    """
    if isinstance(value, dict):
        return {without_paths(key): without_paths(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(item) for item in value]
    if not isinstance(value, str):
        return value
    if START.match(value) and "\n" not in value:
        return last_part(value)
    return INSIDE.sub(lambda match: last_part(match[0]), value)


def last_part(path: str) -> str:
    """The last part of a path of either kind of machine; "path" if it has none."""
    parts = [part for part in re.split(r"[/\\]+", path) if part not in ("", ".", "..", "~", "file:")]
    return parts[-1] if parts else "path"


def base_name(name: str) -> str:
    """The base model's name for readers elsewhere: the last part of a folder's path, else what the recipe says."""
    return last_part(name) if base_kind(name) == "folder" else name


def base_kind(name: str) -> str:
    """What a recipe's `model` names: an "assembled" model, a "folder" of this machine, a repository of the "hub"."""
    if name in MODULES:
        return "assembled"
    one_slash = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None
    return "hub" if one_slash and not Path(name).is_dir() else "folder"
