"""The adapter as its clients use it: plain PEFT, plain Trainer, torch's copies and pickles. Names first."""

import copy
import io
import pickle
import random
import string
import subprocess
import sys
import warnings
from types import MethodType

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.utils.hotswap import hotswap_adapter
from torch import nn
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainerCallback, TrainingArguments

from dymoe import DymoeError, group_hash
from dymoe.models import Collator, load
from dymoe.names import safe_name
from dymoe.tasks import load_stream

from .conftest import padded_batch, randomise, small, tiny_llama


def bank(*groups, **config):
    """A tiny model with these groups, every one of them with values of its own."""
    model = get_peft_model(tiny_llama(), small(**config), adapter_name=groups[0])
    for group in groups[1:]:
        model.add_adapter(group, small(**config))
    randomise(model)
    return model


def hashes(model):
    return {group: group_hash(model, group) for group in model.peft_config}


def loaded(folder, groups):
    """What plain PEFT reads from a folder that `save_pretrained` wrote."""
    places = [folder if group == "default" else folder / group for group in groups]
    model = PeftModel.from_pretrained(tiny_llama(), places[0], adapter_name=groups[0])
    for group, place in zip(groups[1:], places[1:], strict=True):
        model.load_adapter(place, adapter_name=group)
    return model


def state(model):
    """Everything of a model that a refused call must leave as it was."""
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    trains = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    modules = {name: type(module) for name, module in model.named_modules()}
    hooks = {
        name: len(module._forward_hooks) + len(module._forward_pre_hooks) for name, module in model.named_modules()
    }
    return tensors, trains, modules, hooks


def assert_as_it_was(model, before):
    after = state(model)
    assert before[1:] == after[1:]
    assert before[0].keys() == after[0].keys()
    assert all(torch.equal(value, after[0][name]) for name, value in before[0].items())


# ---- names ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["0", "mlp", "layers", "self_attn", "weight", "model", "dymoe_A", "items", "v1.0"])
def test_a_name_that_would_lose_tensors_is_refused_before_anything_changes(name):
    base = tiny_llama()
    before = state(base)
    with pytest.raises(DymoeError, match="for example 'birds'"):
        get_peft_model(base, small(), adapter_name=name)
    assert_as_it_was(base, before)
    model = bank("birds")
    before = state(model)
    with pytest.raises(DymoeError, match="for example 'birds'"):
        model.add_adapter(name, small())
    assert_as_it_was(model, before)
    assert list(model.peft_config) == model.active_adapters == ["birds"]
    with pytest.raises(KeyError):
        model.peft_config[name]


def test_groups_that_differ_by_case_alone_are_refused():
    with pytest.raises(DymoeError, match="differs from 'birds' by case"):
        bank("birds", "Birds")


@pytest.mark.parametrize(
    "names",
    [
        ("a", "a_b"),
        ("task1", "task", "task10"),
        ("birds & plates", "V\u00f6gel", "\u9ce5-\u00fc"),
        ("birds", "default"),
        ("default", "birds"),
        ("e", "moe", "dymoe"),
        ("A_proj", "proj", "q"),
    ],
    ids=ascii,
)
def test_similar_and_foreign_names_come_back_as_they_were(tmp_path, names):
    model = bank(*names)
    model.save_pretrained(tmp_path)
    assert hashes(loaded(tmp_path, names)) == hashes(model)


def random_name(generator):
    """A name of any letters; half of them are pieces of the model's own names."""
    pieces = ["layers", "0", "mlp", "q_proj", "dymoe", "_", "-", " ", "a", "\u00e9", "\u5b57", *string.ascii_letters]
    return "".join(generator.choice(pieces) for _ in range(generator.randint(1, 4)))


@pytest.mark.parametrize("seed", range(8))
def test_two_groups_of_any_safe_names_come_back_as_they_were(tmp_path, seed):
    generator = random.Random(seed)
    names = []
    while len(names) < 2:
        name = random_name(generator)
        try:
            names.append(safe_name(name, others=names))
            get_peft_model(tiny_llama(), small(), adapter_name=name)
        except DymoeError:
            names = names[:-1] if name in names else names
    model = bank(*names)
    model.save_pretrained(tmp_path)
    assert hashes(loaded(tmp_path, names)) == hashes(model)


