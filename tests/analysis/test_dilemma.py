"""The token's dilemma: its masks while training, its records, its table and its sentence."""

import math
import statistics
from pathlib import Path

import pytest
import torch
from peft import get_peft_model

from dymoe import analysis
from dymoe.adapter import group_hash
from dymoe.analysis.token_dilemma import STRATEGIES, complete, dilemma_sweep
from dymoe.cli import main
from dymoe.errors import DymoeError
from dymoe.learning.formats import read_results
from dymoe.sweep.plan import Plan
from tests.adapter.conftest import batch, randomise, small, tiny_llama  # noqa: F401 - batch is a fixture
from tests.learning.tiny import write_recipe

OFF = {"load_balance": 0.0, "exclusivity": 0.0, "specialization": 0.0}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_only_the_strategys_tokens_train_the_new_experts(batch, strategy):  # noqa: F811
    config = small(guidance=STRATEGIES[strategy], tau=0.3, temperature=0.1, top_k=8, **OFF)
    model = get_peft_model(tiny_llama(), config, adapter_name="old")
    model.add_adapter("new", config)
    randomise(model)
    model.train()
    seen = []
    model.base_model.trace.observers.append(seen.append)
    before = group_hash(model, "new")
    model(**batch).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
    for routing in seen:
        from dymoe.routing import token_types

        kinds = token_types(routing.scores, 4, 0.3)
        weight = routing.weights[..., 4:].sum(-1)
        allowed = {"new": kinds == 2, "ambiguous": kinds == 1, "old": kinds == 0}
        reach = allowed.get(strategy, torch.full_like(kinds, strategy == "all", dtype=torch.bool))
        assert (weight[~reach] == 0).all()
        assert (weight[reach] > 0).all()
        assert (routing.weights[..., :4].sum(-1) > 0).all(), "the old experts stay open to all"
    assert (group_hash(model, "new") == before) == (strategy == "none")


def record(pair, seed, strategy, new, before, after, drift):
    tasks = pair.split(" -> ")
    settings = {"guidance": STRATEGIES[strategy]}
    row = {"label": f"{pair} {strategy}", "seed": seed, "tasks": tasks, "settings": settings}
    return {**row, "matrix": [[before], [after, new]], "drift": {tasks[0]: [0, drift], tasks[1]: [0]}}


ROWS = [
    record("A -> B", 0, "all", 50.0, 40.0, 20.0, 0.5),
    record("A -> B", 0, "new", 48.0, 40.0, 38.0, 0.1),
    record("A -> B", 0, "ambiguous", 30.0, 40.0, 30.0, 0.4),
    record("A -> B", 0, "old", 28.0, 40.0, 36.0, 0.3),
    record("A -> B", 0, "none", 10.0, 40.0, 40.0, 0.2),
    record("A -> B", 1, "all", 60.0, 42.0, 21.0, 0.6),
    record("A -> B", 1, "new", 50.0, 42.0, 40.0, 0.2),
    record("A -> B", 1, "ambiguous", 31.0, 42.0, 28.0, 0.5),
    record("A -> B", 1, "old", 34.0, 42.0, 45.0, 0.2),
    record("A -> B", 1, "none", 12.0, 42.0, 42.0, 0.3),
    record("B -> C", 0, "new", 99.0, 10.0, 0.0, 0.9),  # not learned under every strategy yet
]


def test_records_become_rows():
    frame = analysis.dilemma(ROWS)
    assert frame["strategy"].tolist()[:5] == [*STRATEGIES]
    row = frame[(frame["seed"] == 1) & (frame["strategy"] == "ambiguous")].iloc[0]
    assert row.to_dict() == {
        "pair": "A -> B",
        "seed": 1,
        "strategy": "ambiguous",
        "new_task_accuracy": 31.0,
        "old_task_before": 42.0,
        "old_task_after": 28.0,
        "forgetting": 14.0,
        "drift": 0.5,
    }
    assert math.isnan(analysis.dilemma([{**ROWS[0], "drift": {}}])["drift"][0])


def test_the_table_counts_whole_sets_of_strategies_alone():
    frame = analysis.dilemma(ROWS)
    assert set(complete(frame)["pair"]) == {"A -> B"}
    table = analysis.by_strategy(frame)
    assert table["pair"].tolist() == ["A -> B"] * 5 + ["all pairs"] * 5
    row = table[(table["pair"] == "all pairs") & (table["strategy"] == "old")].iloc[0]
    assert row["seeds"] == 2
    assert row["new_task_accuracy"] == pytest.approx(31.0)
    assert row["new_task_accuracy_std"] == pytest.approx(statistics.stdev([28.0, 34.0]))
    assert row["forgetting"] == pytest.approx((4 - 3) / 2)


