import subprocess
import sys

import pytest

from dymoe.errors import DymoeError
from dymoe.files import read_json
from dymoe.tasks import available, instructions, load_stream, task_names
from dymoe.tasks.base import Stream

COIN = ("ScienceQA", "TextVQA", "ImageNet", "GQA", "VizWiz", "Grounding", "VQAv2", "OCRVQA")


def test_importing_tasks_loads_nothing_heavy() -> None:
    code = (
        "import sys, dymoe.tasks, dymoe.tasks.scoring;"
        "print([name for name in ('torch', 'transformers', 'pyarrow', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_orders() -> None:
    assert available() == ("pocket-coin", "pocket-classes", "pocket-domains", "pocket-general", "coin")
    assert task_names("pocket-coin") == COIN
    assert task_names("pocket-coin", "reverse") == COIN[::-1]
    assert task_names("pocket-coin", "alphabet") == (
        "GQA", "Grounding", "ImageNet", "OCRVQA", "ScienceQA", "TextVQA", "VizWiz", "VQAv2",
    )  # fmt: skip
    assert task_names("pocket-coin", "reverse", ["ScienceQA", "GQA"]) == ("GQA", "ScienceQA")


def test_the_stream_has_its_tasks_in_order(stream: Stream) -> None:
    assert stream.names == COIN
    assert [task.scorer for task in stream.tasks] == [
        "letter", "soft_accuracy", "exact_match", "exact_match", "soft_accuracy", "iou", "soft_accuracy",
        "exact_match",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "pocket_coin"}, "unknown stream 'pocket_coin'; did you mean pocket-coin"),
        ({"order": "reversed"}, "unknown order 'reversed'; did you mean reverse"),
        ({"instructions": "10types"}, "unknown instruction type '10types'; did you mean 10type"),
        ({"tasks": ["scienceqa"]}, "unknown task 'scienceqa'; did you mean ScienceQA"),
        ({"tasks": ["zzz"]}, "unknown task 'zzz'; there is ScienceQA, TextVQA"),
        ({"tasks": ["GQA", "GQA"]}, "a task is named twice in GQA, GQA"),
        ({"tasks": []}, "tasks: none asked for; stream 'pocket-coin' has ScienceQA"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(DymoeError, match=message):
        load_stream(**{"name": "pocket-coin", **arguments})  # type: ignore[arg-type]


# --- instructions ------------------------------------------------------------------------------------------


def test_every_task_and_type_ends_with_a_published_sentence(stream: Stream) -> None:
    templates = read_json(instructions.PATH)["templates"]
    assert set(templates) == set(COIN)
    for kind in instructions.TYPES:
        for task in stream.tasks:
            text = instructions.instruction(task.name, kind, task.test[0].id)
            published = templates[task.name][kind]
            assert text in ([published] if isinstance(published, str) else published)


def test_questions_carry_their_instruction_as_coin_lays_it_out(stream: Stream) -> None:
    original = read_json(instructions.PATH)["templates"]
    for task in stream.tasks:
        sentence = original[task.name]["original"]
        for sample in task.test:
            if task.name == "Grounding":
                assert sample.question.startswith(f"{sentence}: the ")
            else:
                assert sample.question.endswith(f"\n{sentence}")


def test_10type_is_fixed_per_sample_moves_with_the_seed_and_uses_the_whole_list() -> None:
    ids = [f"gqa-train-{number:04d}" for number in range(400)]
    first = [instructions.instruction("GQA", "10type", one, seed=0) for one in ids]
    assert first == [instructions.instruction("GQA", "10type", one, seed=0) for one in ids]
    assert first != [instructions.instruction("GQA", "10type", one, seed=1) for one in ids]
    assert set(first) == set(read_json(instructions.PATH)["templates"]["GQA"]["10type"])


def test_the_instruction_type_changes_the_questions_and_nothing_else(stream: Stream) -> None:
    other = load_stream("pocket-coin", instructions="10type", tasks=["TextVQA"], seed=3).tasks[0]
    task = next(task for task in stream.tasks if task.name == "TextVQA")
    for before, after in zip(task.train, other.train, strict=True):
        assert before.question.split("\n")[0] == after.question.split("\n")[0]
        assert (before.id, before.image, before.answer) == (after.id, after.image, after.answer)
    assert len({sample.question.split("\n")[-1] for sample in other.train}) == 11
