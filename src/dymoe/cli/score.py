"""`dymoe score --rule RULE --task TASK PREDICTIONS REFERENCES`: score answers in CoIN's own format."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dymoe.cli.options import Command
from dymoe.errors import DymoeError
from dymoe.messages import say
from dymoe.tasks.coin import TASKS

HELP = f"""usage: dymoe score --rule coin|corrected --task TASK PREDICTIONS REFERENCES [options]

Score a file of predictions (JSON lines with question_id and text) against a file of test records (CoIN's test.json or
val.json); print the accuracy and what was counted, and write them as JSON with the rule and the files' SHA-256.

  --rule RULE        coin: as CoIN's published code, flaw for flaw; corrected: as a careful benchmark would
  --task TASK        one of {", ".join(TASKS)}, in any case
  --annotations DIR  the image root (cl_dataset) or the task's folder in it: ScienceQA's problems.json and
                     pid_splits.json, TextVQA's TextVQA_0.5.1_val.json (needed), GQA's testdev_balanced_questions.json
  --variant NAME     with --rule coin: coin (default) or sefe (SEFE's code); they differ on ScienceQA alone
  --output FILE      the JSON (beside the predictions: NAME.coin.json, NAME.sefe.json or NAME.corrected.json)"""

OPTIONS = ("--rule", "--task", "--annotations", "--variant", "--output")
COMMAND = Command("score", HELP, "PREDICTIONS REFERENCES", dict.fromkeys(OPTIONS, str), needed=OPTIONS[:2])


def main(argv: Sequence[str]) -> int:
    """Score, print, write."""
    arguments = COMMAND.parse(argv)
    from dymoe.files import atomic_json
    from dymoe.tasks.scoring.runner import score_files

    predictions, references = arguments.words
    about = (arguments["--task"], arguments["--rule"], arguments["--annotations"], arguments["--variant"] or "coin")
    scores = score_files(predictions, references, *about)
    owner = scores.rule.partition("/")[0]
    output = Path(arguments["--output"] or Path(predictions).with_suffix(f".{owner}.json"))
    read = (scores.predictions, *scores.references)
    if output.resolve() in [Path(source.path).resolve() for source in read]:
        raise DymoeError(f"score: --output {output}: is one of the files to be read; name another")
    say(*lines(scores))
    atomic_json(output, scores.as_dict())
    say(f"Scores: {output}")
    return 0


def lines(scores: Any) -> list[str]:
    """The scores in a few lines."""
    counts = scores.counts
    return [
        f"{scores.task}, rule {scores.rule}: {scores.accuracy:.2f} % of {scores.denominator}",
        f"  of: {scores.denominator_is}",
        f"  right {counts.right}  partial {counts.partial}  wrong {counts.wrong}",
        f"  unreadable {counts.unreadable}  missing {counts.missing}  skipped {counts.skipped}  "
        f"duplicate ids {counts.duplicates}  unknown ids {counts.unknown}",
        f"  lenient {scores.lenient_accuracy:.2f} %, so {scores.format_drift:.2f} points are format drift",
        *(f"  note: {remark}" for remark in scores.remarks),
    ]
