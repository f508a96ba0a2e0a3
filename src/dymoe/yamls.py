"""YAML of recipes, sweeps, streams and runs, read strictly: every mistake is one line with the file and the line."""

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError
from yaml.nodes import MappingNode, Node, SequenceNode

from dymoe.errors import DymoeError
from dymoe.files import read_bytes
from dymoe.messages import brief, shorten

BYTES = 2**20  # of a file
DEPTH = 50  # mappings and lists in one another
VALUES = 50_000  # with every alias counted as what it stands for
DIGITS = 1000  # of a whole number; one of 4300 could not even be shown
MERGE = "tag:yaml.org,2002:merge"
TAGS = ("null", "bool", "int", "float", "str", "seq", "map")


def read_yaml(path: str | Path) -> Any:
    """The value of a YAML file of plain values: texts, numbers, booleans, nothing, lists, mappings.

    Raises:
        DymoeError: the file is missing, no plain file, larger than `BYTES`, no UTF-8, or cannot be used (`parse_yaml`).
    """
    return parse_yaml(read_bytes(path, BYTES), str(path))


def parse_yaml(text: bytes | str, where: str) -> Any:
    """The value of a YAML text; `where` is what messages call it.

    Raises:
        DymoeError: it is not YAML, more than one document, has a key twice, a tag of another kind of value, a value
            that its tag does not fit, is nested too deeply or grows too large by its aliases.
    """
    try:
        loader = _Loader(text.decode("utf-8-sig") if isinstance(text, bytes) else text)
        return loader.get_single_data()
    except UnicodeDecodeError as error:
        raise DymoeError(f"{where}: cannot be read (byte {error.start} is not UTF-8)") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}: " if mark else ""
        reason = ", ".join(part for part in (error.context, error.problem) if part)
        raise DymoeError(f"{where}: not valid YAML ({line}{shorten(reason, 160)})") from None
    except (yaml.YAMLError, ValueError) as error:  # characters that YAML does not have
        reason = " ".join(str(error).split("\n  in ")[0].split())
        raise DymoeError(f"{where}: not valid YAML ({reason})") from None


def dump_yaml(value: Any) -> str:
    """The YAML text of plain values, keys in their order."""
    return str(yaml.safe_dump(value, sort_keys=False, allow_unicode=True))


class _Loader(yaml.SafeLoader):
    """PyYAML's loader in pure Python (the one in C recurses without a bound), with what it takes narrowed."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._level = self._values = 0

    def compose_node(self, parent: Node | None, index: int) -> Node | None:
        self._level, self._values = self._level + 1, self._values + 1
        if self._level > DEPTH or self._values > VALUES:
            raise _excess(self._level > DEPTH, self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self._level -= 1
        return node

    def compose_document(self) -> Node | None:
        node = super().compose_document()
        if node is not None:
            _measure(node, 1, {})
        return node

    def construct_object(self, node: Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
        except (ValueError, ArithmeticError, LookupError, TypeError, AttributeError):
            tag = node.tag.rpartition(":")[2]
            raise ConstructorError(None, None, f"{brief(node.value)} is no {tag}", node.start_mark) from None
        if isinstance(value, int) and abs(value) >= 10**DIGITS:
            raise ConstructorError(None, None, f"a number of more than {DIGITS} digits", node.start_mark)
        if isinstance(value, str):
            value = _text(value, node)
        return value

    def flatten_mapping(self, node: MappingNode) -> None:
        """Put the pairs of merged mappings beside the mapping's own; PyYAML lets one of a key hide the others."""
        pairs: list[tuple[Node, Node]] = []
        merges = [name for name, _ in node.value if name.tag == MERGE]
        if len(merges) > 1:
            raise ConstructorError(None, None, "the key '<<' is there twice", merges[1].start_mark)
        for name, value in node.value:
            if name.tag != MERGE:
                pairs.append((name, value))
                continue
            for part in value.value if isinstance(value, SequenceNode) else [value]:
                if not isinstance(part, MappingNode):
                    raise ConstructorError(None, None, "the key '<<' takes mappings alone", part.start_mark)
                self.flatten_mapping(part)
                pairs += part.value
        node.value = pairs

    def construct_mapping(self, node: MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys: set[Any] = set()
        if isinstance(node, MappingNode):
            self.flatten_mapping(node)
            for name, _ in node.value:
                key = self.construct_object(name, deep=True)
                if not isinstance(key, Hashable):
                    continue  # PyYAML itself refuses it
                if key in keys:
                    raise ConstructorError(None, None, f"the key {brief(key)} is there twice", name.start_mark)
                keys.add(key)
        return super().construct_mapping(node, deep)


def _text(value: str, node: Node) -> str:
    """A text whose escaped surrogates are put together; one half of a pair is in no file and on no screen."""
    if "\0" in value:
        raise ConstructorError(None, None, "a text with the character NUL", node.start_mark)
    try:
        return value.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        raise ConstructorError(None, None, f"{brief(value)} holds half a surrogate pair", node.start_mark) from None


def _measure(node: Node, level: int, known: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    """How many values a node stands for and how deep they go, aliases followed.

    Args:
        node: where to begin.
        level: how deep it is.
        known: the measures of the nodes seen before; None of those that are open.

    Raises:
        ConstructorError: it contains itself, or exceeds `DEPTH` or `VALUES`.
    """
    measure = known.get(id(node))
    if measure is None:
        if id(node) in known:
            raise ConstructorError(None, None, "an alias stands in what it stands for", node.start_mark)
        if level > DEPTH:
            raise _excess(True, node.start_mark)
        known[id(node)] = None
        size, depth = 1, 1
        for child in _children(node):
            inner = _measure(child, level + 1, known)
            size, depth = size + inner[0], max(depth, 1 + inner[1])
            if size > VALUES:
                raise _excess(False, node.start_mark)
        measure = known[id(node)] = size, depth
    if level + measure[1] - 1 > DEPTH:
        raise _excess(True, node.start_mark)
    return measure


def _excess(deep: bool, mark: yaml.Mark) -> ConstructorError:
    return ConstructorError(
        None, None, f"nested more than {DEPTH} deep" if deep else f"more than {VALUES} values", mark
    )


def _children(node: Node) -> list[Node]:
    if isinstance(node, MappingNode):
        return [child for pair in node.value for child in pair]
    return node.value if isinstance(node, SequenceNode) else []


def _refuse_tag(loader: _Loader, node: Node) -> Any:
    raise ConstructorError(None, None, f"the tag {brief(node.tag)} is of no plain value", node.start_mark)


_Loader.yaml_constructors = {
    **{tag: make for tag, make in yaml.SafeLoader.yaml_constructors.items() if str(tag).rpartition(":")[2] in TAGS},
    None: _refuse_tag,
}
# A date stays a text: no key takes one, and many that look like one are none.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag == MERGE or tag.rpartition(":")[2] in TAGS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
