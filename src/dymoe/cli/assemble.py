"""`dymoe assemble`: LLaVA-1.5 before instruction tuning from Vicuna, CLIP and the pretrained projector."""

import shlex
from collections.abc import Sequence

from dymoe.cli.options import Command
from dymoe.messages import say

HELP = """usage: dymoe assemble --llm MODEL --vision MODEL --projector FILE --output FOLDER [--dtype bfloat16]

Build the base model of CoIN (LLaVA-1.5 before instruction tuning) as one folder that `model:` of a recipe names.

  --llm MODEL       Vicuna as a folder or Hub id, for example lmsys/vicuna-7b-v1.5
  --vision MODEL    CLIP as a folder or Hub id, for example openai/clip-vit-large-patch14-336
  --projector FILE  LLaVA's pretrained mm_projector.bin (or .safetensors), of the same size of Vicuna
  --output FOLDER   a new folder
  --dtype DTYPE     bfloat16 (default), float16 or float32"""

NEEDED = ("--llm", "--vision", "--projector", "--output")
COMMAND = Command("assemble", HELP, "", options=dict.fromkeys(NEEDED, str) | {"--dtype": str}, needed=NEEDED)


def main(argv: Sequence[str]) -> int:
    """Check every input, write the folder, say how to use it."""
    arguments = COMMAND.parse(argv)
    from dymoe.models.llava import assemble

    llm, vision, projector, output = (arguments[option] for option in NEEDED)
    dtype = arguments["--dtype"] or "bfloat16"
    done = assemble(llm, vision, projector, output, dtype, tell=lambda text: say(text, error=True))
    say(
        f"{done.folder}: {done.parameters / 1e9:.2f} billion parameters, {done.bytes / 1e9:.1f} GB, "
        f"{done.image_tokens} tokens an image"
    )
    say(f"Use it: dymoe run RECIPE --model {shlex.quote(str(done.folder))}")
    return 0
