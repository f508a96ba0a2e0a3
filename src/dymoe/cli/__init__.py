"""The command line: `dymoe COMMAND ...`; one module per command, imported when it is called."""

import os
import sys
from collections.abc import Sequence
from importlib import import_module

COMMANDS = {
    "run": "learn a stream of tasks as a recipe says",
    "doctor": "check data, model, memory and disk before a run begins",
    "sweep": "learn many recipes and seeds side by side and write a table",
    "analyze": "say where a run's tokens go: drift, activation, single tokens, training, the dilemma",
    "report": "write one HTML page about one run or several side by side",
    "play": "open a local page to ask a run and see which experts serve each token",
    "assemble": "build LLaVA-1.5 before instruction tuning from Vicuna, CLIP and a projector",
    "show": "print a run's accuracy matrix and metrics",
    "compare": "say whether two methods are told apart, on the same questions",
    "score": "score a file of answers as CoIN's code does, or as a careful benchmark would",
    "push": "share a run's groups, recipe and numbers: to a folder or a Hub repository",
    "pull": "fetch what was shared and check all of it",
    "export": "write a stage as a plain LoRA, a whole model, or a LoRA for each group",
    "list": "list methods, streams or recipes",
    "demo": "learn three pocket tasks with IncMoELoRA and DyMoE and compare what they forget",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code: 0 done, 2 unusable input (told in one line), 130 interrupted."""
    from dymoe.cli.options import Help
    from dymoe.errors import DymoeError
    from dymoe.messages import nearest, one_line, say, shorten

    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0 if words else 2
    if words[0] == "--version":
        from dymoe import __version__

        print(f"dymoe {__version__}")
        return 0
    try:
        if words[0] not in COMMANDS:
            raise DymoeError(f"{shorten(words[0])}: unknown command; {nearest(words[0], COMMANDS)}")
        if words[0] != "run" and "LOCAL_RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1":
            raise DymoeError(
                f"{words[0]}: started in {os.environ['WORLD_SIZE']} processes by a launcher; only `dymoe run` shares "
                f"its work, so call `dymoe {words[0]}` without the launcher"
            )
        # Importing a submodule named `list` would hide the builtin in this package.
        module = "listing" if words[0] == "list" else words[0]
        try:
            return int(import_module(f"dymoe.cli.{module}").main(words[1:]))
        except Help as shown:
            print(shown)
            return shown.code
    except DymoeError as error:
        say(f"dymoe: {one_line(error)}", error=True)
        return 2
    except BrokenPipeError:
        # The reader of our output left (`dymoe show RUN | head`); keep Python from telling so at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        # What the system refuses (a name too long, a folder that may not be read) is no fault of this program.
        where = f"{error.filename}: " if error.filename is not None else ""
        say(f"dymoe: {one_line(f'{where}{error.strerror or error}')}", error=True)
        return 2
    except KeyboardInterrupt:
        say("dymoe: interrupted", error=True)
        return 130


def usage() -> str:
    """What `dymoe --help` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {summary}" for name, summary in COMMANDS.items()]
    head = "usage: dymoe COMMAND ...\n\nContinual learning for vision-language models with LoRA experts.\n\ncommands:"
    return "\n".join([head, *lines, "", "`dymoe COMMAND --help` says more; `dymoe --version` the version."])
