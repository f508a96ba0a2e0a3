"""A model whose layers compute by Triton kernels learns what the plain one does: loss terms, gradients, answers."""

import pytest
import torch
from peft import get_peft_model

pytest.importorskip("triton")

from tests.adapter.conftest import randomise, small, tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def grown(compute, groups, checkpointing=False, **kwargs):
    """A model with some groups in one layer's linears, the last training; several tokens a program."""
    model = tiny_llama().to(DEVICE)
    config = {"target_modules": ["q_proj", "down_proj"], "top_k": 3, "compute": compute, "temperature": 0.1, **kwargs}
    model = get_peft_model(model, small(**config), adapter_name="one")
    for name in ("two", "three")[: groups - 1]:
        model.add_adapter(name, small(**config))
    randomise(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return model.to(DEVICE)


def learned(model, batch, scale=1.0):
    model.train()
    outputs = model(**{key: value.to(DEVICE) for key, value in batch.items()})
    (outputs.loss * scale).backward()
    return outputs, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture(autouse=True)
def fused(monkeypatch):
    """The fused calls that layers make, by name; with fewer programs for the interpreter."""
    from dymoe.adapter import layer
    from dymoe.adapter.ops.triton import route

    usual, calls = route.tile_of, []
    monkeypatch.setattr(route, "tile_of", lambda tokens, experts: (16, *usual(tokens, experts)[1:]))
    for name in ("route", "group_mass"):

        def counted(*arguments, name=name):
            calls.append(name)
            return getattr(route, name)(*arguments)

        monkeypatch.setattr(layer, name, counted)
    return calls


@pytest.mark.parametrize("groups", [1, 3])
def test_a_step_is_that_of_the_plain_model(groups, batch, fused):
    results = []
    for compute, checkpointing in (("stacked", False), ("triton", groups == 3)):
        model = grown(compute, groups, checkpointing, exclusivity=0.1, specialization=0.1)
        results.append(learned(model, batch, scale=3.0))
        assert ("route" in fused) == (compute == "triton")
        assert ("group_mass" in fused) == (compute == "triton" and groups > 1)
    (plain, plain_gradients), (other, gradients) = results
    torch.testing.assert_close(other.loss, plain.loss, atol=1e-5, rtol=1e-5)
    assert gradients.keys() == plain_gradients.keys()
    for name, gradient in plain_gradients.items():
        scale = float(gradient.abs().max())
        assert scale > 0, name
        torch.testing.assert_close(gradients[name], gradient, atol=1e-4 * scale, rtol=1e-3, msg=name)


def test_answers_are_those_of_the_plain_model(batch, fused):
    ids = batch["input_ids"][2:].to(DEVICE)
    answers = [
        grown(compute, 2).eval().generate(input_ids=ids, max_new_tokens=2, do_sample=False)
        for compute in ("stacked", "triton")
    ]
    assert torch.equal(*answers)
    assert len(fused) == 2 * 4  # tokens x layers


def test_other_gates_are_the_plain_ones(batch, fused):
    for gate in ("linear", "uniform"):
        results = [learned(grown(compute, 2, gate=gate), batch) for compute in ("stacked", "triton")]
        assert "route" not in fused
        for name, gradient in results[0][1].items():
            torch.testing.assert_close(results[1][1][name], gradient, atol=1e-5, rtol=1e-3, msg=name)
