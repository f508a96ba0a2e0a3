"""The adapter as its clients use it: plain PEFT, plain Trainer, torch's copies and pickles. Names first."""

import random
import string

import pytest
import torch
from peft import PeftModel, get_peft_model

from dymoe import DymoeError, group_hash
from dymoe.names import safe_name

from .conftest import randomise, small, tiny_llama


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
