"""Typed settings: a dataclass filled from plain values, every mistake told in one line that names the key."""

import dataclasses
import typing
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from dymoe.errors import DymoeError
from dymoe.messages import brief, nearest, shorten
from dymoe.numbers import WORKABLE, workable
from dymoe.schema import field_types, fit, refuse, type_name

T = TypeVar("T")


def keys(cls: type, prefix: str = "") -> list[str]:
    """All dotted keys of the dataclass `cls`, nested dataclasses opened."""
    result: list[str] = []
    for name, kind in _fields(cls).items():
        nested = dataclasses.is_dataclass(kind)
        result += keys(typing.cast(type, kind), f"{prefix}{name}.") if nested else [prefix + name]
    return result


def build(cls: type[T], values: Mapping[str, Any], where: str, prefix: str = "") -> T:
    """Make the dataclass `cls` from nested plain values, types checked by `dymoe.schema`.

    Args:
        cls: a dataclass; fields that are dataclasses are filled from nested mappings.
        values: what a YAML file or the command line holds.
        where: file or source the messages name, for example ``recipes/pocket/dymoe.yaml``.
        prefix: key under which `values` stands there, with its dot (``settings.``), for the messages.

    Raises:
        DymoeError: an unknown key (the nearest right one is named), a value of a wrong type or out of range.
    """
    try:
        _refuse_unknown(cls, values, prefix)
        return _construct(cls, values, prefix)
    except DymoeError as error:
        raise DymoeError(f"{where}: {error}") from None


def _construct(cls: type[T], values: Mapping[str, Any], prefix: str) -> T:
    """Nested dataclasses from values of known keys; a range error inside one is prefixed with its key."""
    arguments: dict[str, Any] = {}
    attributes = {field.name.removesuffix("_"): field.name for field in dataclasses.fields(typing.cast(Any, cls))}
    for name, kind in _fields(cls).items():
        if dataclasses.is_dataclass(kind):
            arguments[attributes[name]] = _construct(typing.cast(type, kind), values.get(name, {}), f"{prefix}{name}.")
        elif name in values:
            value = fit(values[name], kind, f"{prefix}{name}", texts=True)
            _refuse_unworkable(value, f"{prefix}{name}")
            arguments[attributes[name]] = value
    try:
        return cls(**arguments)
    except DymoeError as error:
        raise DymoeError(f"{prefix}{error}") from None


def _arguments(cls: type, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted key, type and default of everything in `cls`."""
    for field in dataclasses.fields(cls):
        key = field.name.removesuffix("_")
        kind = _fields(cls).get(key)
        if kind is None:
            continue
        if dataclasses.is_dataclass(kind):
            yield from _arguments(typing.cast(type, kind), f"{prefix}{key}.")
            continue
        default = field.default_factory() if callable(field.default_factory) else field.default
        yield f"{prefix}{key}", kind, default


def _refuse_unworkable(value: Any, key: str) -> None:
    """Refuse a number that is not finite, or so large or small that nothing can be computed with it."""
    if isinstance(value, int) and abs(value) >= 2**63:
        raise DymoeError(f"{key}: expected a whole number below 2^63 in size, got {brief(value)}")
    if isinstance(value, float) and not workable(value):
        raise DymoeError(f"{key}: expected {WORKABLE}, got {brief(value)}")
    if isinstance(value, Mapping | list | tuple):
        entries = value.items() if isinstance(value, Mapping) else enumerate(value, start=1)
        for name, inner in entries:
            _refuse_unworkable(inner, f"{key}.{name}")


def _fields(cls: type) -> dict[str, Any]:
    """Key -> type; a field that Python's keywords forbid has a trailing underscore (with_), its key has none."""
    return {name.removesuffix("_"): kind for name, kind in field_types(cls).items()}


def _refuse_unknown(cls: type, values: Any, prefix: str) -> None:
    """Walk `values` beside the dataclass and refuse the first key that it does not have."""
    if not isinstance(values, Mapping):
        refuse(values, dict, prefix.rstrip("."))
    fields = _fields(cls)
    for key, value in values.items():
        if key not in fields:
            options = sorted({prefix + name for name in fields} | set(keys(cls, prefix)))
            word = shorten(str(key))
            raise DymoeError(f"{prefix}{word}: unknown key; {nearest(f'{prefix}{word}', options)}")
        if dataclasses.is_dataclass(fields[key]):
            _refuse_unknown(typing.cast(type, fields[key]), value, f"{prefix}{key}.")


def describe(cls: type) -> list[tuple[str, str, str]]:
    """Dotted key, type and default of everything that the dataclass `cls` holds, as words for a help text."""
    rows = []
    for key, kind, default in _arguments(cls):
        shown = "none" if default is None else "" if default in ("", [], {}) else str(default)
        rows.append((key, type_name(kind), shown))
    return rows
