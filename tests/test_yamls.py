"""YAML as dymoe reads it: strict, bounded, and every mistake one line with the line in the file."""

import os
import random

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dymoe.errors import DymoeError
from dymoe.yamls import BYTES, dump_yaml, parse_yaml, read_yaml

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
CHAIN = "a0: &a0 [1]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 400))


@pytest.mark.parametrize(
    "text, message",
    [
        ("a: 1\nb: 2\na: 3", "line 3: the key 'a' is there twice"),
        ("- {b: {c: 1, c: 1}}", "line 1: the key 'c' is there twice"),
        ("a: &x {l: 1}\nb: {<<: *x, l: 2}", "line 2: the key 'l' is there twice"),
        ("b: {<<: {l: 1}, <<: {m: 2}}", "line 1: the key '<<' is there twice"),
        ("a: {<<: [{l: 1}, {l: 2}]}", "line 1: the key 'l' is there twice"),
        ("true: 1\nyes: 2", "line 2: the key True is there twice"),
        (BOMB, "more than 50000 values"),
        ("a: {<<: [1]}", "line 1: the key '<<' takes mappings alone"),
        (CHAIN, "nested more than 50 deep"),
        ("&a [*a]", "line 1: an alias stands in what it stands for"),
        ("a: &b {c: [*b]}", "line 1: an alias stands in what it stands for"),
        ("[" * 5000, "line 1: nested more than 50 deep"),
        ("{a: " * 5000, "line 1: nested more than 50 deep"),
        ("- " * 5000, "line 1: nested more than 50 deep"),
        ("- a\n" * 60_000, "line 50000: more than 50000 values"),
        ("seed: !!int abc", "line 1: 'abc' is no int"),
        ("a: 1\nseed: !!int ''", "line 2: '' is no int"),
        ("x: !!float abc", "line 1: 'abc' is no float"),
        ("x: !!bool maybe", "line 1: 'maybe' is no bool"),
        ("x: !!map [1]", "line 1: expected a mapping node"),
        ("x: " + "9" * 5000, "(5002 characters) is no int"),
        ("x: 0x" + "f" * 9000, "a number of more than 1000 digits"),
        ('x: "\\ud800"', r"'\ud800' holds half a surrogate pair"),
        ('x: "a\\0b"', "a text with the character NUL"),
        ("x: !!python/object/apply:os.system [ls]", "the tag 'tag:yaml.org,2002:python/object/apply:os.system'"),
        ("x: !mine 1", "the tag '!mine' is of no plain value"),
        ("x: !!timestamp 2024-13-45", "the tag 'tag:yaml.org,2002:timestamp'"),
        ("a: 1\n---\nb: 2", "line 2: expected a single document in the stream"),
        ("? [a]\n: 1", "found unhashable key"),
        ("a: *nowhere", "found undefined alias 'nowhere'"),
        ("a: *" + "n" * 100_000, "characters)"),
        ("a: [1", "line 1: "),
        ("\x1b[2J: 1", "#x001b"),
        (b"a: \xff", "byte 3 is not UTF-8"),
        ("a: 1".encode("utf-16"), "byte 0 is not UTF-8"),
    ],
)
def test_what_is_refused_is_told_in_one_short_line(text, message):
    with pytest.raises(DymoeError) as caught:
        parse_yaml(text, "f.yaml")
    told = str(caught.value)
    assert told.startswith("f.yaml: ")
    assert message in told
    assert len(told) < 300
    assert "\n" not in told


def test_what_is_taken():
    text = "a: &x {l: [1, 2.5], on: yes}\nb: *x\nc: {<<: *x, m: 2}\nd: 2024-13-45\ne: 2e-05\n"
    text += "f: '\\ud800'\ng: \"\\ud83d\\ude00\"\nh: ="
    value = {"l": [1, 2.5], True: True}
    expected = {"a": value, "b": value, "c": {**value, "m": 2}, "d": "2024-13-45", "e": "2e-05"}
    assert parse_yaml(text.encode("utf-8-sig"), "f") == {**expected, "f": "\\ud800", "g": "\U0001f600", "h": "="}
    assert parse_yaml("", "f") is None


@pytest.mark.parametrize("name", ["pipe", "/dev/zero", "loop", "folder", "missing", "a\0b", "x" * 300, "big"])
def test_only_plain_files_of_a_size_that_people_write_are_read(tmp_path, name):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "folder").mkdir()
    (tmp_path / "big").write_bytes(b"#" * (BYTES + 1))
    with pytest.raises(DymoeError, match=r"^[^\n]*: (no such file|cannot be read \([^\n]+\))$"):
        read_yaml(tmp_path / name)


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("abc:<>- \n'\"", max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(plain)
def test_plain_values_are_read_back(value):
    text = dump_yaml(value)
    if "\\0" not in text:
        assert parse_yaml(text, "f") == value


@pytest.mark.parametrize("seed, count", [(7, 1500), pytest.param(8, 10_000, marks=pytest.mark.slow)])
def test_nothing_but_the_one_error_comes_of_broken_text(seed, count):
    """Pieces of YAML thrown together, seeded: read as PyYAML reads them, or one line."""
    pieces = [
        "a",
        "b: ",
        "- ",
        "\n",
        "  ",
        "{",
        "}",
        "[",
        "]",
        ",",
        ": ",
        "? ",
        "&x ",
        "*x",
        "<<: ",
        "!!int ",
        "!!set ",
    ]
    pieces += [
        "!!float ",
        "'",
        '"',
        "\\ud800",
        "|\n",
        "#",
        "---\n",
        "...\n",
        "%YAML 1.1\n",
        "1e5",
        "0x",
        "1:2",
        "~",
        "=",
        "\t",
    ]
    draw = random.Random(seed)
    taken = 0
    for _ in range(count):
        text = "".join(draw.choices(pieces, k=draw.randrange(1, 14)))
        told, value = "", None
        try:
            value = parse_yaml(text, "f.yaml")
        except DymoeError as error:
            told = str(error)
        if told:
            assert told.startswith("f.yaml: "), text
            assert "\n" not in told, text
        else:
            taken += 1
            if "=" not in text and "<<" not in text:
                assert value == yaml.safe_load(text), text
    assert taken > 100
