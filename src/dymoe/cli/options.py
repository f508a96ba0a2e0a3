"""Options and other words of a command line, told apart; one way for all commands."""

from collections.abc import Sequence

from dymoe.errors import DymoeError
from dymoe.messages import brief, nearest


def parse(
    command: str, argv: Sequence[str], valued: Sequence[str], flags: Sequence[str] = ()
) -> tuple[dict[str, str], list[str]]:
    """Options by name (flags with an empty text) and the words that belong to none.

    Raises:
        DymoeError: an unknown option, one without its value, or one given twice.
    """

    options: dict[str, str] = {}
    found: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            found.append(word)
            continue
        key, equals, value = word.partition("=")
        if key not in (*valued, *flags):
            raise DymoeError(f"{command}: {key}: unknown option; {nearest(key, [*valued, *flags])}")
        if key in options:
            raise DymoeError(f"{command}: {key}: is there twice")
        if key in valued and not equals:
            # An option's name is no value; a value that begins so is written --option=VALUE.
            if not words or words[0].partition("=")[0] in (*valued, *flags):
                raise DymoeError(f"{command}: {key}: expected a value after it")
            value = words.pop(0)
        if key in flags and equals:
            raise DymoeError(f"{command}: {key}: takes no value")
        options[key] = value
    return options, found


def whole(command: str, options: dict[str, str], key: str) -> int | None:
    """The value of an option as a whole number, None where it is not given.

    Raises:
        DymoeError: it is none, or less than 1.
    """
    value = options.get(key)
    if value is None:
        return None
    if not (value.isascii() and value.isdigit()) or int(value) < 1:
        raise DymoeError(f"{command}: {key}: expected a whole number of at least 1, got {brief(value)}")
    return int(value)
