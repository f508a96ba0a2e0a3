"""`dymoe export RUN --as FORM`: a stage as a plain LoRA, a whole model, or one LoRA a group."""

from collections.abc import Sequence

from dymoe.cli.options import Command, integer
from dymoe.messages import say

HELP = """usage: dymoe export RUN [--stage N] [--as FORM] [--output FOLDER] [--model MODEL] [--dtype DTYPE]

Write a stage for programs that know nothing of expert groups. A method whose experts are weighed token by token is
refused: serve it as it is (examples/serve.py).

  RUN              a run folder with at least one finished stage, or what `dymoe push` or `dymoe pull` wrote
  --stage N        which stage, counted from 1 (the last)
  --as FORM        lora: one LoRA of PEFT, all groups side by side (the default)
                   merged: a model folder that transformers loads
                   groups: where a sample's groups are weighed (task-router, proglora), a LoRA for each group and what
                   weighs them; examples/groups.py asks it
  --output FOLDER  where to (RUN/exports/NN-TASK-FORM); it must not exist or be empty
  --model MODEL    of merged: the base model, where it is not where the recipe says
  --dtype DTYPE    of merged: bfloat16, float16 or float32 (the recipe's)"""

COMMAND = Command(
    "export", HELP, "RUN", {"--stage": integer, "--as": str, "--output": str, "--model": str, "--dtype": str}
)

USES = {
    "lora": "Use it: PeftModel.from_pretrained(base, FOLDER), or whatever serves a LoRA",
    "merged": "Use it: AutoModelForImageTextToText.from_pretrained(FOLDER), or as `model:` of a recipe",
    "groups": "Use it: python examples/groups.py FOLDER MODEL QUESTION [PICTURE]",
}


def main(argv: Sequence[str]) -> int:
    """Read the stage, write the folder, say how to use it."""
    arguments = COMMAND.parse(argv)
    (run,) = arguments.words
    form = arguments["--as"] or "lora"
    from dymoe.share.export import export

    done = export(run, form, arguments["--stage"], arguments["--output"], arguments["--model"], arguments["--dtype"])
    say(f"stage {done.stage}: {done.folder}")
    say(USES[form])
    return 0
