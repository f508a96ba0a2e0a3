"""`dymoe pull SOURCE FOLDER`: fetch a shared result and check all of it."""

from collections.abc import Sequence

from dymoe.cli.options import Command
from dymoe.messages import say, shorten

HELP = """usage: dymoe pull SOURCE FOLDER

Fetch what `dymoe push` shared. The folder appears when every file's SHA-256 and every group's hash were found right and
each group holds its own tensors alone; links and paths that lead out of the folder are refused, files that do not
belong to the result are left behind.

  SOURCE  a folder (file:PATH or a path) or a Hub repository (owner/name or hub:owner/name)
  FOLDER  where to; it must not exist or be empty"""

COMMAND = Command("pull", HELP, "SOURCE FOLDER")


def main(argv: Sequence[str]) -> int:
    """Fetch, check, put in place."""
    words = COMMAND.parse(argv).words
    from dymoe.share.pull import pull

    done = pull(*words)
    say(f"stages {', '.join(done.stages)}: {done.folder}")
    say(f"SHA-256 of manifest.json: {done.manifest}")
    if done.left:
        say(f"left behind, not in manifest.json: {shorten(', '.join(done.left), 1000)}")
    return 0
