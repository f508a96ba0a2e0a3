"""The one parser of command lines: words, options with their values, and keys of a recipe or a sweep."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from dymoe.errors import DymoeError
from dymoe.messages import brief, nearest

Kind = Callable[[str], Any] | None  # what reads an option's value, None for a flag


class Help(Exception):
    """A command's help is to be printed; `code` is the exit code: 2 where it was not asked for."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code


@dataclass
class Arguments:
    """The arguments of a command line.

    Attributes:
        words: those that belong to no option.
        options: by name; a flag's is True.
        keys: the words of options that are keys of a recipe, ``--training.lr 1e-3`` or ``--training.lr=1e-3``.
    """

    words: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    keys: list[str] = field(default_factory=list)

    def __contains__(self, option: str) -> bool:
        return option in self.options

    def __getitem__(self, option: str) -> Any:
        return self.options.get(option)


@dataclass(frozen=True)
class Command:
    """What a command takes.

    Attributes:
        name: as messages call it.
        help: its text.
        words: names of the words beside the options; with " ..." behind them the last one may stand there many times.
        options: option -> what reads its value; it raises a DymoeError that says what is expected.
        needed: options that must be there.
        repeated: options that may be there more than once; their values become a list.
        keys: module and dataclass whose keys are options too; they are listed below the help.
    """

    name: str
    help: str
    words: str = ""
    options: Mapping[str, Kind] = field(default_factory=dict)
    needed: tuple[str, ...] = ()
    repeated: tuple[str, ...] = ()
    keys: str = ""

    def parse(self, argv: Sequence[str]) -> Arguments:
        """Tell words, options and keys apart.

        Raises:
            DymoeError: an unknown option, one without its value, with a wrong one or given twice; or another number of
                words.
            Help: it is asked for, or nothing is given where something is needed.
        """
        if "-h" in argv or "--help" in argv or (not argv and (self.words or self.needed)):
            raise Help(self.help + self._keys(), 0 if argv else 2)
        arguments, rest = Arguments(), list(argv)
        while rest:
            word = rest.pop(0)
            option, equals, value = word.partition("=")
            if not word.startswith("--"):
                arguments.words.append(word)
            elif option in self.options:
                self._add(arguments, option, value if equals else None, rest)
            elif self.keys and (equals or (rest and not rest[0].startswith("--"))):
                arguments.keys += [word] if equals else [word, rest.pop(0)]
            else:
                raise DymoeError(f"{self.name}: {option}: {self._why_not(option)}")
        self._check(arguments)
        return arguments

    def _add(self, arguments: Arguments, option: str, value: str | None, rest: list[str]) -> None:
        """Take an option, with the next word as its value where that is not `value`."""
        where, kind = f"{self.name}: {option}", self.options[option]
        if option in arguments and option not in self.repeated:
            raise DymoeError(f"{where}: is there twice")
        if kind is None:
            if value is not None:
                raise DymoeError(f"{where}: takes no value")
            arguments.options[option] = True
            return
        if value is None:
            # An option's name is no value; a value that begins so is written --option=VALUE.
            if not rest or rest[0].partition("=")[0] in self.options:
                raise DymoeError(f"{where}: expected a value after it")
            value = rest.pop(0)
        try:
            read = kind(value)
        except DymoeError as error:
            raise DymoeError(f"{where}: {error}") from None
        arguments.options[option] = [*(arguments[option] or ()), read] if option in self.repeated else read

    def _check(self, arguments: Arguments) -> None:
        """Refuse another number of words, and needed options that are missing."""
        names = self.words.removesuffix(" ...").split()
        many = self.words.endswith("...")
        count = len(arguments.words)
        if count < len(names) or (count > len(names) and not many):
            expected = f"{' and '.join(names) or 'options alone'}{' (one or more)' if many else ''}"
            got = f"{count} words" if count != 1 else brief(arguments.words[0])
            raise DymoeError(f"{self.name}: expected {expected}, got {got}; see dymoe {self.name} --help")
        if missing := next((option for option in self.needed if not arguments[option]), None):
            raise DymoeError(f"{self.name}: {missing} is missing; see dymoe {self.name} --help")

    def _why_not(self, option: str) -> str:
        """What is wrong with an option that is none, or that is a key without a value."""
        keys = [key for key, _, _ in self._described()]
        if option in keys or (self.keys and option.startswith(("--settings.", "--with."))):
            return "expected a value after it"
        return f"unknown option; {nearest(option, [*self.options, *keys])}"

    def _described(self) -> list[tuple[str, str, str]]:
        """Name, type and default of every key."""
        if not self.keys:
            return []
        from dymoe.methods.settings import describe

        module, _, name = self.keys.rpartition(".")
        return [(f"--{key}", kind, default) for key, kind, default in describe(getattr(import_module(module), name))]

    def _keys(self) -> str:
        """A line for every key, for the help."""
        rows = self._described()
        if not rows:
            return ""
        width = max(len(key) for key, _, _ in rows)
        lines = [f"  {key:<{width}}  {kind}{f' ({default})' if default else ''}" for key, kind, default in rows]
        return "\n".join(["\n\nkeys and their defaults:", *lines])


def integer(text: str, least: int = 1, most: int | None = None) -> int:
    """A whole number.

    Raises:
        DymoeError: it is none, or out of bounds.
    """
    if not (text.isascii() and text.isdigit()) or int(text) < least or (most is not None and int(text) > most):
        bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise DymoeError(f"expected a whole number {bounds}, got {brief(text)}")
    return int(text)


def names(text: str) -> list[str]:
    """The parts of a text between commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def integers(text: str) -> list[int]:
    """Whole numbers from 1 between commas.

    Raises:
        DymoeError: there is none, or a part is none.
    """
    try:
        result = [integer(part) for part in names(text)]
    except DymoeError:
        result = []
    if not result:
        raise DymoeError(f"expected whole numbers from 1 with commas between, got {brief(text)}")
    return result


def part_accepted(text: str) -> str:
    """In what a run that goes on may differ from its beginning.

    Raises:
        DymoeError: there is no such part.
    """
    from dymoe.learning.conditions import ACCEPTABLE

    if text not in ACCEPTABLE:
        raise DymoeError(f"expected one of {', '.join(ACCEPTABLE)}, got {text!r}")
    return text