# ---- refusals leave nothing behind ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["nothing"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"selector": "keys", "selector_options": {"hidden": 0}},
        {"selector": "keys", "target_modules": ["q_proj", "lm_head"]},
        {"selector": "none such"},
    ],
    ids=["no target", "no linear", "selector's options", "outside of the decoder", "no selector"],
)
def test_a_refused_group_leaves_the_model_as_it_was(config):
    base = tiny_llama()
    before = state(base)
    with pytest.raises(ValueError):
        get_peft_model(base, small(**config), adapter_name="birds")
    assert_as_it_was(base, before)
    first = {"selector": config["selector"]} if config.get("selector") == "keys" else {}
    model = bank("birds", **first)
    before = state(model)
    with pytest.raises(ValueError):
        model.add_adapter("plates", small(**config))
    assert_as_it_was(model, before)
    assert model.base_model.stage == list(model.peft_config) == ["birds"]
    model.add_adapter("plates", small(**first))
    assert model.base_model.training_group == "plates"


# ---- a plain Trainer from the second group on -------------------------------------------------------------------


def examples(count=12):
    """Rows of nine tokens with between one and eight labels."""
    generator = torch.Generator().manual_seed(5)
    rows = torch.randint(1, 60, (count, 9), generator=generator)
    labels = [row.masked_fill(torch.arange(9) <= place % 8, -100) for place, row in enumerate(rows)]
    return [
        {"input_ids": row, "labels": one, "attention_mask": torch.ones_like(row)}
        for row, one in zip(rows, labels, strict=True)
    ]


def arguments(folder, kind=TrainingArguments, **options):
    fixed = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_steps": 1, "save_strategy": "no"}
    sizes = {"max_steps": 4, "per_device_train_batch_size": 3, "learning_rate": 1e-2}
    return kind(output_dir=str(folder), **{**fixed, **sizes, **options})


class Stop(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


class Hashes(TrainerCallback):
    """The training group's hash at every save."""

    def __init__(self):
        self.at = {}

    def on_save(self, args, state, control, model=None, **kwargs):
        self.at[state.global_step] = group_hash(model, model.active_adapters[0])


@pytest.mark.parametrize("names", [("birds", "plates"), ("birds", "default"), ("a", "b", "c")])
def test_a_resumed_training_ends_as_an_undisturbed_one(tmp_path, names):
    whole, cut, resumed = (bank(*names, lora_dropout=0.2) for _ in range(3))
    Trainer(whole, arguments(tmp_path / "whole"), train_dataset=examples()).train()
    saving = arguments(tmp_path / "cut", save_strategy="steps", save_steps=1, save_total_limit=1)
    Trainer(cut, saving, train_dataset=examples(), callbacks=[Stop(2)]).train()
    assert [path.name for path in (tmp_path / "cut").iterdir()] == ["checkpoint-2"]
    Trainer(resumed, saving, train_dataset=examples()).train(resume_from_checkpoint=True)
    assert hashes(resumed) == hashes(whole)
    assert hashes(resumed)[names[-1]] != hashes(cut)[names[-1]]
    assert resumed.base_model.stage == list(names)
    assert resumed.base_model.training_group == names[-1]


@pytest.mark.parametrize("names", [("birds", "plates"), ("birds", "default"), ("birds",)])
def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path, names):
    model, seen = bank(*names), Hashes()
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1, "save_total_limit": 1}
    options = arguments(tmp_path, save_strategy="steps", save_steps=1, learning_rate=1.0, **best)
    trainer = Trainer(model, options, train_dataset=examples(), eval_dataset=examples(4), callbacks=[seen])
    trainer.train()
    losses = {row["step"]: row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row}
    first = min(losses, key=losses.get)
    assert first < 4, "the last checkpoint is the best: nothing would be shown"
    assert group_hash(model, names[-1]) == seen.at[first]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[first], rel=1e-5)


