"""Plain values, as YAML and JSON give them, against Python's type hints; a mistake names its key."""

import dataclasses
import math
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, NoReturn, TypeVar, Union

from dymoe.errors import DymoeError
from dymoe.messages import brief, shorten

T = TypeVar("T")
DEPTH = 50  # how deep values of any kind may be nested
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


@dataclass(frozen=True)
class Range:
    """Which values a number may have, in ``Annotated[float, Range(0, 100)]``.

    Attributes:
        low: the least value.
        high: the largest value.
        above: whether `low` itself is left out.
        below: whether `high` itself is left out.
    """

    low: float
    high: float = math.inf
    above: bool = False
    below: bool = False

    def __contains__(self, number: float) -> bool:
        """Whether a number lies in the range."""
        return (self.low < number if self.above else self.low <= number) and (
            number < self.high if self.below else number <= self.high
        )

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"{'above' if self.above else 'from'} {self.low}"
        if self.above or self.below:
            return f"in {'(' if self.above else '['}{self.low}, {self.high}{')' if self.below else ']'}"
        return f"from {self.low} to {self.high}"


Count = Annotated[int, Range(0)]
Size = Annotated[int, Range(1)]
Weight = Annotated[float, Range(0)]
Positive = Annotated[float, Range(0, above=True)]
Percent = Annotated[float, Range(0, 100)]
Share = Annotated[float, Range(0, 1)]
PositiveShare = Annotated[float, Range(0, 1, above=True)]  # all of it, not nothing
LesserShare = Annotated[float, Range(0, 1, below=True)]  # nothing of it, not all
ProperShare = Annotated[float, Range(0, 1, above=True, below=True)]


def check(value: Any, kind: type[T], where: str, key: str = "", texts: bool = False) -> T:
    """`value` as the type hint `kind` says it is; whole numbers become floats where a float is hinted.

    Args:
        value: of dicts, lists, texts, numbers, booleans and None.
        kind: of int, float, bool, str, None, Any, Literal, list, tuple, dict, unions of them, numbers with a
            `Range`, and TypedDicts, whose further keys pass unchecked.
        where: file or source, for the message.
        key: where `value` stands in it; entries of lists are counted from 1.
        texts: whether a text that spells a number or a boolean is one (``2e-05`` is a text to YAML 1.1).

    Raises:
        DymoeError: the first value of another type, a key that is missing; one line.
    """
    try:
        return typing.cast(T, fit(value, kind, key, texts))
    except DymoeError as error:
        raise DymoeError(f"{where}: {error}") from None


def check_fields(settings: Any, cls: type | None = None) -> None:
    """Refuse a dataclass's value that its field's hint does not allow; fields that are dataclasses check themselves.

    Args:
        settings: the instance.
        cls: a base class whose fields alone are checked.

    Raises:
        DymoeError: naming the field, what was expected and the value.
    """
    for name, kind in field_types(cls or type(settings)).items():
        if not dataclasses.is_dataclass(kind):
            fit(getattr(settings, name), kind, name.removesuffix("_"))


@cache
def field_types(cls: type) -> dict[str, Any]:
    """The type hint of every field that the dataclass `cls` is made from, ranges included."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def fit(value: Any, kind: Any, key: str, texts: bool = False) -> Any:
    """As `check`, without a name of the source in messages."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return _bounded(value, key, DEPTH)
    if origin in (Union, types.UnionType):
        return _one_of(value, kind, key, texts)
    if origin in (list, tuple) and isinstance(value, list | tuple):
        return origin(fit(item, arguments[0], _join(key, n), texts) for n, item in enumerate(value, start=1))
    if origin is dict and isinstance(value, Mapping):
        for name in value:
            if not isinstance(name, str):
                raise DymoeError(f"{_named(key)}: expected texts as keys, got {brief(name)}")
        return {name: fit(item, arguments[1], _join(key, name), texts) for name, item in value.items()}
    if typing.is_typeddict(kind) and isinstance(value, Mapping):
        return _keys(value, kind, key, texts)
    result = _spelled(value) if texts else value
    if kind is None or kind is type(None):
        good = value is None
    elif origin is Literal:
        result, good = value, any(value == option and type(value) is type(option) for option in arguments)
    elif kind in (bool, str):
        result = value if kind is str else result
        good = isinstance(result, kind)
    else:
        result, good = _number(result, kind) if kind in (int, float) or origin is Annotated else (value, False)
    if not good:
        refuse(value, kind, key)
    return result


