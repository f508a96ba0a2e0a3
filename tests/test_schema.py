"""Values of YAML and JSON against type hints: what is taken, and the one line that refuses the rest."""

import json
import os
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import pytest

from dymoe.errors import DymoeError
from dymoe.files import parse_json, read_bytes, read_json
from dymoe.messages import brief, one_line, printable
from dymoe.schema import Percent, Range, check


class Row(TypedDict):
    name: str
    matrix: list[list[Percent]]
    seed: Annotated[int, Range(0)]
    joint: NotRequired[list[Percent] | None]
    split: NotRequired[Literal["test", "validation"]]
    settings: NotRequired[dict[str, Any]]


GOOD = {"name": "a", "matrix": [[50], [60.5, 100]], "seed": 3, "further": [{"anything": None}]}


def test_what_fits_is_handed_on_and_whole_numbers_become_floats():
    row = check({**GOOD, "joint": None}, Row, "f.json")
    assert row == {**GOOD, "joint": None}
    assert isinstance(row["matrix"][0][0], float)


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    "change, message",
    [
        ({"matrix": [[50], ["x"]]}, "matrix.2.1: expected a number from 0 to 100, got 'x'"),
        ({"matrix": [[True]]}, "matrix.1.1: expected a number from 0 to 100, got True"),
        ({"matrix": [[101]]}, "matrix.1.1: expected a number from 0 to 100, got 101"),
        ({"matrix": [[-0.5]]}, "matrix.1.1: expected a number from 0 to 100, got -0.5"),
        ({"matrix": [[float("nan")]]}, "matrix.1.1: expected a number from 0 to 100, got nan"),
        ({"matrix": [[10**400]]}, "matrix.1.1: expected a number from 0 to 100, got 1000"),
        ({"matrix": [5]}, "matrix.1: expected a list of a number from 0 to 100, got 5"),
        ({"matrix": None}, "matrix: expected a list of a list of a number from 0 to 100, got nothing"),
        ({"name": 5}, "name: expected str, got 5"),
        ({"name": None}, "name: expected str, got nothing"),
        ({"seed": 1.0}, "seed: expected a whole number from 0, got 1.0"),
        ({"seed": "3"}, "seed: expected a whole number from 0, got '3'"),
        ({"seed": False}, "seed: expected a whole number from 0, got False"),
        ({"joint": [None]}, "joint.1: expected a number from 0 to 100, got nothing"),
        ({"joint": 5}, "joint: expected a list of a number from 0 to 100 or nothing, got 5"),
        ({"split": "train"}, "split: expected one of test, validation, got 'train'"),
        ({"split": ["test"]}, "split: expected one of test, validation, got ['test']"),
        ({"settings": [1]}, "settings: expected a mapping of keys, got [1]"),
        ({"settings": {"a": deep(60)}}, "settings.a: nested more than 50 deep"),
        ({"further": deep(60)}, "further: nested more than 50 deep"),
        ({"name": "x" * 100_000, "seed": "y" * 100_000}, "(100002 characters)"),
    ],
)
def test_what_does_not_fit_is_one_short_line_that_names_the_key(change, message):
    with pytest.raises(DymoeError) as caught:
        check({**GOOD, **change}, Row, "f.json")
    told = str(caught.value)
    assert told.startswith("f.json: ")
    assert message in told
    assert len(told) < 200
    assert "\n" not in told


def test_a_missing_key_and_another_kind_of_value():
    with pytest.raises(DymoeError, match=r"^f.json: seed: is missing; expected a whole number from 0$"):
        check({"name": "a", "matrix": []}, Row, "f.json")
    with pytest.raises(DymoeError, match=r"^f.json: the file: expected a mapping of keys, got \[1\]$"):
        check([1], Row, "f.json")


def test_a_text_that_spells_a_number_is_one_only_where_that_is_asked_for():
    assert check("2e-05", float, "f", texts=True) == 2e-5
    assert check("7", int | None, "f", texts=True) == 7
    assert check("yes", bool, "f", texts=True) is True
    assert check("7", str, "f", texts=True) == "7"
    for text, kind in (("7.5", int), ("9" * 5000, int), ("nan", float), ("٣", int)):
        with pytest.raises(DymoeError):
            check(text, kind, "f", texts=True)


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"a": 1, "a": 2}', "the key 'a' is there twice"),
        ('[{"b": {"c": 1, "c": 1}}]', "the key 'c' is there twice"),
        ('{"a": NaN}', "NaN is no number of JSON"),
        ('{"a": -Infinity}', "-Infinity is no number of JSON"),
        ('{"a": 1e400}', "'1e400' is no number of JSON"),
        ('{"a": ' + "9" * 5000 + "}", "not usable JSON ("),
        ("[" * 100_000, "nested too deeply"),
        ('{"a": 1', "not valid JSON (column 8"),
        ("", "is empty"),
    ],
)
def test_a_text_that_is_no_json_of_ours(text, message):
    with pytest.raises(DymoeError) as caught:
        parse_json(text.encode(), "f.json")
    assert str(caught.value).startswith("f.json: ")
    assert message in str(caught.value)


def test_pairs_of_surrogates_and_a_mark_at_the_beginning_are_read():
    assert parse_json(b'\xef\xbb\xbf["\\ud83d\\ude00"]', "f") == ["\U0001f600"]


def test_only_plain_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "big").write_bytes(b"12345")
    for name, message in (
        ("pipe", "cannot be read (it is no plain file)"),
        ("loop", "cannot be read (Too many levels of symbolic links)"),
        ("a\0b", "cannot be read (embedded null byte)"),
        ("x" * 300, "cannot be read (File name too long)"),
        ("", "cannot be read (Is a directory)"),
        ("missing", "no such file"),
        ("big", "cannot be read (it has 5 bytes, at most 4 are read)"),
    ):
        with pytest.raises(DymoeError) as caught:
            read_bytes(tmp_path / name, most=4)
        assert str(caught.value).endswith(message), name
    with pytest.raises(DymoeError, match="no plain file"):
        read_bytes("/dev/zero")
    (tmp_path / "row.json").write_text(json.dumps({**GOOD, "seed": "x"}))
    with pytest.raises(DymoeError, match=r"row.json: seed: expected a whole number from 0, got 'x'$"):
        read_json(tmp_path / "row.json", Row)


def test_texts_of_others_obey_nothing_in_a_terminal():
    hostile = "a\x1b[31mred\x9b2J\x07\r\n\u202egnp.exe\u2066 \u200bz\udc80"
    assert printable(hostile) == (
        r"a\x1b[31mred\x9b2J\x07\r\n\u202egnp.exe\u2066 \u200bz\udc80"  # as a reader may copy it
    )
    plain = "Größe 画像 نص 👩\u200d🚀 [bold] 100 %"
    assert printable(plain) == plain
    assert one_line(ValueError("two\n  lines \x1b]0;x\x07")) == r"two lines \x1b]0;x\x07"


def test_a_long_value_is_cut_in_the_middle():
    assert brief("a" * 40) == repr("a" * 40)
    told = brief({"key": "b" * 100_000})
    assert told.startswith("{'key': 'bbb")
    assert told.endswith("bb'} (100011 characters)")
    assert len(told) < 90
    assert brief(16**10_000) == "a value of type int"
