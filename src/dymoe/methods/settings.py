"""Typed settings: a dataclass filled from plain values, every mistake told in one line that names the key."""

import dataclasses
import difflib
import re
import typing
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from dymoe.errors import DymoeError
from dymoe.numbers import WORKABLE, workable

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

T = TypeVar("T")


def nearest(name: str, options: Iterable[str]) -> str:
    """The end of an error message: the option most like `name`, else the options there are.

    >>> nearest("tua", ["tau", "top_k"])
    'did you mean tau?'
    """
    options = sorted(options)
    last = {option.rsplit(".", 1)[-1]: option for option in options}
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    if not close:
        close = [last[match] for match in difflib.get_close_matches(name.rsplit(".", 1)[-1], last, n=1)]
    if close:
        return f"did you mean {close[0]}?"
    return f"there is {', '.join(options)}" if options else "there is none"


def keys(cls: type, prefix: str = "") -> list[str]:
    """All dotted keys of the dataclass `cls`, nested dataclasses opened."""
    found: list[str] = []
    for name, kind in _fields(cls).items():
        nested = dataclasses.is_dataclass(kind)
        found += keys(typing.cast(type, kind), f"{prefix}{name}.") if nested else [prefix + name]
    return found


def build(cls: type[T], values: Mapping[str, Any], where: str, prefix: str = "") -> T:
    """Make the dataclass `cls` from nested plain values, types checked by jsonargparse.

    Args:
        cls: a dataclass; fields that are dataclasses are filled from nested mappings.
        values: what a YAML file or the command line holds.
        where: file or source the messages name, for example ``recipes/pocket/dymoe.yaml``.
        prefix: key under which `values` stands there, with its dot (``settings.``), for the messages.

    Raises:
        DymoeError: an unknown key (the nearest right one is named), a value of a wrong type or out of range.
    """
    from jsonargparse import ArgumentError

    _refuse_unknown(cls, values, where, prefix)
    parser = parser_of(typing.cast(type, cls))
    try:
        return _construct(cls, parser.parse_object(dict(_leaves(cls, values))).as_dict())
    except ArgumentError as error:
        raise DymoeError(f"{where}: {_explain(cls, values, str(error), prefix)}") from None
    except DymoeError as error:
        raise DymoeError(f"{where}: {prefix}{error}") from None


@cache
def parser_of(cls: type) -> "ArgumentParser":
    """A jsonargparse parser with one typed argument for every dotted key of the dataclass `cls`.

    Made once per class: a sweep builds hundreds of recipes, and making the parser costs more than using it.
    """
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False, add_help=False)
    for key, kind, default in _arguments(cls):
        parser.add_argument(f"--{key}", type=kind, default=default)
    return parser


def _arguments(cls: type, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    for field in dataclasses.fields(cls):
        key = field.name.removesuffix("_")
        kind = _fields(cls).get(key)
        if kind is None:
            continue
        if dataclasses.is_dataclass(kind):
            yield from _arguments(typing.cast(type, kind), f"{prefix}{key}.")
            continue
        made = field.default_factory() if callable(field.default_factory) else field.default
        yield f"{prefix}{key}", kind, made


def _leaves(cls: type, values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of everything set in `values`."""
    for key, value in values.items():
        kind = _fields(cls)[key]
        if dataclasses.is_dataclass(kind):
            yield from _leaves(typing.cast(type, kind), value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _construct(cls: type[T], parsed: Mapping[str, Any], key: str = "") -> T:
    """Nested dataclasses from parsed values; a range error inside one is prefixed with its key."""
    made = {}
    attributes = {field.name.removesuffix("_"): field.name for field in dataclasses.fields(typing.cast(Any, cls))}
    for name, kind in _fields(cls).items():
        nested = dataclasses.is_dataclass(kind)
        value = _construct(typing.cast(type, kind), parsed[name], name) if nested else parsed[name]
        made[attributes[name]] = value
    try:
        _refuse_unworkable({name: made[attributes[name]] for name in _fields(cls)})
        return cls(**made)
    except DymoeError as error:
        raise DymoeError(f"{key}.{error}" if key else str(error)) from None


def _refuse_unworkable(value: Any, key: str = "") -> None:
    """Refuse a number that is not finite, or so large or small that nothing can be computed with it."""
    if isinstance(value, float) and not workable(value):
        raise DymoeError(f"{key}: expected {WORKABLE}, got {value!r}")
    if isinstance(value, Mapping | list | tuple):
        entries = value.items() if isinstance(value, Mapping) else enumerate(value)
        for name, inner in entries:
            _refuse_unworkable(inner, f"{key}.{name}" if key else str(name))


def _fields(cls: type) -> dict[str, Any]:
    """Key -> type; a field that Python's keywords forbid has a trailing underscore (with_), its key has none."""
    hints = typing.get_type_hints(cls)
    return {field.name.removesuffix("_"): hints[field.name] for field in dataclasses.fields(cls) if field.init}


def _refuse_unknown(cls: type, values: Any, where: str, prefix: str) -> None:
    """Walk `values` beside the dataclass and refuse the first key that it does not have."""
    if not isinstance(values, Mapping):
        found = f"got {values!r}"
        raise DymoeError(f"{where}: {prefix.rstrip('.') or 'the file'}: expected a mapping of keys, {found}")
    fields = _fields(cls)
    for key, value in values.items():
        if key not in fields:
            options = {prefix + name for name in fields} | set(keys(cls, prefix))
            raise DymoeError(f"{where}: {prefix}{key}: unknown key; {nearest(f'{prefix}{key}', options)}")
        if dataclasses.is_dataclass(fields[key]):
            _refuse_unknown(typing.cast(type, fields[key]), value, where, f"{prefix}{key}.")


def _explain(cls: type, values: Mapping[str, Any], message: str, prefix: str) -> str:
    """One line from jsonargparse's message: the key, the type expected, the value given."""
    match = re.search(r'key "([\w.]+)"', message)
    if match is None:
        return " ".join(message.split())
    kind: Any = cls
    value: Any = values
    for part in match[1].split("."):
        kind = _fields(typing.cast(type, kind)).get(part) if dataclasses.is_dataclass(kind) else None
        value = value.get(part) if isinstance(value, Mapping) else value
    return f"{prefix}{match[1]}: expected {_type_name(kind)}, got {value!r}"


def _type_name(kind: Any) -> str:
    """A type as a reader says it: 'int or none', 'one of bfloat16, float32', 'list of str'."""
    arguments = typing.get_args(kind)
    if kind is type(None):
        return "nothing"
    if typing.get_origin(kind) is typing.Literal:
        return "one of " + ", ".join(map(str, arguments))
    if typing.get_origin(kind) in (list, tuple):
        return f"a list of {_type_name(arguments[0])}" if arguments else "a list"
    if typing.get_origin(kind) is dict:
        return "a mapping of keys"
    if arguments:
        return " or ".join(_type_name(argument) for argument in arguments)
    return getattr(kind, "__name__", str(kind))


def describe(cls: type) -> list[tuple[str, str, str]]:
    """Dotted key, type and default of everything that the dataclass `cls` holds, as words for a help text."""
    rows = []
    for key, kind, default in _arguments(cls):
        told = "none" if default is None else "" if default in ("", [], {}) else str(default)
        rows.append((key, _type_name(kind), told))
    return rows
