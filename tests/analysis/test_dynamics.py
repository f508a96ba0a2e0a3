"""Training dynamics: each value against loops over tokens; no step twice and none lost when a run goes on."""

import json
import math
import statistics
import types

import pytest
import torch
from peft import get_peft_model

from dymoe import analysis
from dymoe.cli import main
from dymoe.errors import DymoeError
from dymoe.learning.callbacks import Watch
from dymoe.learning.distributed import ALONE, Processes
from dymoe.learning.dynamics import VALUES, Dynamics, lines, rewind
from tests.adapter.conftest import batch, randomise, small, tiny_llama  # noqa: F401 - batch is a fixture
from tests.analysis.conftest import TASKS, recipe_at
from tests.test_routing import (
    oracle_balance,
    oracle_cosine,
    oracle_guidance,
    oracle_rsr,
    oracle_type,
    oracle_weights,
)


@pytest.mark.parametrize("guidance", ["exclusive", "none"])
def test_every_value_is_that_of_loops_over_tokens(batch, guidance):  # noqa: F811
    config = {"top_k": 3, "temperature": 0.1, "tau": 0.3, "guidance": guidance}
    model = get_peft_model(tiny_llama(), small(**config), adapter_name="a")
    model.add_adapter("b", small(**config))
    randomise(model)
    inputs = {}
    for layer in model.base_model.layers():
        layer.register_forward_pre_hook(lambda layer, x: inputs.update({layer.name: (layer, x[0])}))
    model.train()
    model(**batch)
    found = model.base_model.trace.by_layer()
    assert set(found) == set(inputs)
    counted = batch["attention_mask"].reshape(-1).tolist()
    for name, (layer, x) in inputs.items():
        rows = torch.cat([layer.dymoe_router["a"], layer.dymoe_router["b"]]).tolist()
        tokens = [token for token, counts in zip(x.reshape(-1, x.shape[-1]).tolist(), counted, strict=True) if counts]
        scores = [[oracle_cosine(token, row) for row in rows] for token in tokens]
        kinds = [oracle_type(row, 4, 0.3).name.lower() for row in scores]
        weights = [oracle_weights(oracle_guidance(row, 4, 0.3, guidance), 3, 0.1) for row in scores]
        expected = {f"share_{kind}": kinds.count(kind) / len(kinds) for kind in ("new", "ambiguous", "old")}
        expected["new_group_weight"] = statistics.fmean(sum(row[4:]) for row in weights)
        expected["entropy"] = statistics.fmean(-sum(w * math.log(w) for w in row if w > 0) for row in weights)
        expected["load_balance"] = oracle_balance(weights, 4)
        regularized = [oracle_rsr(row, 4, 3, 0.1) for row in scores]
        expected["exclusivity"] = statistics.fmean(pair[0] for pair in regularized)
        expected["specialization"] = statistics.fmean(pair[1] for pair in regularized)
        assert found[name] == pytest.approx(expected, abs=1e-4), name
    assert len({row["entropy"] for row in found.values()}) == len(found)


def test_a_run_has_a_line_for_every_step_and_their_means_are_the_events(run):
    frame = analysis.dynamics(run)
    steps = frame.drop_duplicates(["task", "stage", "step"])[["task", "stage", "step"]].to_numpy().tolist()
    assert steps == [[task, stage, step] for stage, task in enumerate(TASKS, 1) for step in (1, 2, 3, 4)]
    assert len(frame) == 12 * 14
    assert (frame.loc[frame["stage"] == 1, "share_new"] == 1).all()
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    told = {(event["stage"], event["step"]): event for event in events if event["event"] == "step"}
    for key, part in frame.groupby(["stage", "step"]):
        for name in VALUES:
            assert part[name].mean() == pytest.approx(told[key][name], abs=2e-6)


def test_a_run_that_goes_on_repeats_no_step_and_loses_none(run, tiny_folder, tmp_path, monkeypatch):
    settings = {"num_experts": 4, "rank": 2, "top_k": 3, "temperature": 0.1}
    recipe = str(recipe_at(tmp_path, tiny_folder, settings=settings, tasks=TASKS[:1]))
    file = tmp_path / "run" / "stages" / "01-ScienceQA" / "dynamics.jsonl"
    told = Watch.on_log

    def interrupted(self, args, state, *rest, **options):
        told(self, args, state, *rest, **options)
        if state.global_step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Watch, "on_log", interrupted)
    assert main(["run", recipe]) == 130  # the checkpoint is that of step 2
    monkeypatch.undo()
    assert [line["step"] for line in lines(file)] == [1, 2, 3]
    with file.open("a") as stream:
        stream.write('{"step": 4, "valu')  # what a kill leaves
    assert analysis.dynamics(tmp_path / "run")["step"].max() == 3
    assert main(["run", recipe, "--resume"]) == 0
    assert file.read_bytes() == (run / "stages" / "01-ScienceQA" / "dynamics.jsonl").read_bytes()


class Trace:
    def __init__(self, **layers):
        self.layers = layers

    def by_layer(self):
        return self.layers


ROW = {name: 0.1 * number for number, name in enumerate(VALUES)}


def written(file, every, trace, steps, processes=ALONE):
    watch = Dynamics(file, every, trace, processes)
    for step in range(1, steps + 1):
        watch.on_step_end(None, types.SimpleNamespace(global_step=step, max_steps=steps), None)
    return [line["step"] for line in lines(file)]


def test_which_steps_are_written_and_by_whom(tmp_path):
    assert written(tmp_path / "a" / "dynamics.jsonl", 3, Trace(x=ROW), 8) == [1, 3, 6, 8]
    assert written(tmp_path / "off", 0, Trace(x=ROW), 8) == []
    assert written(tmp_path / "no scores", 1, Trace(), 3) == []
    assert not (tmp_path / "no scores").exists()

    class Second(Processes):
        asked = 0

        def mean(self, values):
            type(self).asked += 1
            return dict(values)

    assert written(tmp_path / "second", 2, Trace(x=ROW), 4, Second(rank=1, count=2)) == []
    assert Second.asked == 3, "a mean over processes needs all of them"


def test_broken_lines_are_named_and_later_ones_dropped(tmp_path):
    file = tmp_path / "dynamics.jsonl"
    assert written(file, 1, Trace(x=ROW), 3) == [1, 2, 3]
    whole = file.read_bytes()
    rewind(file, 2)
    assert file.read_bytes() == b"".join(whole.splitlines(keepends=True)[:2])
    rewind(tmp_path / "none", 2)
    assert not (tmp_path / "none").exists()
    for text in ("{", "[]", '{"step": 1, "values": ["a"], "layers": {"x": []}}', '{"values": [], "layers": {}}'):
        file.write_bytes(whole + text.encode() + b"\n")
        with pytest.raises(DymoeError, match="line 4"):
            list(lines(file))
