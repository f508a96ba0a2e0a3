"""Replay: the reservoir is uniform, the balanced buffer is exact, both go on after a kill as if nothing happened."""

import itertools
import json
import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dymoe.errors import DymoeError
from dymoe.files import atomic_json
from dymoe.methods.replay import Replay, _reservoir, quotas
from tests.methods.toys import stages, task


def dealt(available, size):
    """Oracle: one place after the other, round and round."""
    parts = [0] * len(available)
    while size and parts != list(available):
        for place in range(len(parts)):
            if size and parts[place] < available[place]:
                parts[place] += 1
                size -= 1
    return parts


@given(st.lists(st.integers(0, 30), min_size=1, max_size=7), st.integers(1, 80))
def test_quotas_are_those_of_dealing_one_by_one(available, size):
    assert quotas(available, size) == dealt(available, size)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=7), st.integers(1, 80))
def test_a_quota_never_grows_when_a_task_is_added(available, size):
    before = quotas(available[:-1], size)
    assert all(new <= old for new, old in zip(quotas(available, size), before, strict=False))


def test_the_reservoir_keeps_every_sample_with_the_same_chance():
    tasks, size, seeds = {"a": 7, "b": 16, "c": 7}, 6, 2000
    counts: Counter = Counter()
    for seed in range(seeds):
        slots, seen = [], {}
        for name, number in tasks.items():
            slots = _reservoir(slots, seen, name, [str(i) for i in range(number)], size, seed)
            seen[name] = number
        assert len({tuple(slot) for slot in slots}) == size
        counts.update(map(tuple, slots))
    total = sum(tasks.values())
    chance = size / total
    expected = seeds * chance
    found = [counts[name, str(i)] for name, number in tasks.items() for i in range(number)]
    # The counts' sum is fixed, so the statistic has total - 1 degrees of freedom; five deviations either way.
    statistic = sum((c - expected) ** 2 for c in found) / (expected * (1 - chance)) * (total - 1) / total
    assert abs(statistic - (total - 1)) < 5 * math.sqrt(2 * (total - 1))


def learn(plugin, found):
    for stage in found:
        plugin.after_task(None, stage, None)
    return [json.loads((stage.memory / "replay.json").read_text()) for stage in found]


@pytest.fixture
def tasks():
    return [task("a", 10), task("b", 3), task("c", 12), task("d", 12)]


def test_balanced_shares_are_exact_and_only_shrink(tasks, tmp_path):
    kept = [state["slots"] for state in learn(Replay(size=9), stages(tmp_path, tasks))]
    parts = [Counter(name for name, _ in slots) for slots in kept]
    assert parts == [{"a": 9}, {"a": 6, "b": 3}, {"a": 3, "b": 3, "c": 3}, {"a": 3, "b": 2, "c": 2, "d": 2}]
    for before, after in itertools.pairwise(kept):
        old = set(parts[kept.index(before)])
        assert {tuple(slot) for slot in after if slot[0] in old} <= {tuple(slot) for slot in before}


@pytest.mark.parametrize("policy", ["balanced", "reservoir"])
def test_a_stage_replays_what_the_one_before_kept(policy, tasks, tmp_path):
    found = stages(tmp_path, tasks)
    plugin = Replay(size=8, policy=policy)
    states = learn(plugin, found)
    assert plugin.training_samples(list(tasks[0].train), found[0]) == tasks[0].train
    for stage, state in zip(found[1:], states, strict=False):
        own = list(stage.tasks[0].train)
        trained = plugin.training_samples(own, stage)
        assert trained[: len(own)] == own
        assert [sample.id for sample in trained[len(own) :]] == [name for _, name in state["slots"]]
        assert len(state["slots"]) == 8
        known = {sample.id: sample for earlier in stage.earlier_tasks for sample in earlier.train}
        assert all(sample is known[sample.id] for sample in trained[len(own) :])


@pytest.mark.parametrize("policy", ["balanced", "reservoir"])
def test_a_stage_done_again_ends_with_the_same_buffer(policy, tasks, tmp_path):
    found = stages(tmp_path, tasks)
    whole = learn(Replay(size=5, policy=policy), found)
    for stage in found[2:]:  # killed in the third: it and the rest are done again, by another process
        (stage.memory / "replay.json").unlink()
    assert [*whole[:2], *learn(Replay(size=5, policy=policy), found[2:])] == whole
    other = learn(Replay(size=5, policy=policy, seed=1), stages(tmp_path / "other", tasks))
    assert [state["slots"] for state in other] != [state["slots"] for state in whole]


@pytest.mark.parametrize("share, replayed", [(0.25, 4), (0.5, 12), (0.8, 48), (0.01, 0)])
def test_the_share_is_reached_with_as_few_repetitions_as_possible(share, replayed, tasks, tmp_path):
    found = stages(tmp_path, tasks)
    plugin = Replay(size=5, share=share)
    learn(plugin, found)
    trained = plugin.training_samples(list(tasks[3].train), found[3])
    assert len(trained) == 12 + replayed
    assert plugin.training_samples(list(tasks[3].train), found[3]) == trained
    again = Counter(sample.id for sample in trained[12:])
    buffer = [name for _, name in json.loads((found[2].memory / "replay.json").read_text())["slots"]]
    times = [again[name] for name in buffer]
    assert sum(times) == replayed
    assert max(times) - min(times) <= 1


def test_data_that_changed_is_told(tasks, tmp_path):
    found = stages(tmp_path, tasks)
    learn(Replay(size=5), found[:1])
    slots = {"slots": [["a", "a-99"]], "tasks": {"a": 10}}
    atomic_json(found[0].memory / "replay.json", slots)
    with pytest.raises(DymoeError, match=r"replay.json: task 'a' has no training sample 'a-99'"):
        Replay(size=5).training_samples([], found[1])
    (found[0].memory / "replay.json").unlink()
    with pytest.raises(DymoeError, match="no such file"):
        Replay(size=5).training_samples([], found[1])
