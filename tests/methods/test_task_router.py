"""The task router: an explicit discriminant analysis as oracle, and what it selects is what the layers use."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from dymoe import methods
from dymoe.adapter import group_hash
from dymoe.adapter.observation import prompt_features
from dymoe.adapter.selectors.prototypes import Prototypes
from dymoe.errors import DymoeError
from dymoe.learning.groups import freeze_all, load_group, save_group, train_group
from dymoe.methods import Composed, Stage
from dymoe.methods.task_router import TaskRouter
from tests.adapter.conftest import randomise, small, tiny_llama
from tests.methods.toys import collate, data, stages, task

WIDTH = 5


def clouds(seed, sizes):
    """Features of one class each, correlated and on different scales, in float32."""
    generator = np.random.default_rng(seed)
    mix = generator.normal(size=(WIDTH, WIDTH)) * np.array([0.1, 1, 3, 1, 5])
    return [
        (generator.normal(size=(n, WIDTH)) @ mix + generator.normal(size=WIDTH) * 2).astype("float32") for n in sizes
    ]


def oracle(x, classes, shrinkage):
    """Nearest class by Mahalanobis distance, written as the formula says."""
    pooled = np.zeros((WIDTH, WIDTH))
    for rows in classes:
        for row in rows.astype("float64"):
            difference = row - rows.mean(0, dtype="float64")
            pooled += np.outer(difference, difference)
    pooled /= max(sum(map(len, classes)) - len(classes), 1)
    target = np.diag(np.maximum(np.diag(pooled), 1e-6 * np.diag(pooled).mean() or 1.0))
    inverse = np.linalg.inv((1 - shrinkage) * pooled + shrinkage * target)
    means = [rows.mean(0, dtype="float64") for rows in classes]
    return np.array([np.argmin([(row - m) @ inverse @ (row - m) for m in means]) for row in x.astype("float64")])


def fitted(groups, options=None):
    selector = Prototypes(WIDTH)
    for name, tasks in groups.items():
        selector.add_group(name, {"shrinkage": 0.1, **(options or {})})
        for number, rows in enumerate(tasks):
            selector.fit(name, f"{name}{number}", torch.from_numpy(rows))
    selector.set_adapter(list(groups))
    return selector


@pytest.mark.parametrize("shrinkage", [1e-3, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("sizes", [(9, 4, 12), (3, 2, 2), (1, 1, 1), (40, 40, 40)])
def test_the_nearest_class_is_that_of_explicit_discriminant_analysis(sizes, shrinkage):
    classes = clouds(1, sizes)
    x = np.concatenate(clouds(2, (30, 30)) + classes)
    expected = oracle(x, classes, shrinkage)
    apart = fitted({"a": classes[:1], "b": classes[1:2], "c": classes[2:]}, {"shrinkage": shrinkage})
    assert apart.nearest(torch.from_numpy(x), ["a", "b", "c"]).tolist() == expected.tolist()
    together = fitted({"a": classes[:2], "b": classes[2:]}, {"shrinkage": shrinkage})
    assert together.nearest(torch.from_numpy(x), ["a", "b"]).tolist() == expected.tolist()
    assert len(set(expected.tolist())) == 3


def test_the_shared_covariance_decides_not_the_euclidean_distance():
    classes = [np.array([[0, -9], [0, 9]]), np.array([[4, -9], [4, 9]])]
    rows = [
        np.pad(np.array(c, dtype="float32"), ((0, 0), (0, 3))) + np.eye(5, dtype="float32")[:2] * 0.1 for c in classes
    ]
    selector = fitted({"a": rows[:1], "b": rows[1:]}, {"shrinkage": 1.0})
    x = torch.tensor([[1.0, 40.0, 0, 0, 0], [3.5, -40.0, 0, 0, 0]])
    assert selector.nearest(x, ["a", "b"]).tolist() == [0, 1]


def test_a_constant_feature_does_not_break_the_covariance():
    classes = [rows * np.array([1, 0, 1, 0, 1], dtype="float32") for rows in clouds(3, (8, 8))]
    selector = fitted({"a": classes[:1], "b": classes[1:]})
    assert (
        selector.nearest(torch.from_numpy(classes[1]), ["a", "b"]).tolist() == oracle(classes[1], classes, 0.1).tolist()
    )


def test_a_deleted_or_inactive_group_leaves_no_trace_in_the_covariance():
    classes = clouds(4, (9, 7, 11))
    selector = fitted({"a": classes[:1], "b": classes[1:2], "c": classes[2:]})
    x = np.concatenate(classes)
    expected = oracle(x, [classes[0], classes[2]], 0.1).tolist()
    assert selector.nearest(torch.from_numpy(x), ["a", "c"]).tolist() == expected
    selector.delete_adapter("b")
    assert selector.nearest(torch.from_numpy(x), ["a", "c"]).tolist() == expected
    assert selector.classes(["a", "b", "c"]) == [("a", "a0"), ("c", "c0")]


@pytest.mark.parametrize("reach", ["own", "earlier"])
def test_what_is_selected(reach):
    classes = clouds(5, (9, 9, 9))
    selector = fitted({"a": classes[:1], "b": classes[1:], "new": []}, {"reach": reach})
    x = torch.from_numpy(np.concatenate(classes))
    prompt = SimpleNamespace(features=lambda: x)
    owners = np.array([0, 1, 1])[oracle(x.numpy(), classes, 0.1)]
    chosen = selector.select(prompt, ("a", "b", "new"))
    columns = np.arange(3)[None]
    expected = columns == owners[:, None] if reach == "own" else columns <= owners[:, None]
    assert chosen.dtype == torch.float32
    assert chosen.tolist() == expected.astype(float).tolist()
    assert selector.select(prompt, ("b",)) is None, "one group needs no choice"
    assert selector.select(prompt, ("new", "other")) is None, "nothing is known"
    selector.set_training_group("new")
    assert selector.select(prompt, ("a", "b")) is None, "a group trains"
    with pytest.raises(ValueError, match="no group has prototypes yet"):
        selector.nearest(x, ("new",))


def test_statistics_never_train():
    selector = fitted({"a": clouds(6, (4,))})
    selector.set_training_group("a")
    assert not any(parameter.requires_grad for parameter in selector.parameters())


# ---- in a model -------------------------------------------------------------------------------------------------

TASKS = [task("a", 12, 6, range(1, 4)), task("b", 12, 6, range(20, 23)), task("c", 12, 6, range(40, 43))]


def learn(folder, method, plugin, tasks=TASKS, upto=3):
    """Go through the stages without training: what a router knows does not depend on it."""
    composed, model, base = Composed(method, [plugin]), None, tiny_llama()
    for stage in stages(folder, tasks)[:upto]:
        group = composed.group(stage)
        model = train_group(base, model, group, composed.config(stage))
        randomise(model, [group])
        composed.after_task(model, stage, data(stage.tasks[0].train))
        freeze_all(model)
    return model.eval()


def dymoe(**changes):
    settings = {"num_experts": 3, "rank": 2, "top_k": 2, "lora_dropout": 0.0, **changes}
    return methods.create("dymoe", **settings)


def report(folder, index):
    return json.loads((folder / str(index) / "report.json").read_text())["locator"]


def prompts(task):
    batch = collate(task.validation)
    first = batch["labels"].ne(-100).int().argmax(1).min()
    return {key: batch[key][:, :first] for key in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("reach", ["own", "earlier"])
def test_every_sample_is_answered_by_its_tasks_group(tmp_path, reach):
    model = learn(tmp_path, dymoe(), TaskRouter(shrinkage=0.5, reach=reach))
    assert report(tmp_path, 2)["accuracy"] == 100.0, "the toy tasks share no word"
    alone = learn(tmp_path / "alone", dymoe(), TaskRouter(shrinkage=0.5))
    for number, found in enumerate(TASKS):
        active = ["a", "b", "c"][0 if reach == "earlier" else number : number + 1]
        alone.base_model.set_adapter(active)
        if len(active) > 1:  # the reference routes over these groups without any selection
            alone.base_model.selector.tasks = {}
        with torch.no_grad():
            mask = prompts(found)["attention_mask"].bool()
            logits = model(**prompts(found)).logits
            torch.testing.assert_close(logits[mask], alone(**prompts(found)).logits[mask], atol=1e-5, rtol=1e-4)
    groups, chosen = model.base_model.trace.context.selection
    assert (groups, chosen.tolist()) == (("a", "b", "c"), [[float(reach == "earlier")] * 2 + [1.0]] * 6)


def test_training_sees_all_groups(tmp_path):
    model = learn(tmp_path, dymoe(), TaskRouter())
    model.base_model.set_training_group("c")
    model.train()
    model(**collate(TASKS[0].train))
    assert model.base_model.trace.context.selection is None


def test_the_report_counts_right_choices(tmp_path):
    """Two tasks of the same words cannot be told apart: the report must say so."""
    tasks = [*TASKS[:2], task("x", 12, 6, range(1, 4), seed=3)]
    model = learn(tmp_path, dymoe(), TaskRouter(limit=8, check=5), tasks)
    found = report(tmp_path, 2)
    selector = model.base_model.selector
    for known in tasks:
        rows = prompt_features(model, data([]).batches(known.validation))
        names = ["a", "b", "x"]
        chosen = [names[place] for place in selector.nearest(rows, names).tolist()]
        row = found["tasks"][known.name]
        assert len(row["right"]) == 5
        assert sum(row["chosen"].values()) == 5
        # five of the six validation samples were asked
        assert 0 <= chosen.count(known.name) - row["chosen"].get(known.name, 0) <= 1
        assert row["accuracy"] == 20.0 * row["chosen"].get(known.name, 0) == 20.0 * sum(row["right"])
    assert found["accuracy"] == pytest.approx(sum(row["accuracy"] for row in found["tasks"].values()) / 3)
    assert set(load_file(tmp_path / "2" / "task-router.safetensors")) == {"x"}, "earlier features are read back"


def test_features_are_those_of_the_frozen_base_at_the_last_prompt_token(tmp_path):
    model = learn(tmp_path, dymoe(), TaskRouter(), upto=1)
    base = tiny_llama().eval()
    rows = prompt_features(model, data([]).batches(TASKS[1].train))
    for sample, row in zip(TASKS[1].train, rows, strict=True):
        ids = torch.tensor([[int(word) for word in sample.question.split()]])
        with torch.no_grad():
            torch.testing.assert_close(row, base.model(ids).last_hidden_state[0, -1], atol=1e-5, rtol=1e-4)


def test_saved_groups_choose_the_same(tmp_path):
    model = learn(tmp_path, dymoe(), TaskRouter())
    loaded = None
    for name in ("a", "b", "c"):
        save_group(model, name, tmp_path / name)
        loaded = load_group(tiny_llama(), loaded, name, tmp_path / name)
        assert group_hash(loaded, name) == group_hash(model, name)
    with torch.no_grad():
        for found in TASKS:
            assert torch.equal(model(**prompts(found)).logits, loaded.eval()(**prompts(found)).logits)
    assert loaded.base_model.selector.classes(["a", "b", "c"]) == [("a", "a"), ("b", "b"), ("c", "c")]


def test_a_shared_group_keeps_several_prototypes_and_is_always_selected(tmp_path):
    model = learn(tmp_path, methods.create("lora", rank=2), TaskRouter(shrinkage=0.5))
    selector = model.base_model.selector
    assert selector.classes(["shared"]) == [("shared", "a"), ("shared", "b"), ("shared", "c")]
    assert report(tmp_path, 2)["accuracy"] == 100.0
    model(**prompts(TASKS[0]))
    assert model.base_model.trace.context.selection is None
    save_group(model, "shared", tmp_path / "saved")
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "saved", adapter_name="shared")
    assert again.base_model.selector.dymoe_means["shared"].shape == (3, 32)
    assert group_hash(again, "shared") == group_hash(model, "shared")


def test_a_stage_done_again_gives_the_same_group(tmp_path):
    whole = learn(tmp_path, dymoe(), TaskRouter())
    kept = (tmp_path / "2" / "report.json").read_bytes()
    again = learn(tmp_path, dymoe(), TaskRouter())  # over the files of the first
    selectors = [model.base_model.selector for model in (whole, again)]
    for attribute in Prototypes.adapter_layer_names:
        for group in "abc":
            assert torch.equal(*(getattr(selector, attribute)[group] for selector in selectors))
    assert (tmp_path / "2" / "report.json").read_bytes() == kept


def test_an_empty_validation_split_is_left_out(tmp_path):
    tasks = [TASKS[0], task("z", 6, 0)]
    learn(tmp_path, dymoe(), TaskRouter(), tasks, upto=2)
    assert set(report(tmp_path, 1)["tasks"]) == {"a"}


STAGE = Stage(1, "a", (TASKS[0],), None)


def test_a_selector_trained_with_the_experts_is_refused_in_one_line():
    with pytest.raises(DymoeError) as caught:
        TaskRouter().config(small(gate="uniform", selector="keys"), STAGE)
    assert str(caught.value).startswith("with.task-router: this method trains its own selector (keys)")
    assert "\n" not in str(caught.value)


def test_a_fitted_locator_is_replaced_and_a_linear_gate_reaches_its_own_group():
    given = small(gate="linear", selector="vae", selector_options={"hidden": 8, "latent": 2})
    config = TaskRouter(reach="earlier", shrinkage=0.3).config(given, STAGE)
    assert config.selector == "prototypes"
    assert config.selector_options == {"tasks": [], "shrinkage": 0.3, "reach": "own"}
    changed = {key for key, value in config.to_dict().items() if value != given.to_dict()[key]}
    assert changed == {"selector", "selector_options"}
    assert TaskRouter(reach="earlier").config(small(), STAGE).selector_options["reach"] == "earlier"


def test_the_config_of_every_stage_has_options_of_its_own():
    router = TaskRouter()
    one, two = (router.config(small(), STAGE) for _ in range(2))
    assert one.selector_options is not two.selector_options
    assert one.selector_options["tasks"] is not two.selector_options["tasks"]


def test_a_new_group_without_statistics_is_saved_and_loaded(tmp_path):
    model = get_peft_model(tiny_llama(), TaskRouter().config(small(), STAGE), adapter_name="a")
    save_group(model, "a", tmp_path / "a")
    loaded = load_group(tiny_llama(), None, "a", tmp_path / "a")
    assert group_hash(loaded, "a") == group_hash(model, "a")
    assert loaded.base_model.selector.classes(["a"]) == []
