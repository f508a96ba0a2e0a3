"""EWC's Fisher matrix and penalty against a slow computation of their own."""

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F

from dymoe import methods
from dymoe.errors import DymoeError
from dymoe.methods.ewc import FILE, fisher, joined
from dymoe.methods.parameters import load_tensors, trainable
from tests.methods.parameter_cases import answer, begin, change, collate, data, make, samples, stage


def slow_fisher(model, rows):
    """One sample at a time: cross entropy of its answer's tokens, backward, square."""
    sums = {name: torch.zeros_like(value) for name, value in trainable(model).items()}
    for row, answers in rows:
        model.zero_grad()
        log = F.log_softmax(model(input_ids=row[None]).logits[0], -1)
        places = range(len(row) - answers, len(row))
        loss = -sum(log[place - 1, row[place]] for place in places) / answers
        loss.backward()
        for name, value in trainable(model).items():
            sums[name] += value.grad**2
    model.zero_grad()
    return {name: total / len(rows) for name, total in sums.items()}


@pytest.mark.parametrize("count, dropout", itertools.product([1, 5], [0.0, 0.5]))
def test_fisher_is_the_mean_of_squared_gradients_of_single_samples(count, dropout, tmp_path):
    method = make("ewc", lora_dropout=dropout)
    model = begin(method, None, stage(tmp_path, 1))
    change(model, 1)
    rows = samples(count)
    model.train()
    found = fisher(model, rows, data(rows, batch_size=4))
    assert model.training
    assert all(value.grad is None for value in model.parameters())
    model.eval()
    expected = slow_fisher(model, rows)
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-9)


def test_a_batch_of_samples_would_be_another_matrix(tmp_path):
    """The square of a mean gradient is not the mean of the squares: what the single samples are for."""
    model = begin(make("ewc"), None, stage(tmp_path, 1))
    change(model, 1)
    rows = samples(5)
    found = fisher(model, rows, data(rows))
    loss = data(rows).loss(model, collate(rows))
    gradients = torch.autograd.grad(loss, list(trainable(model).values()))
    assert sum(float(value.sum()) for value in found.values()) > 1.5 * sum(float(g.square().sum()) for g in gradients)


@pytest.mark.parametrize("tasks", [1, 2, 5])
def test_joined_quadratics_equal_their_sum(tasks):
    generator = torch.Generator().manual_seed(tasks)
    kept = []
    for _ in range(tasks):
        weight = torch.rand(4, 5, generator=generator)
        weight[0] = 0  # no task needs this row
        weight[1] *= torch.rand(5, generator=generator) < 0.5
        kept.append((weight, torch.randn(4, 5, generator=generator)))
    (weight, anchor), rest = kept[0], 0.0
    for following in kept[1:]:
        weight, anchor, more = joined((weight, anchor), following)
        rest += more
    for scale in (0.0, 1.0, 30.0):
        theta = scale * torch.randn(4, 5, generator=generator)
        expected = sum((w.double() * (theta - a).double() ** 2).sum() for w, a in kept)
        found = (weight.double() * (theta - anchor).double() ** 2).sum() + rest
        assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(anchor[0], kept[-1][1][0])


def learn(method, folder, count):
    """Stages with real Fisher matrices; each stage's parameters are kept for the oracle."""
    model, anchors, matrices = None, [], []
    for index in range(1, count + 1):
        at, rows = stage(folder, index), samples(3, seed=index)
        model = begin(method, model, at)
        method.before_task(model, at, data(rows))
        change(model, index)
        method.after_task(model, at, data(rows))
        anchors.append({name: value.detach().clone() for name, value in trainable(model).items()})
        matrices.append(fisher(model, rows, data(rows)))
    return model, anchors, matrices


@pytest.mark.parametrize("mode, gamma, count", [("per-task", 1.0, 1), ("per-task", 1.0, 3), ("online", 0.5, 3)])
def test_penalty_and_its_gradient(mode, gamma, count, tmp_path):
    method = make("ewc", mode=mode, gamma=gamma, penalty=50.0)
    model, anchors, matrices = learn(method, tmp_path, count)
    at = stage(tmp_path, count + 1)
    fresh = make("ewc", mode=mode, gamma=gamma, penalty=50.0)  # knows nothing but the files
    fresh.before_task(begin(fresh, model, at), at, data(samples(2)))
    change(model, 99)
    parameters = trainable(model)
    expected = torch.zeros(())
    if mode == "per-task":
        for anchor, matrix in zip(anchors, matrices, strict=True):
            expected = expected + sum((matrix[n] * (parameters[n] - anchor[n]) ** 2).sum() for n in parameters)
    else:
        running = {n: sum(gamma ** (count - 1 - t) * matrices[t][n] for t in range(count)) for n in parameters}
        expected = sum((running[n] * (parameters[n] - anchors[-1][n]) ** 2).sum() for n in parameters)
    expected = 25.0 * expected
    batch = collate(samples(2))
    found = fresh.loss_terms(model, batch, answer(model, batch))
    assert set(found) == {"ewc"}
    torch.testing.assert_close(found["ewc"], expected, rtol=1e-4, atol=0)
    values = list(parameters.values())
    for one, two in zip(torch.autograd.grad(found["ewc"], values), torch.autograd.grad(expected, values), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-7)


def test_first_task_has_no_penalty_and_the_second_starts_at_none(tmp_path):
    method = make("ewc")
    at = stage(tmp_path, 1)
    model = begin(method, None, at)
    method.before_task(model, at, data(samples(2)))
    assert method.loss_terms(model, {}, None) == {}
    change(model, 1)
    method.after_task(model, at, data(samples(2)))
    at = stage(tmp_path, 2)
    method.before_task(begin(method, model, at), at, data(samples(2)))
    assert method.loss_terms(model, {}, None)["ewc"].item() == 0.0


def test_the_chosen_samples_depend_on_the_seed_alone(tmp_path):
    rows = samples(12)
    kept = []
    for seed_stage in (1, 1, 2):
        method = make("ewc", samples=4)
        at = dataclasses.replace(stage(tmp_path / str(len(kept)), 1), seed=seed_stage)
        model = begin(method, None, at)
        change(model, 1)
        method.after_task(model, at, data(rows))
        kept.append(load_tensors(at.memory / FILE))
    same = [all(torch.equal(kept[0][name], other[name]) for name in other) for other in kept[1:]]
    assert same == [True, False]


def test_missing_memory_is_told(tmp_path):
    method, at = make("ewc"), stage(tmp_path, 2)
    with pytest.raises(DymoeError, match=FILE.replace(".", r"\.")):
        method.before_task(begin(method, None, at), at, data(samples(2)))


def test_what_a_method_remembers_is_no_setting(tmp_path):
    method = make("ewc")
    learn(method, tmp_path, 2)
    assert set(dataclasses.asdict(method)) == {field.name for field in dataclasses.fields(methods.create("ewc"))}
    assert all(isinstance(value, int | float | str | None) for value in dataclasses.asdict(method).values())