def test_evaluation_has_no_routing_terms_and_may_generate(tmp_path):
    model, data = bank("birds", "plates", load_balance=1.0, exclusivity=1.0, specialization=1.0), examples(3)
    batch = {key: torch.stack([row[key] for row in data]) for key in data[0]}
    with torch.no_grad():
        plain = float(model.eval()(**batch).loss)
    for only in (True, False):
        trainer = Trainer(model, arguments(tmp_path, prediction_loss_only=only), eval_dataset=data)
        assert trainer.evaluate()["eval_loss"] == pytest.approx(plain, rel=1e-5)
    options = arguments(tmp_path, Seq2SeqTrainingArguments, predict_with_generate=True, generation_max_length=12)
    found = Seq2SeqTrainer(model, options).predict(data).predictions
    asked = {key: batch[key] for key in ("input_ids", "attention_mask")}
    assert torch.equal(torch.as_tensor(found)[:, :12], model.generate(**asked, max_length=12))


# ---- losses that the model does not compute ---------------------------------------------------------------------


def own_loss(outputs, labels, num_items_in_batch=None):
    """The sum over this micro-batch's labels divided by the whole batch's."""
    flat = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    items = (labels[:, 1:] != -100).sum() if num_items_in_batch is None else num_items_in_batch
    return nn.functional.cross_entropy(*flat, reduction="sum") / items


