"""A dry run: the ordinary loop with a random model; made samples of the lengths asked for; the paper's times beside."""

import json
from pathlib import Path

import pytest

from dymoe.cli import main
from dymoe.errors import DymoeError
from dymoe.learning.recipe import load_recipe
from dymoe.models import Collator, Lvlm
from dymoe.models.options import ModelOptions
from dymoe.models.shapes import config_of, meta_model, processor_of
from dymoe.preflight.dryrun import dry_run
from dymoe.tasks.coin.preflight import Lengths, made_task, published_times
from tests.learning.tiny import save_tiny, write_recipe


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model")


def test_the_loop_runs_with_made_weights_and_leaves_nothing(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tiny / "model.safetensors").unlink(missing_ok=True)  # no weights are read
    recipe = write_recipe(tmp_path / "r.yaml", tiny)
    assert main(["run", str(recipe), "--dry-run", "--output", str(tmp_path / "dry.json")]) == 0
    assert "tokens/s" in capsys.readouterr().out
    made = json.loads((tmp_path / "dry.json").read_text())
    assert [row["task"] for row in made["tasks"]] == ["ImageNet", "VQAv2"]
    for row in made["tasks"]:
        assert row["steps"] == 8
        assert row["hours"] == pytest.approx(8 * row["step_seconds"] / 3600)
        assert min(row["tokens_per_second"], row["answers_per_second"], row["peak_bytes"]) > 0
        assert row["paper_hours"] is None  # the paper's times are of CoIN
    assert {path.name for path in tmp_path.iterdir()} == {"r.yaml", "dry.json"}


def test_a_mistake_is_told(tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", tiny)
    assert main(["run", str(recipe), "--dry-run", "--output", "here"]) == 2
    assert "expected a JSON file" in capsys.readouterr().err
    with pytest.raises(DymoeError, match="zero-shot trains nothing"):
        dry_run(load_recipe("recipes/coin/zero-shot.yaml"))


def test_made_samples_have_the_lengths_asked_for_and_576_image_tokens() -> None:
    options = ModelOptions(shape="llava-1.5-7b")
    config = config_of("nowhere", options)
    lvlm = Lvlm(meta_model(config), processor_of("nowhere", config))
    collate = Collator(lvlm)

    def row(question: int, answer: int, turns: int = 1) -> tuple[int, int, int]:
        batch = collate(made_task("GQA", Lengths(question, answer, turns), 1, 1).train)
        return (
            batch["input_ids"].shape[1],
            int((batch["input_ids"] == config.image_token_index).sum()),
            int((batch["labels"] != -100).sum()),
        )

    short, long, several = row(20, 3), row(50, 3), row(20, 3, 3)
    assert short[1] == long[1] == several[1] == 576
    assert long[0] - short[0] == 30
    assert (short[2], several[2]) == (4, 12)  # each answer and its end token


def test_table_15_is_the_supplements() -> None:
    rows = published_times()["minutes"]
    averages = {name: sum(row.values()) / len(row) for name, row in rows.items()}
    assert averages["incmoelora"] == pytest.approx(74.18, abs=0.006)
    assert averages["dymoe"] == pytest.approx(77.43, abs=0.006)
