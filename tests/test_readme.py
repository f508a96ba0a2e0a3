"""What the README shows runs as it stands: the first example with fewer steps, loading a stage on a tiny model."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from dymoe.cli import COMMANDS, compare, main
from dymoe.learning.catalog import shipped

ROOT = Path(__file__).resolve().parent.parent


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)


@pytest.mark.parametrize(
    ("page", "columns"),
    [
        ("next/leaderboard", ["MFT", "MFN", "MAA", "BWT", "MFN against dymoe", "BWT against dymoe"]),
        ("leaderboard", ["seeds", "MFT", "MFN", "MAA", "BWT", "forgetting", "drift"]),
    ],
)
def test_the_numbers_are_the_leaderboards(page, columns):
    """The README's tables are some columns of docs/leaderboard.md and its like, to be copied again after a sweep."""
    columns = ["method", *columns]
    lines = (ROOT / "docs" / f"{page}.md").read_text().splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("| method | seeds |"))
    rows = [line.strip("| ").split(" | ") for line in lines[first : lines.index("", first)]]
    places = [rows[0].index(column) for column in columns]
    table = "\n".join("| " + " | ".join(row[place] for place in places) + " |" for row in [rows[0], *rows[2:]])
    shown = (ROOT / "README.md").read_text().replace(f"{'|---' * len(columns)}|\n", "")
    assert table in shown, f"README.md's first numbers are not those of {page}:\n{table}"


def test_the_difference_in_mft_is_what_is_compared():
    """The one number of the text that no table of the page has, as `dymoe compare` prints it."""
    text = (ROOT / "README.md").read_text()
    (pair,) = re.findall(r"^dymoe compare (results/next/\S+) (results/next/\S+)$", text, flags=re.MULTILINE)
    printed = {line.split()[0]: re.split(r"\s{2,}", line) for line in compare.table(*pair)[5:]}
    assert f"MFT {printed['MFT'][3]}" in text
    assert printed["MFT"][4] == "less"


def test_the_python_example_runs(tmp_path, monkeypatch, capsys):
    block, _ = blocks("python")
    assert "max_steps=20" in block
    monkeypatch.chdir(tmp_path)
    exec(block.replace("max_steps=20", "max_steps=1, per_device_train_batch_size=2, use_cpu=True"), {})
    told = capsys.readouterr().out.splitlines()
    lines = [line for line in told if line.startswith(("ScienceQA {", "ImageNet {"))]
    first, second = (re.findall(r"'ScienceQA': '(\w+)'", line) for line in lines)
    assert len(first) == 1
    assert first == second, "the old group must not change"
    assert (tmp_path / "runs" / "example" / "groups" / "ImageNet" / "adapter_model.safetensors").is_file()


def test_a_shared_stage_is_loaded_as_shown(tiny_folder, tmp_path, monkeypatch):
    import dymoe
    from dymoe.models import load
    from tests.learning.tiny import write_recipe

    tasks, training = ["ScienceQA", "TextVQA", "GQA"], {"steps_per_task": 2, "batch_size": 2, "limit": 4}
    recipe = write_recipe(tmp_path / "r.yaml", tiny_folder, tasks=tasks, training=training, evaluation={"limit": 1})
    assert main(["run", str(recipe)]) == 0
    assert main(["push", str(tmp_path / "r"), f"file:{tmp_path}/results/dymoe"]) == 0
    monkeypatch.chdir(tmp_path)
    _, block = blocks("python")
    assert "./models/llava-7b-base" in block
    names: dict = {}
    exec(block.replace("./models/llava-7b-base", str(tiny_folder)), names)
    assert list(names["model"].peft_config) == tasks[:2]
    checked = dymoe.load_stage("results/dymoe", load(str(tiny_folder)).model, stage=2)
    tokens = torch.arange(5, 25).reshape(2, 10)
    with torch.no_grad():
        shown, same = (model(input_ids=tokens).logits for model in (names["model"], checked))
    assert torch.equal(shown, same)


def test_the_commands_name_what_there_is():
    text = "\n".join(blocks("sh")).replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in text.splitlines()]
    shown = [words[words.index("dymoe") + 1 :] for words in lines if "dymoe" in words]
    expected = ["assemble", "doctor", "run", "run", "score", "analyze", "push", "sweep", "sweep", "compare"]
    assert [words[0] for words in shown] == expected
    assert all(words[0] in COMMANDS for words in shown)
    for name in [word for words in lines for word in words if word.startswith("recipes/")]:
        assert (ROOT / name).is_file(), name
    named = {words[1] for words in shown if words[0] in ("doctor", "run", "sweep")}
    assert named <= shipped().keys()


def test_the_links_lead_somewhere():
    text = (ROOT / "README.md").read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target
