"""`dymoe play RUN [RUN ...]`: a local page to ask learned runs."""

import os
import signal
import tempfile
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from threading import Event

from dymoe.cli.options import Command, integer
from dymoe.errors import DymoeError
from dymoe.libraries import require_extra
from dymoe.messages import say

HELP = """usage: dymoe play RUN [RUN ...] [--host ADDRESS] [--port N]

Serve a page on this machine: drop a picture, ask any stage of the runs, watch the answer and which experts serve each
patch and word. Nothing leaves the machine. Ctrl+C ends it. Needs Gradio: pip install dymoe[play]

  --host ADDRESS  where to listen (127.0.0.1, which this machine alone can reach)
  --port N        the port (the first free one from 7860 on)"""

COMMAND = Command("play", HELP, "RUN ...", {"--host": str, "--port": partial(integer, most=65535)})

# Gradio reads these when it is imported.
QUIET = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def main(argv: Sequence[str]) -> int:
    """Load the runs, serve the page until Ctrl+C."""
    arguments = COMMAND.parse(argv)
    host, port = arguments["--host"] or "127.0.0.1", arguments["--port"]
    require_gradio()
    with tempfile.TemporaryDirectory(prefix="dymoe-play-") as room:
        os.environ.update(QUIET, GRADIO_TEMP_DIR=room)
        from dymoe.libraries import quiet
        from dymoe.play.ask import Runs

        with quiet():
            runs = Runs([Path(word) for word in arguments.words], tell=lambda text: say(text, error=True))
        from dymoe.play.serve import serve

        try:
            with serve(runs, host, port, Path(room)) as address:
                if host not in LOOPBACK:
                    say(f"dymoe: everyone who reaches {host} can use this page", error=True)
                signal.signal(signal.SIGTERM, signal.default_int_handler)  # uploads are removed then too
                say(f"Open {address} (Ctrl+C ends)")
                Event().wait()
        except KeyboardInterrupt:
            print()
    return 0


def require_gradio() -> None:
    """Refuse to go on without Gradio 6 or newer.

    Raises:
        DymoeError: it is missing or older.
    """
    require_extra("play", "play")
    installed = version("gradio")
    if int(installed.partition(".")[0]) < 6:
        raise DymoeError(f"play: needs Gradio 6 or newer, here is {installed}; pip install dymoe[play]")
