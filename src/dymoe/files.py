"""Atomic writes: a file or folder is either there in full or not there at all."""

import ctypes
import errno
import hashlib
import json
import math
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, overload

from dymoe.errors import DymoeError
from dymoe.messages import brief
from dymoe.schema import check

T = TypeVar("T")

TEMPORARY = ".dymoe-tmp-"  # how the name of every unfinished file or folder begins; what has it, dymoe wrote


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
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=TEMPORARY)
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
    """Write `value` as indented JSON to `path`, atomically (see `atomic_write`).

    Raises:
        DymoeError: the file cannot be written, or a number in it is not finite (see `json_text`).
    """
    atomic_write(path, json_text(value, path, indent=1) + "\n")


def json_text(value: Any, where: str | Path, indent: int | None = None) -> str:
    """`value` as JSON text, on one line unless `indent` is given.

    Raises:
        DymoeError: a number is infinite or not a number, which JSON does not have; the message names its key.
    """
    try:
        return json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    except ValueError:
        raise DymoeError(f"{where}: cannot be written: {_not_finite(value)} is not a finite number") from None


def _not_finite(value: Any, key: str = "") -> str | None:
    """Dotted key of the first number in nested values that is infinite or not a number."""
    if isinstance(value, float):
        return None if math.isfinite(value) else key or "the value"
    if not isinstance(value, Mapping | list | tuple):
        return None
    entries = value.items() if isinstance(value, Mapping) else enumerate(value)
    keys = (_not_finite(inner, f"{key}.{name}" if key else str(name)) for name, inner in entries)
    return next((name for name in keys if name), None)


@contextmanager
def atomic_dir(path: str | Path) -> Iterator[Path]:
    """Yield an empty folder that takes the place of `path` in one step when the block ends without an error.

    Whoever opens `path` meets the old folder or the new one, whole, at any time and after a kill at any time. Where the
    file system cannot exchange two names (some network file systems), replacing takes two renames, and a kill between
    them leaves the old folder beside `path`, below a name that begins with `TEMPORARY`.

    Raises:
        DymoeError: the folder cannot be written; nothing half-written is left and what stood at `path` stands there
            still.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=TEMPORARY, ignore_cleanup_errors=True) as room:
            new = Path(room) / "new"
            new.mkdir()
            yield new
            for file in new.rglob("*"):
                if file.is_file():
                    _flush(file)
            if not os.path.lexists(path):
                os.rename(new, path)
            elif not exchange(new, path):
                _replace(path, new, Path(room) / "old")
    except OSError as error:
        raise DymoeError(f"{path}: cannot be written ({error.strerror or error})") from error


def exchange(one: Path, other: Path) -> bool:
    """Let two paths of one file system change places in one step; False, and nothing done, where that is impossible.

    Raises:
        OSError: it is possible but failed.
    """
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # not Linux, or an older C library
        return False
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if rename(here, os.fsencode(one), here, os.fsencode(other), swap) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code))


def _replace(path: Path, new: Path, aside: Path) -> None:
    """Put `new` where `path` is by two renames."""
    os.rename(path, aside)
    try:
        os.rename(new, path)
    except OSError:
        os.rename(aside, path)
        raise


def _flush(file: Path) -> None:
    """See a file written to disk."""
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def reason(error: BaseException, path: Path) -> str:
    """Why writing below `path` failed: what the operating system says, also where a library hides that.

    torch tells of a full disk as "unexpected pos 98048 vs 97936".
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return os.strerror(errno.ENOSPC) if free_space(path)[1] < 2**20 else " ".join(str(error).split())


def free_space(path: str | Path) -> tuple[Path, int]:
    """What exists of `path` (itself or the nearest folder above it), and the bytes free on that disk."""
    path = Path(path).absolute()
    there = next(parent for parent in (path, *path.parents) if parent.exists())
    return there, shutil.disk_usage(there).free


def expand(path: str | Path) -> Path:
    """A path whose leading ``~`` stands for a home folder; one of a user that is not there stays as it is."""
    return Path(os.path.expanduser(path))


def cache_root(folder: str | Path | None = None) -> Path:
    """Where everything is cached: `folder`, else the environment's DYMOE_CACHE, else ~/.cache/dymoe."""
    return expand(folder if folder is not None else os.environ.get("DYMOE_CACHE") or "~/.cache/dymoe")


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@overload
def read_json(path: str | Path) -> Any: ...


@overload
def read_json(path: str | Path, kind: type[T]) -> T: ...


