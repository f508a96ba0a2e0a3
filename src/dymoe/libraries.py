"""What dymoe needs of other libraries beyond what they promise: looked for where it is used, an error where missing.

Each need has one place, which names it to a function of this module; tests/test_libraries.py holds all of them against
the installed versions.
"""

import inspect
from collections.abc import Iterable
from importlib import import_module
from typing import Any

from dymoe.errors import DymoeError


def require_names(owner: type, *names: str) -> None:
    """Refuse a class that has not all of these names, which dymoe calls, sets or overrides.

    Raises:
        DymoeError: one is missing.
    """
    _refuse(owner, [name for name in names if not hasattr(owner, name)], "has no")


def require_arguments(owner: type, method: str, *names: str) -> None:
    """Refuse a class whose method does not name all of these arguments.

    Raises:
        DymoeError: one is missing.
    """
    require_names(owner, method)
    known = inspect.signature(getattr(owner, method)).parameters
    _refuse(owner, [name for name in names if name not in known], f"takes in {method} no")


def _refuse(owner: type, missing: Iterable[str], word: str) -> None:
    if missing := list(missing):
        raise untested(owner, f"{word} {', '.join(missing)}")


def untested(owner: Any, what: str) -> DymoeError:
    """The error that a class of another library (or an object of it) is not as dymoe needs it; `what` it does."""
    kind = owner if isinstance(owner, type) else type(owner)
    library = kind.__module__.partition(".")[0]
    version = getattr(import_module(library), "__version__", "")
    return DymoeError(
        f"{kind.__name__} of {f'{library} {version}'.strip()} {what}, which dymoe relies on; install the versions that "
        "it was tested with (requirements.lock in its repository)"
    )
