"""`dymoe push RUN TARGET`: share a run's groups, recipe and numbers."""

from collections.abc import Sequence

from dymoe.cli.options import Command, integer
from dymoe.messages import say

HELP = """usage: dymoe push RUN TARGET [--stage N] [--private] [--message TEXT] [--license ID]

Share a run: its expert groups (one PEFT adapter each), recipe, accuracy matrix and metrics, a model card, and a
manifest with the SHA-256 of every file. All of it arrives or nothing; paths of this machine are left out.

  RUN             a run folder with at least one finished stage
  TARGET          a folder (file:PATH or a path) or a Hub repository (owner/name or hub:owner/name)
  --stage N       the first N stages (all that are finished)
  --private       make the Hub repository private
  --message TEXT  message of the Hub's commit
  --license ID    licence of the groups as the Hub names it, for example apache-2.0 (not stated)"""

COMMAND = Command(
    "push", HELP, "RUN TARGET", {"--stage": integer, "--private": None, "--message": str, "--license": str}
)


def main(argv: Sequence[str]) -> int:
    """Collect, check, send."""
    arguments = COMMAND.parse(argv)
    run, target = arguments.words
    from dymoe.share.push import push

    done = push(
        run, target, arguments["--stage"], "--private" in arguments, arguments["--message"], arguments["--license"]
    )
    say(f"stages 1 to {done.stages}, {done.size / 2**20:.1f} MiB: {done.where}")
    say(f"SHA-256 of manifest.json: {done.manifest}")
    return 0
