"""`dymoe list methods|streams|recipes`: what there is."""

from collections.abc import Mapping, Sequence

from dymoe.cli.options import Command
from dymoe.errors import DymoeError
from dymoe.files import read_bytes
from dymoe.messages import nearest, say

HELP = """usage: dymoe list methods|streams|recipes

Print the names there are, each with what it is."""

WHAT = ("methods", "streams", "recipes")
COMMAND = Command("list", HELP, "WHAT")


def main(argv: Sequence[str]) -> int:
    """Print one line per thing: its name and what it is."""
    (what,) = COMMAND.parse(argv).words
    if what not in WHAT:
        raise DymoeError(f"list: {what}: unknown; {nearest(what, WHAT)}")
    _print({"methods": methods, "streams": streams, "recipes": recipes}[what]())
    if what == "methods":
        from dymoe.methods import plugins

        print("\nplugins, which go with a method (with: [NAME] in a recipe):")
        _print(plugins())
    if what == "recipes":
        from dymoe.learning.catalog import FOLDER, LAUNCHER

        say(f"\nTheir files, and configs for `accelerate launch` in {LAUNCHER}: {FOLDER}")
    return 0


def _print(rows: Mapping[str, str]) -> None:
    width = max((len(name) for name in rows), default=0)
    for name, text in rows.items():
        say(f"{name:<{width}}  {text}".rstrip())


def methods() -> dict[str, str]:
    """Methods by name."""
    from dymoe.methods import available

    return available()


def streams() -> dict[str, str]:
    """Streams by name."""
    from dymoe.tasks import available, task_names

    return {name: ", ".join(task_names(name)) for name in available()}


def recipes() -> dict[str, str]:
    """Recipes and sweeps that come with dymoe, each with the comment on its first line."""
    from dymoe.learning.catalog import shipped

    lines = {name: read_bytes(path).decode(errors="replace").partition("\n")[0] for name, path in shipped().items()}
    return {name: line.lstrip("# ").strip() if line.startswith("#") else "" for name, line in lines.items()}
