"""The one sentence said about a name that is not known."""

import difflib
from collections.abc import Iterable

from dymoe.messages import brief, listed


def unknown(kind: str, name: object, known: Iterable[str]) -> str:
    """Say that `name` is no known `kind`, which known name is nearest, and which there are."""
    names = list(known)
    by_case = {candidate.lower(): candidate for candidate in names}
    close = difflib.get_close_matches(str(name).lower(), list(by_case), n=1, cutoff=0.5)
    hint = f"did you mean {by_case[close[0]]!r}? " if close else ""
    return f"unknown {kind} {brief(name)}: {hint}Known: {listed(names)}"