def read_json(path: str | Path, kind: Any = Any) -> Any:
    """The value of a JSON file, of the type `kind` (see `dymoe.schema.check`; any by default).

    Raises:
        DymoeError: the file is missing, is not JSON, or holds something else; the message names it and the line or key.
    """
    return parse_json(read_bytes(path), str(path), kind)


def read_json_lines(path: str | Path, kind: type[T]) -> Iterator[T]:
    """The values of a file of JSON lines, each of the type `kind`.

    Raises:
        DymoeError: as `read_json`, naming the line.
    """
    # Lines end with a newline and nothing else: a text may hold other characters that count as line ends.
    data = read_bytes(path)
    for number, line in enumerate(data.removesuffix(b"\n").split(b"\n") if data else (), start=1):
        yield parse_json(line, f"{path}: line {number}", kind)


def read_bytes(path: str | Path, most: int | None = None) -> bytes:
    """The bytes of a file; of a plain one alone, since a pipe or a device may never end.

    Args:
        path: the file.
        most: the size in bytes above which it is refused.

    Raises:
        DymoeError: it is missing, no plain file, too large, or cannot be read.
    """
    try:
        with open(Path(path), "rb", opener=_without_waiting) as file:
            about = os.fstat(file.fileno())
            if not stat.S_ISREG(about.st_mode):
                raise DymoeError(f"{path}: cannot be read (it is no plain file)")
            if most is not None and about.st_size > most:
                raise DymoeError(f"{path}: cannot be read (it has {about.st_size} bytes, at most {most} are read)")
            return file.read()
    except FileNotFoundError:
        raise DymoeError(f"{path}: no such file") from None
    except DymoeError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise DymoeError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error


def _without_waiting(path: str, flags: int) -> int:
    """Opening a pipe waits for somebody to write to it, unless told not to."""
    return os.open(path, flags | os.O_NONBLOCK)


@overload
def parse_json(data: bytes, where: str) -> Any: ...


@overload
def parse_json(data: bytes, where: str, kind: type[T]) -> T: ...


def parse_json(data: bytes, where: str, kind: Any = Any) -> Any:
    """The value of a JSON text, of the type `kind`; `where` is what messages call it.

    Raises:
        DymoeError: it is not JSON, has a key twice or a number that is none, is nested too deeply, no UTF-8, plainly
            another kind of file, or another value than `kind`.
    """
    try:
        value = json.loads(data, object_pairs_hook=unique_keys, parse_constant=_no_number, parse_float=_float)
    except (ValueError, RecursionError) as error:
        if instead := not_itself(data):
            raise DymoeError(f"{where}: {instead}") from None
        if isinstance(error, json.JSONDecodeError):
            line = f"line {error.lineno}, " if b"\n" in data.strip() else ""
            reason = f"not valid JSON ({line}column {error.colno}: {error.msg})"
        elif isinstance(error, RecursionError):
            reason = "not usable JSON (nested too deeply)"
        else:  # no UTF-8, a key that is there twice, or a number with thousands of digits
            reason = f"not usable JSON ({error})"
        raise DymoeError(f"{where}: {reason}") from error
    return value if kind is Any else check(value, kind, where)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs, for `json`'s `object_pairs_hook`.

    Raises:
        ValueError: a key is there twice.
    """
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in values if names.count(name) > 1)
        raise ValueError(f"the key {brief(twice)} is there twice")
    return values


def _no_number(word: str) -> float:
    raise ValueError(f"{word} is no number of JSON")


def _float(digits: str) -> float:
    number = float(digits)
    return number if math.isfinite(number) else _no_number(brief(digits))


_POINTER = (b"version https://git-lfs", "a Git LFS pointer, not the file itself; fetch it with `git lfs pull`")
_PACKED = (
    (b"PK\x03\x04", "a zip archive; unpack it"),
    (b"\x1f\x8b", "packed with gzip; unpack it"),
    (b"<!doctype", "a web page, not the file itself; fetch it again"),
    (b"<html", "a web page, not the file itself; fetch it again"),
)


def not_itself(data: bytes, packed: bool = True) -> str | None:
    """What a file is that should be something else, by its first bytes: "is a Git LFS pointer ..", "is empty" ..

    Args:
        data: the file, or its beginning.
        packed: whether archives and web pages are told too; torch's own files are zip archives.

    Returns:
        The end of a message, None where the bytes say nothing.
    """
    head = data[:64].lstrip().lower()
    if not head and len(data) < 64:
        return "is empty"
    for mark, what in (_POINTER, *(_PACKED if packed else ())):
        if head.startswith(mark.lower()):
            return f"is {what}"
    return None