def _number(value: Any, kind: Any) -> tuple[Any, bool]:
    """A number as `kind`, and whether it is one."""
    kind, bounds = typing.get_args(kind) if typing.get_origin(kind) is Annotated else (kind, None)
    takes = {int: (int,), float: (int, float)}[kind]
    if isinstance(value, bool) or not isinstance(value, takes):
        return value, False
    try:
        number = kind(value)
        return number, bounds is None or number in bounds
    except OverflowError:  # a whole number that no float holds
        return value, False


def _one_of(value: Any, kind: Any, key: str, texts: bool) -> Any:
    """The value as the first alternative that takes it; where one alone could, its own message."""
    options = typing.get_args(kind)
    if value is None and type(None) in options:
        return None
    for option in options:
        try:
            return fit(value, option, key, texts)
        except DymoeError:
            if isinstance(value, list | Mapping) and _container(option) is type(value):
                raise
    refuse(value, kind, key)


def _container(kind: Any) -> Any:
    return dict if typing.is_typeddict(kind) else typing.get_origin(kind)


def _keys(value: Mapping[str, Any], kind: Any, key: str, texts: bool) -> dict[str, Any]:
    hints = _hints(kind)
    for name, hint in hints.items():
        if name in kind.__required_keys__ and name not in value:
            raise DymoeError(f"{_named(_join(key, name))}: is missing; expected {type_name(hint)}")
    return {name: fit(item, hints.get(name, Any), _join(key, name), texts) for name, item in value.items()}


@cache
def _hints(kind: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(kind, include_extras=True)
    bare = {name: typing.get_args(hint)[0] if _optional(hint) else hint for name, hint in hints.items()}
    return bare


def _optional(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.NotRequired, typing.Required)


def _bounded(value: Any, key: str, depth: int) -> Any:
    """Any value that is not nested too deeply."""
    if depth == 0:
        raise DymoeError(f"{_named(key)}: nested more than {DEPTH} deep")
    if isinstance(value, list | Mapping):
        for item in value.values() if isinstance(value, Mapping) else value:
            _bounded(item, key, depth - 1)
    return value


def _spelled(value: Any) -> Any:
    """The number or boolean that a text spells, else the value itself."""
    if not isinstance(value, str) or len(value) > 400:
        return value
    if _NUMBER.fullmatch(value):
        return int(value) if value.lstrip("+-").isdigit() else float(value)
    return _WORDS.get(value.lower(), value)


def refuse(value: Any, kind: Any, key: str) -> NoReturn:
    """Say what was expected and what came.

    Raises:
        DymoeError: always.
    """
    raise DymoeError(f"{_named(key)}: expected {type_name(kind)}, got {'nothing' if value is None else brief(value)}")


def _join(key: str, name: object) -> str:
    return f"{key}.{shorten(str(name))}" if key else shorten(str(name))


def _named(key: str) -> str:
    return key or "the file"


def type_name(kind: Any) -> str:
    """A type as a reader says it: 'int or nothing', 'one of bfloat16, float32', 'a list of str'."""
    arguments = typing.get_args(kind)
    if kind is type(None):
        return "nothing"
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if typing.get_origin(kind) is Annotated:
        return f"{'a number' if arguments[0] is float else 'a whole number'} {arguments[1]}"
    if typing.get_origin(kind) in (list, tuple):
        return f"a list of {type_name(arguments[0])}" if arguments else "a list"
    if dict in (kind, typing.get_origin(kind)) or typing.is_typeddict(kind):
        return "a mapping of keys"
    if arguments:
        return " or ".join(type_name(argument) for argument in arguments)
    return getattr(kind, "__name__", str(kind))