def test_the_sentence_says_what_the_numbers_say():
    told = analysis.conclusion(analysis.dilemma(ROWS))
    assert "reached 49.0 % and the old one lost 2.0 points" in told
    # Ambiguous: accuracy -18 and -19, forgetting +8 and +12, drift +30 and +30; old: -20, -16; +2, -5; +20, +0.
    assert "ambiguous tokens alone changed new-task accuracy by -18.5 ± 0.5 points, forgetting by +10.0 ± 2.0" in told
    assert "old tokens alone changed new-task accuracy by -18.0 ± 2.0 points, forgetting by -1.5 ± 3.5 and" in told
    # All: +2, +10; +18, +19; +40, +40.
    assert "all tokens together changed new-task accuracy by +6.0 ± 4.0 points, forgetting by +18.5 ± 0.5 and" in told
    assert "2 learnings of 1 pair by 2 seeds" in told
    one = analysis.conclusion(analysis.dilemma(ROWS[:5]))
    assert "no standard error" in one
    assert "No pair and seed" in analysis.conclusion(analysis.dilemma(ROWS[-1:]))


def test_what_is_no_dilemma_is_refused(tmp_path, tiny_folder):
    for change in ({"tasks": ["A"]}, {"settings": {"guidance": "exclusive"}}, {"matrix": [[1.0]]}):
        with pytest.raises(DymoeError, match="not a record of the token's dilemma"):
            analysis.dilemma([{**ROWS[0], **change}])
    three = write_recipe(tmp_path / "three.yaml", tiny_folder, tasks=["GQA", "ImageNet", "VQAv2"])
    with pytest.raises(DymoeError, match="needs two tasks learned by method dymoe, this recipe has 3 by dymoe"):
        dilemma_sweep(three)
    with pytest.raises(DymoeError, match="no such results"):
        analysis.dilemma(write_recipe(tmp_path / "two.yaml", tiny_folder))


def test_a_recipe_of_two_tasks_is_learned_under_every_strategy(tmp_path, tiny_folder, monkeypatch):
    path = write_recipe(tmp_path / "two.yaml", tiny_folder)
    cells = Plan(dilemma_sweep(path, ["--seeds", "[0, 4]"]), path).cells
    assert [cell.seed for cell in cells] == [0] * 5 + [4] * 5
    assert [cell.recipe["settings"]["guidance"] for cell in cells[:5]] == [*STRATEGIES.values()]
    assert all(cell.recipe["tasks"] == ["ImageNet", "VQAv2"] for cell in cells)
    shipped = dilemma_sweep("recipes/pocket/dilemma.yaml")  # its cells are planned in tests/sweep/test_sweep.py
    assert shipped.vary == {"settings.guidance": [*STRATEGIES.values()]}


@pytest.mark.slow
def test_from_recipe_to_sentence_and_on_from_where_it_stopped(tmp_path, tiny_folder, monkeypatch, capsys):
    training = {"steps_per_task": 2, "batch_size": 2, "limit": 4}
    path = write_recipe(tmp_path / "two.yaml", tiny_folder, training=training, evaluation={"limit": 2})
    monkeypatch.chdir(tmp_path)
    assert main(["analyze", "dilemma", str(path), "--jobs", "2"]) == 0
    told = capsys.readouterr().out
    assert "Against new tokens alone" in told
    assert "Figures: runs/two-dilemma.html" in told
    assert "Against new tokens alone" in Path("runs/two-dilemma.html").read_text(encoding="utf-8")
    frame = analysis.stored("runs/two-dilemma", "dilemma")
    assert frame["strategy"].tolist() == [*STRATEGIES]
    records = read_results("runs/two-dilemma.jsonl")["rows"]
    assert frame["new_task_accuracy"].tolist() == [
        next(row["matrix"][1][1] for row in records if row["settings"]["guidance"] == mask)
        for mask in STRATEGIES.values()
    ]
    assert main(["analyze", "dilemma", str(path)]) == 0
    assert "5 cells, 5 stand in" in capsys.readouterr().out
    assert analysis.dilemma(path).equals(frame)