class OwnTrainer(Trainer):
    """Computes the loss itself; the model never sees the labels."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch)
        loss = own_loss(outputs, labels, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss


def terms_step(folder, weight, kind=Trainer, accumulation=3, loss=None, **options):
    """How far the routing terms move the new routers in one step of plain gradient descent."""
    steps = []
    for scale in (weight, 0.0):
        config = {"load_balance": scale, "exclusivity": scale, "specialization": scale}
        model = bank("birds", "plates", **config)
        before = routers(model).clone()
        fixed = {"max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0}
        sizes = {"per_device_train_batch_size": 6 // accumulation, "gradient_accumulation_steps": accumulation}
        kind(
            model,
            arguments(folder, lr_scheduler_type="constant", **fixed, **sizes, **options),
            train_dataset=examples(6),
            compute_loss_func=loss,
        ).train()
        steps.append(routers(model) - before)
    return steps[0] - steps[1]


def routers(model):
    return torch.cat([p.detach().flatten() for name, p in model.named_parameters() if name.endswith("router.plates")])


@pytest.mark.parametrize("accumulation", [1, 3])
def test_terms_weigh_the_same_whoever_computes_the_loss(tmp_path, accumulation):
    def step(**options):
        return terms_step(tmp_path, 0.1, accumulation=accumulation, **options)

    plain = step()
    assert plain.abs().max() > 1e-4
    ways = (
        {"label_smoothing_factor": 1e-9},
        {"loss": own_loss},
        {"kind": OwnTrainer},
        {"average_tokens_across_devices": False},
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="dymoe")
        for way in ways:
            torch.testing.assert_close(step(**way), plain, atol=1e-5, rtol=1e-3, msg=str(way))


def test_a_loss_of_ones_own_without_the_number_of_items_is_said_once(batch):
    model = bank("birds", "plates").train()
    labels = batch.pop("labels")
    with pytest.warns(UserWarning, match=r"routing terms weigh 1 in every backward pass.*trace\.attach"):
        own_loss(model(**batch), labels).backward()
    told = model.base_model.trace
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        told.attach(own_loss(model(**batch), labels)).backward()


def test_a_tuple_instead_of_a_named_output_carries_the_terms_too(batch):
    named, plain = (bank("birds", "plates", load_balance=1.0).train() for _ in range(2))
    loss = named(**batch).loss
    other = plain(**batch, return_dict=False)[0]
    assert torch.equal(loss, other)
    for one in (2 * loss, 2 * other):
        one.backward()
    for mine, theirs in zip(named.parameters(), plain.parameters(), strict=True):
        assert mine.grad is theirs.grad or torch.equal(mine.grad, theirs.grad)


# ---- PEFT's shorthands ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "targets, layers",
    [
        ({"target_modules": "all-linear"}, 14),
        ({"target_modules": "ALL-LINEAR", "exclude_modules": ["q_proj"]}, 12),
        ({"target_modules": r".*layers\.1\..*\.(q|v)_proj"}, 2),
        ({"target_modules": r".*_proj", "exclude_modules": r".*layers\.0\..*"}, 7),
        ({"target_modules": ["q_proj", "self_attn.v_proj"]}, 4),
        ({}, 14),
    ],
    ids=str,
)
def test_every_shorthand_of_targets_serves_a_second_group_too(tmp_path, targets, layers):
    model = bank("birds", "plates", **targets)
    wrapped = model.base_model.layers()
    assert len(wrapped) == layers
    assert all(list(layer.group_configs) == ["birds", "plates"] for layer in wrapped)
    assert not any("base_layer.base_layer" in name for name, _ in model.named_modules())
    model.save_pretrained(tmp_path)
    assert hashes(loaded(tmp_path, ("birds", "plates"))) == hashes(model)


def test_a_second_group_may_have_other_targets(batch):
    model = get_peft_model(tiny_llama(), small(target_modules=["q_proj"]), adapter_name="birds")
    model.add_adapter("plates", small(target_modules=["v_proj"]))
    assert len(model.base_model.layers()) == 4
    model.train()(**batch).loss.backward()
    got = {name.rpartition(".")[2] for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert got == {"plates"}


@pytest.mark.parametrize("key", ["modules_to_save", "layers_to_transform", "layers_pattern", "bias"])
def test_settings_of_other_methods_are_refused(key):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{key}'"):
        small(**{key: ["x"]})


# ---- copies, pickles, processes ---------------------------------------------------------------------------------


def through_torch(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model)), "save": through_torch}


@pytest.mark.parametrize("selector", ["none", "keys"])
@pytest.mark.parametrize("way", COPIES)
def test_a_copy_made_after_a_step_goes_on_by_itself(batch, way, selector):
    model = bank("birds", selector=selector).train()
    for group in (None, "plates"):
        if group is not None:
            model.add_adapter(group, small(selector=selector))
            model.train()
        with model.base_model.trace.measuring():
            model(**batch).loss.backward()
            other = COPIES[way](model)
        assert other.base_model.trace is not model.base_model.trace
        assert {id(layer.trace) for layer in other.base_model.layers()} == {id(other.base_model.trace)}
        model.zero_grad(), other.zero_grad()
        loss, same = model(**batch).loss, other(**batch).loss
        assert torch.equal(loss, same)
        (loss + 0).backward(), (same + 0).backward()
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            assert (mine.grad is None and theirs.grad is None) or torch.equal(mine.grad, theirs.grad)
        before = hashes(model)
        with torch.no_grad():
            next(p for p in other.parameters() if p.requires_grad).add_(1)
        assert hashes(model) == before != hashes(other)
        other.add_adapter("cars", small(selector=selector))
        assert other.base_model.training_group == "cars"
        assert "cars" not in model.peft_config


def test_a_model_that_saw_a_picture_is_pickled_and_sees_the_next(tiny_folder):
    lvlm = load(str(tiny_folder), "float32")
    assert pickle.loads(pickle.dumps(lvlm.model)).config.model_type == lvlm.model.config.model_type
    sample = load_stream("pocket-coin", tasks=["ImageNet"]).tasks[0].train[0]
    model = get_peft_model(lvlm.model, small(), adapter_name="birds")
    batch = Collator(lvlm)([sample])
    loss = model(**batch).loss
    for other in (pickle.loads(pickle.dumps(model)), pickle.loads(pickle.dumps(lvlm)).model):
        assert torch.equal(other(**batch).loss, loss)
    assert torch.equal(model(**batch).loss, loss)


def loss_in_another_process(model, queue):
    queue.put(float(model(**padded_batch()).loss.detach()))


@pytest.mark.slow
def test_a_spawned_process_takes_the_model_after_a_step(batch):
    model = bank("birds", "plates").train()
    model(**batch).loss.backward()
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=loss_in_another_process, args=(model, queue))
    process.start()
    assert queue.get(timeout=120) == pytest.approx(float(model(**batch).loss.detach()), rel=1e-6)
    process.join()


# ---- PEFT's other calls -----------------------------------------------------------------------------------------


def logits(model, batch):
    with torch.no_grad():
        return model.eval()(**batch).logits


def with_values_of(model, *groups):
    """A model of these groups alone."""
    alone = bank(*groups)
    alone.load_state_dict(model.state_dict(), strict=False)
    return alone


def assert_same_logits(model, other, batch):
    torch.testing.assert_close(logits(model, batch), logits(other, batch), atol=1e-5, rtol=1e-5)


def trains(model):
    return {name.rpartition(".")[2] for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m, b: m(**b, adapter_names=["birds"] * 3), "adapter_names: samples of one batch"),
        (lambda m, b: m.generate(input_ids=b["input_ids"], adapter_names=["birds"] * 3), "adapter_names: samples"),
        (lambda m, b: m.add_weighted_adapter(["birds", "plates"], [1, 1], "both"), "cannot be combined into one"),
        (lambda m, b: m.merge_adapter(), "cannot be merged"),
        (lambda m, b: m.merge_and_unload(), "cannot be merged"),
        (lambda m, b: m.base_model.set_adapter(["birds", "cars"]), "no expert group 'cars'; there are birds, plates"),
        (lambda m, b: m.set_adapter("cars"), "cars not found"),
        (lambda m, b: m.delete_adapter("cars"), "cars does not exist"),
        (lambda m, b: m.add_adapter("birds", small()), "already exists"),
        (lambda m, b: m.add_adapter("cars", LoraConfig(target_modules=["q_proj"])), "Cannot combine adapters"),
        (lambda m, b: get_peft_model(m, small(), adapter_name="cars"), "add the next one by `add_adapter`"),
        (lambda m, b: inject_adapter_in_model(small(), m.base_model.model, "cars"), "has expert groups already"),
        (lambda m, b: get_peft_model(tiny_llama(), small(), mixed=True), "not compatible with the `PeftMixedModel`"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_right_is_one_error_and_changes_nothing(batch, call, message):
    model = bank("birds", "plates")
    before = state(model)
    with pytest.raises((ValueError, NotImplementedError)) as caught:
        call(model, batch)
    assert message in str(caught.value)
    assert_as_it_was(model, before)
    assert model.base_model.stage == list(model.peft_config) == ["birds", "plates"]


def test_hotswap_is_refused(tmp_path):
    model = bank("birds", "plates")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="DYMOE was passed"):
        hotswap_adapter(model, str(tmp_path / "birds"), adapter_name="plates")


def test_a_single_name_chooses_the_stage_that_its_group_ended(batch):
    model = bank("a", "b", "c")
    model.set_adapter("b")
    assert model.base_model.stage == ["a", "b"]
    assert trains(model) == set()
    assert_same_logits(model, with_values_of(model, "a", "b"), batch)
    model.set_adapter("c")
    assert model.base_model.stage == ["a", "b", "c"]
    assert model.active_adapters == ["c", "a", "b"]
    assert trains(model) == {"c"}
    model.set_adapter("c", inference_mode=True)
    assert trains(model) == set()


def test_grad_switches_name_the_group_that_trains():
    model = bank("a", "b", rsr_start=0.25)
    model.set_requires_grad("b", requires_grad=False)
    assert (trains(model), model.base_model.training_group) == (set(), None)
    model.set_requires_grad(["a"])
    assert (trains(model), model.active_adapters) == ({"a"}, ["a", "b"])
    assert model.base_model.trace.context.rsr_start == 0.25


def test_deleting_the_training_group_leaves_the_others(batch):
    model = bank("a", "b")
    model.delete_adapter("b")
    assert (trains(model), model.active_adapters) == (set(), ["a"])
    assert_same_logits(model, with_values_of(model, "a"), batch)
    model.add_adapter("c", small())
    assert (trains(model), model.base_model.stage) == ({"c"}, ["a", "c"])


def test_status_tells_groups_and_disabling_ends(batch):
    model = bank("a", "b")
    status = model.get_model_status()
    assert (status.enabled, status.active_adapters, status.available_adapters) == (True, ["a", "b"], ["a", "b"])
    assert (status.requires_grad, status.peft_types) == ({"a": False, "b": True}, {"a": "DYMOE", "b": "DYMOE"})
    assert {tuple(layer.active_adapters) for layer in model.get_layer_status()} == {("a", "b")}
    with model.disable_adapter():
        assert model.get_model_status().enabled is False
        assert torch.equal(logits(model, batch), logits(tiny_llama(), batch))
    assert model.get_model_status().enabled is True
    assert trains(model) == {"b"}


@pytest.mark.parametrize(
    "options", [{}, {"low_cpu_mem_usage": True}, {"autocast_adapter_dtype": False}], ids=lambda value: str(*value)
)
def test_groups_are_loaded_from_subfolders(tmp_path, batch, options):
    model = bank("a", "b")
    model.save_pretrained(tmp_path, selected_adapters=["b"])
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"b"}
    model.save_pretrained(tmp_path, selected_adapters=["a"])
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path, subfolder="a", adapter_name="a", **options)
    again.load_adapter(tmp_path, subfolder="b", adapter_name="b", is_trainable=True, **options)
    assert hashes(again) == hashes(model)
    assert (trains(again), again.active_adapters) == ({"b"}, ["b", "a"])
    model.train()(**batch).loss.backward(), again.train()(**batch).loss.backward()
    mine, theirs = ([p.grad for n, p in one.named_parameters() if n.endswith(".b")] for one in (model, again))
    assert all(torch.equal(one, other) for one, other in zip(mine, theirs, strict=True))


def test_parameters_put_in_the_place_of_others_are_used(batch):
    model, other = bank("a", "b"), bank("a", "b")
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "dymoe_B" in name:
                parameter.mul_(3)
    logits(model, batch)
    model.load_state_dict(other.state_dict(), assign=True)
    assert torch.equal(logits(model, batch), logits(other, batch))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_in_half_precision_trains(batch, dtype):
    model = bank("a", "b").to(dtype).train()
    reference = bank("a", "b").train()
    loss = model(**batch).loss
    assert float(loss.detach()) == pytest.approx(float(reference(**batch).loss.detach()), rel=0.02)
    loss.backward()
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {dtype}
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_input_gradients_change_no_other_gradient(batch):
    model, other = bank("a", "b").train(), bank("a", "b").train()
    other.enable_input_require_grads()
    model(**batch).loss.backward(), other(**batch).loss.backward()
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert (mine.grad is None and theirs.grad is None) or torch.equal(mine.grad, theirs.grad)


def test_pefts_class_for_causal_models_is_the_same_model(batch):
    model, plain = bank("a", "b", task_type="CAUSAL_LM"), bank("a", "b")
    assert isinstance(model.generate, MethodType)
    assert torch.equal(logits(model, batch), logits(plain, batch))
    asked = {key: batch[key] for key in ("input_ids", "attention_mask")}
    assert torch.equal(model.generate(**asked, max_new_tokens=3), plain.generate(**asked, max_new_tokens=3))


def test_unloading_gives_the_base_back():
    base = tiny_llama()
    base.requires_grad_(False)
    before = state(base)
    model = get_peft_model(base, small(selector="keys"), adapter_name="a")
    model.add_adapter("b", small(selector="keys"))
    assert_as_it_was(model.unload(), before)


@pytest.mark.parametrize("first", ["from peft import LoraConfig", "from transformers import Trainer"])
def test_libraries_may_be_imported_before_dymoe(first: str) -> None:
    code = f"{first}\nimport dymoe\nfrom transformers import Trainer\nfrom peft import get_peft_model"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
