"""A process that dies at its n-th change of a folder: what a kill, a power cut or a full queue does to a run.

The work runs in a forked child, so that nothing is imported anew. Python reports every file operation to an audit hook
before it happens; the hook counts those that change something below the folder and ends the process at the n-th by
SIGKILL, which no handler sees.
"""

import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "os.symlink", "os.chmod")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class Killed(Exception):
    """The child was killed, as asked."""


def changes(event: str, arguments: tuple[Any, ...], folder: str) -> bool:
    """Whether an audit event changes something below the folder."""
    if event not in CHANGES and not (event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING):
        return False
    path = arguments[0]
    if isinstance(path, bytes):
        path = path.decode(errors="replace")
    # Removing a tree names files relative to an open folder; nothing else here does.
    relative = event in ("os.remove", "os.rmdir") and arguments[-1] not in (-1, None)
    return relative or (isinstance(path, str | os.PathLike) and os.fspath(path).startswith(folder))


def run_child(work: Callable[[], Any], folder: Path, kill_at: int | None = None) -> int:
    """Do the work in a child of its own; how many changes of the folder it made.

    Args:
        work: done in the child; what it returns is lost.
        folder: whose changes count.
        kill_at: the change (from 1) before which the child dies; None lets it end.

    Raises:
        Killed: it came so far.
        AssertionError: the work raised an error; the traceback is told.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _child(work, str(folder), kill_at, writer)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        told = stream.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        assert kill_at is not None
        raise Killed
    count, error = pickle.loads(told)  # from our own child
    assert error is None, error
    return int(count)


def _child(work: Callable[[], Any], folder: str, kill_at: int | None, writer: int) -> None:
    count, error = 0, None

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if (event == "open" or event.startswith("os.")) and changes(event, arguments, folder):
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    try:
        work()
    except BaseException:
        error = traceback.format_exc()
    with os.fdopen(writer, "wb") as stream:
        pickle.dump((count, error), stream)
    os._exit(0)
