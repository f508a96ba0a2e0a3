"""LwF's divergence position by position, and a teacher that leaves no trace."""

import copy
import itertools
import math

import pytest
import torch

from dymoe.learning.loss import answer_logits
from dymoe.methods.lwf import divergence
from tests.methods.parameter_cases import begin, change, collate, data, make, samples, stage


def slow_divergence(old, new, labels, temperature):
    """KL at each position whose next token is learned, in Python's floats; logits of all positions."""
    found = []
    for row in range(labels.shape[0]):
        for place in range(labels.shape[1] - 1):
            if labels[row, place + 1] == -100:
                continue
            probabilities = []
            for logits in (old, new):
                powers = [math.exp(value / temperature) for value in logits[row, place].tolist()]
                probabilities.append([power / sum(powers) for power in powers])
            found.append(sum(p * math.log(p / q) for p, q in zip(*probabilities, strict=True)))
    return sum(found) / len(found)


@pytest.mark.parametrize("kept, temperature", itertools.product([6, 9], [0.5, 1.0, 2.0]))
def test_divergence_position_by_position(kept, temperature):
    generator = torch.Generator().manual_seed(4)
    old, new = (torch.randn(3, 9, 7, generator=generator) for _ in range(2))
    labels = collate(samples(3))["labels"]
    assert answer_logits(labels) <= kept
    found = divergence(old[:, -kept:], new[:, -kept:], labels, temperature)
    assert found.item() == pytest.approx(slow_divergence(old, new, labels, temperature), rel=1e-5)
    assert divergence(new[:, -kept:], new[:, -kept:], labels, temperature).item() == pytest.approx(0, abs=1e-7)
    half = divergence(old[:, -kept:].bfloat16(), new[:, -kept:].bfloat16(), labels, temperature)
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(found.item(), rel=0.05)


def test_nothing_to_learn_is_no_divergence():
    logits = torch.randn(2, 4, 5)
    assert divergence(logits, -logits, torch.full((2, 4), -100), 2.0).item() == 0.0


def second_task(folder, dropout=0.0, dtype="float32", **settings):
    """Method and model in the middle of the second task, with a copy of the model before it."""
    method = make("lwf", lora_dropout=dropout, **settings)
    at, given = stage(folder, 1), data(samples(4), dtype)
    model = begin(method, None, at)
    method.before_task(model, at, given)
    assert method.loss_terms(model, {}, None) == {}
    change(model, 1)
    method.after_task(model, at, given)
    before = copy.deepcopy(model).eval()
    at = stage(folder, 2)
    model = begin(method, model, at)
    method.before_task(model, at, given)
    change(model, 2)
    return method, model.train(), before


def forward(model, batch):
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    return model(**inputs, logits_to_keep=answer_logits(batch["labels"]))


@pytest.mark.parametrize("temperature, weight, dropout", itertools.product([2.0, 3.0], [1.0, 0.25], [0.0, 0.4]))
def test_the_teacher_is_the_model_before_the_task(temperature, weight, dropout, tmp_path):
    method, model, before = second_task(tmp_path, dropout, temperature=temperature, distillation=weight)
    batch = collate(samples(3))
    outputs = forward(model, batch)
    found = method.loss_terms(model, batch, outputs)
    with torch.no_grad():
        old = before(input_ids=batch["input_ids"]).logits
    new = torch.zeros_like(old)
    new[:, -outputs.logits.shape[1] :] = outputs.logits.detach()
    expected = weight * temperature**2 * slow_divergence(old, new, batch["labels"], temperature)
    assert set(found) == {"distillation"}
    assert found["distillation"].item() == pytest.approx(expected, rel=1e-4)


def test_the_gradient_is_the_students_alone(tmp_path):
    method, model, before = second_task(tmp_path)
    batch = collate(samples(3))
    method.loss_terms(model, batch, outputs := forward(model, batch))["distillation"].backward()
    found = [value.grad for value in model.parameters() if value.requires_grad]
    model.zero_grad()
    with torch.no_grad():
        old = torch.softmax(forward(before, batch).logits / 2, -1)
    learned = batch["labels"][:, -outputs.logits.shape[1] + 1 :] != -100
    log = torch.log_softmax(forward(model, batch).logits / 2, -1)
    # Cross entropy differs from KL by the teacher's entropy, which has no gradient.
    (-4 * (old * log).sum(-1)[:, :-1][learned].mean()).backward()
    assert any(gradient.abs().sum() > 0 for gradient in found)
    expected = [value.grad for value in model.parameters() if value.requires_grad]
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_teachers_pass_leaves_everything_as_it_was(dtype, tmp_path):
    method, model, _ = second_task(tmp_path, dropout=0.3, dtype=dtype)
    batch = collate(samples(3))
    trace = model.base_model.trace
    seen = []
    trace.observers.append(seen.append)
    outputs = forward(model, batch)
    state, noted, random = dict(vars(trace)), len(seen), torch.get_rng_state()
    parameters = {name: (id(value), value.detach().clone()) for name, value in model.named_parameters()}
    method.loss_terms(model, batch, outputs)
    assert noted == 14
    assert len(seen) == noted
    assert all(vars(trace)[key] is value for key, value in state.items())
    assert model.training
    assert all(module.training for module in model.base_model.layers())
    assert torch.equal(torch.get_rng_state(), random)
    for name, value in model.named_parameters():
        assert id(value) == parameters[name][0]
        assert torch.equal(value, parameters[name][1])


def test_after_the_teachers_pass_the_model_answers_as_itself(tmp_path):
    method, model, _ = second_task(tmp_path)
    itself, batch = copy.deepcopy(model), collate(samples(3))
    method.loss_terms(model, batch, forward(model, batch))
    with torch.no_grad():
        assert torch.equal(forward(model.eval(), batch).logits, forward(itself.eval(), batch).logits)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_gives_the_same_gradients(reentrant, tmp_path):
    method, model, _ = second_task(tmp_path)
    batch = collate(samples(3))
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.get_base_model().enable_input_require_grads()
        model.zero_grad()
        method.loss_terms(model, batch, forward(model, batch))["distillation"].backward()
        found.append([value.grad.clone() for value in model.parameters() if value.requires_grad])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-8)
