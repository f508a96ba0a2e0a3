"""Atomic writes: a file or folder is either there in full or not there at all."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dymoe.errors import DymoeError


def atomic_write(path: str | Path, data: bytes | str) -> None:
    """Write `data` to `path` through a temporary file beside it, flushed to disk before the rename.

    Raises:
        DymoeError: the file cannot be written (full disk, no permission); what stood at `path` is untouched.
    """
    path = Path(path)
    # A generated text may end in half a surrogate pair: it is replaced, not refused.
    payload = data.encode(errors="replace") if isinstance(data, str) else data
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise DymoeError(f"{path}: cannot be written ({error.strerror or error})") from error


def atomic_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON to `path`, atomically (see `atomic_write`)."""
    atomic_write(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


@contextmanager
def atomic_dir(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` (replacing it) when the block ends without an error.

    Raises:
        DymoeError: the folder cannot be written; nothing half-written is left and an older `path` is kept.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    except OSError as error:
        raise DymoeError(f"{path}: cannot be written ({error.strerror or error})") from error
    try:
        yield temporary
        os.chmod(temporary, 0o755)
        if path.exists():
            shutil.rmtree(path)
        os.replace(temporary, path)
    except OSError as error:
        raise DymoeError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        DymoeError: the file is missing or is not JSON; the message names it and the line.
    """
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DymoeError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DymoeError(f"{path}: cannot be read ({error})") from error
    except json.JSONDecodeError as error:
        raise DymoeError(f"{path}: not valid JSON (line {error.lineno}: {error.msg})") from error
