"""Writing is all or nothing, whatever ends the process and wherever."""

import errno
import os
import subprocess
import sys

import pytest

from dymoe import files
from dymoe.errors import DymoeError
from dymoe.files import TEMPORARY, atomic_dir, atomic_json, atomic_write, read_json, reason

# Replaces a folder; every file operation from the beginning on is counted, and the n-th ends the process.
REPLACE = """
import os, sys
from pathlib import Path
from dymoe.files import atomic_dir

last, seen = int(sys.argv[2]), 0
def count(event, arguments):
    global seen
    if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "ctypes.dlsym"):
        seen += 1
        if seen == last:
            os.write(1, event.encode())
            os._exit(9)
sys.addaudithook(count)
with atomic_dir(sys.argv[1]) as folder:
    for name in ("a", "b"):
        (folder / name).write_text("new")
"""


def content(folder):
    return {file.name: file.read_text() for file in folder.iterdir()}


def replaced_until(target, operation: int) -> str | None:
    """The operation before which the replacing process ended; None when it came to its own end."""
    done = subprocess.run(
        [sys.executable, "-c", REPLACE, str(target), str(operation)], capture_output=True, text=True, check=False
    )
    assert done.returncode in (0, 9), done.stderr
    return done.stdout if done.returncode else None


def test_a_kill_at_any_file_operation_leaves_the_old_folder_or_the_new_one(tmp_path):
    old, new = {"a": "old", "c": "old"}, {"a": "new", "b": "new"}
    seen, ended_at = [], []
    for operation in range(1, 60):
        target = tmp_path / str(operation) / "target"
        target.mkdir(parents=True)
        for name, text in old.items():
            (target / name).write_text(text)
        ended = replaced_until(target, operation)
        seen.append(content(target))
        assert all(rest.name.startswith(TEMPORARY) for rest in target.parent.iterdir() if rest != target)
        if ended is None:
            break
        ended_at.append(ended)
    assert ended is None
    assert seen[-1] == new
    assert [target.name for target in (tmp_path / str(operation)).iterdir()] == ["target"]
    change = seen.index(new)
    assert seen == [old] * change + [new] * (len(seen) - change)
    assert "os.rmdir" in ended_at[change:], "a kill while the old folder is removed is among them"


def test_a_folder_is_replaced_where_names_cannot_be_exchanged(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "exchange", lambda one, other: False)
    for text in ("old", "new"):
        with atomic_dir(tmp_path / "x") as folder:
            (folder / "a").write_text(text)
    assert content(tmp_path / "x") == {"a": "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_names_are_exchanged_in_one_step_or_not_at_all(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "other").write_text("file")
    if files.exchange(tmp_path / "one", tmp_path / "other"):
        assert (tmp_path / "one").read_text() == "file"
        assert (tmp_path / "other").is_dir()
    with pytest.raises(OSError, match="No such file"):
        files.exchange(tmp_path / "one", tmp_path / "missing")


def test_a_link_to_a_folder_is_replaced_and_what_it_led_to_stays(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "a").write_text("theirs")
    (tmp_path / "link").symlink_to("there")
    with atomic_dir(tmp_path / "link") as folder:
        (folder / "a").write_text("ours")
    assert content(tmp_path / "there") == {"a": "theirs"}
    assert content(tmp_path / "link") == {"a": "ours"}


def test_an_error_in_the_block_leaves_what_was_there(tmp_path):
    atomic_write(tmp_path / "x" / "a", "old")

    def write() -> None:
        with atomic_dir(tmp_path / "x") as folder:
            (folder / "a").write_text("half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(DymoeError, match=r"cannot be written \(No space left"):
        write()
    assert content(tmp_path / "x") == {"a": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_name_may_be_as_long_as_the_disk_allows(tmp_path):
    name = "n" * 255
    atomic_write(tmp_path / name, "text")
    assert (tmp_path / name).read_text() == "text"


@pytest.mark.parametrize(
    ("value", "key"),
    [
        ({"a": {"b": [1.0, float("nan")]}}, "a.b.1"),
        ({"loss": float("inf")}, "loss"),
        ([(1, -float("inf"))], "0.1"),
        (float("nan"), "the value"),
    ],
)
def test_json_has_finite_numbers_alone(tmp_path, value, key):
    atomic_json(tmp_path / "x.json", {"was": 1})
    with pytest.raises(DymoeError, match=rf"x\.json: cannot be written: {key} is not a finite number"):
        atomic_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json") == {"was": 1}


def test_the_reason_of_a_failed_write_is_the_operating_system_s(tmp_path, monkeypatch):
    hidden = RuntimeError("unexpected pos 98048\nvs 97936")
    hidden.__context__ = OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
    assert reason(hidden, tmp_path) == os.strerror(errno.EDQUOT)
    hidden.__context__ = None
    assert reason(hidden, tmp_path) == "unexpected pos 98048 vs 97936"
    monkeypatch.setattr(files, "free_space", lambda path: (path, 4096))
    assert reason(hidden, tmp_path) == "No space left on device"
