"""SAME against slow oracles: projection, preconditioner, streaming covariance, freezing, what it keeps on disk."""

import itertools
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch import nn

from dymoe import methods
from dymoe.errors import DymoeError
from dymoe.learning.groups import group_hash, train_group
from dymoe.methods import Stage
from dymoe.methods import shaping as maths
from dymoe.methods.inputs import FILE, InputStatistics
from dymoe.methods.same import FOLDER
from tests.adapter.conftest import randomise, tiny_llama


class Batches:
    """The stage's data for the hooks: token ids, padded on the left."""

    def __init__(self, samples, steps=2):
        self.samples, self.steps = samples, steps

    def batches(self, samples=None, batch_size=None):
        chosen = self.samples if samples is None else samples
        for start in range(0, len(chosen), batch_size or 3):
            part = chosen[start : start + (batch_size or 3)]
            width = max(map(len, part))
            ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in part])
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in part])
            yield {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}

    def loss(self, model, batch):
        return model(**batch).loss

    def autocast(self):
        return nullcontext()


def rows_of_tokens(seed, low, high, count=7):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 7, (count,), generator=generator).tolist()
    return [torch.randint(low, high, (n,), generator=generator).tolist() for n in lengths]


def same(**settings):
    return methods.create("same", num_experts=3, rank=2, lora_alpha=12.0, lora_dropout=0.0, **settings)


def stage_of(folder, index):
    memories = [Path(folder) / f"{number}" for number in range(1, index + 1)]
    return Stage(index, f"task{index}", (), memories[-1], tuple(memories[:-1]), seed=index)


def learned(tmp_path, method, data):
    """A model and the method after its first task (B is given values so that all experts matter)."""
    stage = stage_of(tmp_path, 1)
    model = get_peft_model(tiny_llama(), method.config(stage), adapter_name="shared")
    randomise(model)
    method.before_task(model, stage, data)
    method.after_task(model, stage, data)
    return model


def inputs_of(model, samples):
    """Every layer's inputs, token by token, without padding: one sample at a time, no observer of ours."""
    seen = {layer.name: [] for layer in model.base_model.layers()}
    hooks = [
        layer.register_forward_pre_hook(lambda m, args: seen[m.name].append(args[0].detach()[0]))
        for layer in model.base_model.layers()
    ]
    model.eval()
    with torch.no_grad():
        for row in samples:
            model(input_ids=torch.tensor([row]))
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


def spectrum(values, width, seed=0):
    """A covariance with these eigenvalues in random directions."""
    q, _ = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(seed)).double())
    full = torch.tensor([*values, *[0.0] * (width - len(values))]).double()
    return (q * full) @ q.T, q


# ---- pure functions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values, energy, of, kept",
    [
        ([4.0, 2.0, 1.0, 1.0], 0.5, "trace", 1),
        ([4.0, 2.0, 1.0, 1.0], 0.51, "trace", 2),
        ([4.0, 2.0, 1.0, 1.0], 0.75, "trace", 2),
        ([4.0, 2.0, 1.0, 1.0], 1.0, "trace", 4),
        ([4.0, 2.0, 1.0, 1.0], 0.75, "squares", 2),
        ([4.0, 2.0, 1.0, 1.0], 0.7, "squares", 1),
        ([4.0, 2.0, 0.0, 0.0], 1.0, "squares", 2),
        ([0.0, 0.0], 0.9, "trace", 0),
    ],
)
def test_leading_directions_hold_the_energy(values, energy, of, kept):
    values = torch.tensor(values)
    assert maths.leading(values, energy, of) == kept
    assert maths.leading(values, energy, of, 1) == min(kept, 1)


def test_eigenvalues_come_largest_first_with_their_vectors():
    covariance, _ = spectrum([3.0, 2.0, 0.5], 5)
    values, vectors = maths.decompose(covariance)
    torch.testing.assert_close(values, torch.tensor([3.0, 2.0, 0.5, 0.0, 0.0]).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close((vectors * values) @ vectors.T, covariance)


@pytest.mark.parametrize("window", [1, 3, 5])
def test_running_scale(window):
    values = [9.0, 5.0, 4.0, 2.0, 1.0]
    means = []
    for i in range(5):
        near = [values[j] for j in range(5) if abs(j - i) <= window // 2]
        means.append(sum(near) / len(near))
    expected = torch.tensor([means[-1] / mean for mean in means])
    found = maths.running_scale(torch.tensor(values), window)
    torch.testing.assert_close(found, expected)
    assert found.max() <= 1


@pytest.mark.parametrize("kept", [0, 1, 3])
def test_a_projected_router_gradient_changes_no_score_of_an_input_in_the_span(kept):
    _, vectors = spectrum([1.0], 6)
    basis = vectors[:, :kept]
    gradient = torch.randn(4, 6, generator=torch.Generator().manual_seed(1)).double()
    rows = torch.randn(4, 6).double()
    stepped = rows - 0.3 * maths.outside(gradient, basis)
    for weights in torch.eye(kept).double():
        x = basis @ weights
        torch.testing.assert_close(stepped @ x, rows @ x, atol=1e-12, rtol=0)
    for direction in vectors[:, kept:].T:  # elsewhere the step is the plain one
        torch.testing.assert_close(stepped @ direction, (rows - 0.3 * gradient) @ direction)


def test_a_scaled_router_gradient_is_direction_by_direction():
    _, vectors = spectrum([1.0], 6)
    gradient = torch.randn(4, 6, generator=torch.Generator().manual_seed(1)).double()
    scale = torch.tensor([0.1, 0.5, 1.0]).double()
    found = maths.outside(gradient, vectors[:, :3], scale)
    for i in range(6):
        factor = scale[i] if i < 3 else 1.0
        torch.testing.assert_close(found @ vectors[:, i], factor * (gradient @ vectors[:, i]))


@pytest.mark.parametrize("mu, kept", itertools.product([0.1, 0.9], [None, 0, 2]))
def test_the_preconditioner_is_the_explicit_inverse(mu, kept):
    eigenvalues = [5.0, 2.0, 0.7, 0.3]
    covariance, _ = spectrum(eigenvalues, 5)
    if kept is not None:
        truncated, _ = spectrum(eigenvalues[:kept], 5)
    else:
        truncated = covariance
    expected = torch.linalg.inv(truncated + mu * torch.eye(5).double())
    found = maths.damped_inverse(*maths.decompose(covariance), mu, kept)
    torch.testing.assert_close(found, expected)
    gradient = torch.randn(3, 2, 5).double()
    for e, r in itertools.product(range(3), range(2)):
        row = expected @ gradient[e, r]
        torch.testing.assert_close(maths.preconditioned(gradient, found, False)[e, r], row)
    kept_norm = maths.preconditioned(gradient, found, True)
    for e in range(3):
        plain = maths.preconditioned(gradient, found, False)[e]
        torch.testing.assert_close(kept_norm[e], plain * gradient[e].norm() / plain.norm())
    zero = maths.preconditioned(torch.zeros(3, 2, 5).double(), found, True)
    assert torch.equal(zero, torch.zeros_like(zero))


@pytest.mark.parametrize(
    "used, importance, below, frozen",
    [
        ([0.5, 0.3, 0.2], [1.0, 2.0, 9.0], 0.1, [False, False, True]),
        ([0.5, 0.25, 0.0], [4.0, 2.0, 0.0], 0.1, [False, True, True]),  # all scores 0: the first one still trains
        ([0.5, 0.25, 0.0], [4.0, 2.0, 0.0], -0.1, [False, False, False]),
        ([0.2, 0.2, 0.6], [7.0, 1.0, 1.0], -0.5, [True, False, False]),
        ([0.3, 0.3], [1.0, 1.0], 0.0, [False, False]),
    ],
)
def test_frozen_experts(used, importance, below, frozen):
    found = maths.frozen_experts(torch.tensor(used), torch.tensor(importance), below)
    assert found.tolist() == frozen


# ---- statistics ---------------------------------------------------------------------------------------------------


def test_streaming_statistics_are_the_one_shot_ones(tmp_path):
    data = Batches(rows_of_tokens(1, 1, 60))
    method = same(freeze=True)
    model = learned(tmp_path, method, data)
    found = InputStatistics.load(tmp_path / "1" / FOLDER / FILE)
    everything = inputs_of(model, data.samples)
    assert found.tokens == sum(map(len, data.samples))
    layers = {layer.name: layer for layer in model.base_model.layers()}
    assert set(found.sources) == set(layers)
    for name, x in everything.items():
        x = x.double()
        covariance = sum(torch.outer(row, row) for row in x) / len(x)
        stored = found.covariances[found.source_of(name)]
        assert stored.dtype == torch.float32
        torch.testing.assert_close(stored.double(), covariance, atol=1e-5, rtol=1e-4)
        weights = torch.softmax(x @ layers[name].dymoe_router["shared"].detach().double().T, -1)
        torch.testing.assert_close(found.used[name], weights.mean(0), atol=1e-5, rtol=1e-4)
        energy = torch.stack([w * (row @ row) for w, row in zip(weights, x, strict=True)]).mean(0)
        torch.testing.assert_close(found.importance[name], energy, atol=1e-5, rtol=1e-4)
    # Four distinct inputs per decoder layer: q = k = v, o, gate = up, down.
    assert len(found.covariances) == 2 * 4


@pytest.mark.parametrize("decay", [None, 0.9])
def test_tasks_join_by_tokens_or_by_decay(tmp_path, decay):
    first, second = Batches(rows_of_tokens(1, 1, 30)), Batches(rows_of_tokens(2, 30, 60, count=3))
    method = same(decay=decay)
    model = learned(tmp_path, method, first)
    stage = stage_of(tmp_path, 2)
    method.before_task(model, stage, second)
    method.after_task(model, stage, second)
    found = InputStatistics.load(tmp_path / "2" / FOLDER / FILE)
    a, b = (inputs_of(model, data.samples) for data in (first, second))
    for name in found.sources:
        both = [x[name].T @ x[name] / len(x[name]) for x in (a, b)]
        share = decay if decay is not None else len(a[name]) / (len(a[name]) + len(b[name]))
        expected = share * both[0] + (1 - share) * both[1]
        torch.testing.assert_close(found.covariances[found.source_of(name)], expected, atol=1e-5, rtol=1e-4)
    assert found.importance == {}, "measured only where it is used"
    assert not list((tmp_path / "2").glob(".*")), "nothing half-written is left"


def test_only_the_last_two_tasks_files_are_kept(tmp_path):
    data, method = Batches(rows_of_tokens(1, 1, 60, count=2)), same()
    model = learned(tmp_path, method, data)
    for index in (2, 3):
        stage = stage_of(tmp_path, index)
        method.before_task(model, stage, data)
        method.after_task(model, stage, data)
    assert [(tmp_path / str(i) / FOLDER / FILE).exists() for i in (1, 2, 3)] == [False, True, True]


def test_at_most_so_many_samples_are_asked_and_the_same_again(tmp_path):
    data = Batches(rows_of_tokens(1, 1, 60, count=9))
    files = []
    for turn in ("a", "b"):
        learned(tmp_path / turn, same(samples=2), data)
        files.append(InputStatistics.load(tmp_path / turn / "1" / FOLDER / FILE))
    assert files[0].tokens == files[1].tokens < sum(map(len, data.samples)) / 2
    for name, covariance in files[0].covariances.items():
        assert torch.equal(covariance, files[1].covariances[name])


@pytest.mark.parametrize("size", [1, 2, 3, 48, 333])
def test_half_a_covariance_is_the_whole(size, tmp_path):
    x = torch.randn(4, size, generator=torch.Generator().manual_seed(size))
    kept = InputStatistics()
    kept.covariances, kept.sources, kept.tokens = {"a.b": x.T @ x}, {"a.b": "a.b", "c": "a.b"}, 4
    kept.covariances["a.b"] = (kept.covariances["a.b"] + kept.covariances["a.b"].T) / 2
    kept.save(tmp_path / "x")
    found = InputStatistics.load(tmp_path / "x" / FILE)
    assert torch.equal(found.covariances["a.b"], kept.covariances["a.b"])
    assert (found.sources, found.tokens) == (kept.sources, 4)
    assert (tmp_path / "x" / FILE).stat().st_size < 4 * size * (size + 1) / 2 + 500


def test_a_missing_or_broken_file_is_one_line(tmp_path):
    method = same()
    model = get_peft_model(tiny_llama(), method.config(stage_of(tmp_path, 1)), adapter_name="shared")
    with pytest.raises(DymoeError, match=r"inputs\.safetensors: the earlier tasks' inputs cannot be read"):
        method.before_task(model, stage_of(tmp_path, 2), Batches([[1, 2]]))
    (tmp_path / "1" / FOLDER).mkdir(parents=True)
    (tmp_path / "1" / FOLDER / FILE).write_bytes(b"no tensors")
    with pytest.raises(DymoeError, match="cannot be read"):
        method.before_task(model, stage_of(tmp_path, 2), Batches([[1, 2]]))


# ---- the hooks ----------------------------------------------------------------------------------------------------


def gradients(model, data):
    model.train()
    model.zero_grad()
    data.loss(model, next(iter(data.batches()))).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def test_the_first_task_trains_as_moelora(tmp_path):
    data, method = Batches(rows_of_tokens(1, 1, 60)), same()
    model = get_peft_model(tiny_llama(), method.config(stage_of(tmp_path, 1)), adapter_name="shared")
    method.before_task(model, stage_of(tmp_path, 1), data)
    before = gradients(model, data)
    method.before_step(model)
    assert all(torch.equal(p.grad, before[name]) for name, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("of", ["squares", "trace"])
@pytest.mark.parametrize("router, curvature", [("project", True), ("free", True), ("scale", False), ("hold", False)])
def test_the_hook_shapes_each_gradient_by_its_own_layers_inputs(tmp_path, router, curvature, of):
    old, new = Batches(rows_of_tokens(1, 1, 30)), Batches(rows_of_tokens(2, 30, 60))
    method = same(router=router, curvature=curvature, energy_of=of, mu=0.05)
    model = learned(tmp_path, method, old)
    everything = inputs_of(model, old.samples)
    stage = stage_of(tmp_path, 2)
    method.before_task(model, stage, new)
    before = gradients(model, new)
    method.before_step(model)
    for layer in model.base_model.layers():
        x = everything[layer.name].double()
        covariance = x.T @ x / len(x)
        values, vectors = torch.linalg.eigh(covariance)
        order = values.argsort(descending=True)
        values, vectors = values[order], vectors[:, order]
        weights = values**2 if of == "squares" else values
        kept = next(k for k in range(1, 99) if weights[:k].sum() >= 0.9 * weights.sum())
        plain = {key: next(g for n, g in before.items() if f"{layer.name}.dymoe_{key}" in n) for key in "AB"}
        plain["router"] = next(g for n, g in before.items() if f"{layer.name}.dymoe_router" in n)
        rows = layer.dymoe_router["shared"].grad
        factors = torch.ones(len(values)).double()
        if router in ("project", "hold"):
            factors[:kept] = 0
        elif router == "scale":
            means = [values[max(0, i - 1) : min(kept, i + 2)].mean() for i in range(kept)]
            factors[:kept] = torch.stack([means[-1] / mean for mean in means])
        expected = (plain["router"].double() @ vectors * factors) @ vectors.T
        torch.testing.assert_close(rows.double(), expected, atol=1e-6, rtol=1e-3)
        assert torch.equal(layer.dymoe_B["shared"].grad, plain["B"])
        a = layer.dymoe_A["shared"].grad
        if not curvature:
            assert torch.equal(a, plain["A"])
            continue
        inverse = torch.linalg.inv(covariance + 0.05 * torch.eye(len(values)).double())
        for e in range(3):
            shaped = plain["A"][e].double() @ inverse
            shaped = shaped * plain["A"][e].norm() / shaped.norm()
            torch.testing.assert_close(a[e].double(), shaped, atol=1e-6, rtol=1e-2)
            assert not torch.allclose(a[e], plain["A"][e], rtol=1e-2)


def moved(model, start, method, name):
    """How far the layer's router rows moved inside the span of the earlier inputs, relative to all they moved."""
    layer = next(layer for layer in model.base_model.layers() if layer.name == name)
    change = layer.dymoe_router["shared"].detach() - start[name]
    return float((change @ method._guards[name].basis).norm() / change.norm())


@pytest.mark.parametrize("router, stays", [("hold", True), ("project", False)])
def test_only_hold_keeps_adamw_out_of_the_span(tmp_path, router, stays):
    old, new = Batches(rows_of_tokens(1, 1, 30)), Batches(rows_of_tokens(2, 30, 60))
    method = same(router=router)
    model = learned(tmp_path, method, old)
    stage = stage_of(tmp_path, 2)
    method.before_task(model, stage, new)
    guards = dict(method._guards)
    start = {layer.name: layer.dymoe_router["shared"].detach().clone() for layer in model.base_model.layers()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0)
    for _ in range(3):
        gradients(model, new)
        method.before_step(model)
        optimizer.step()
    method.after_task(model, stage, new)
    method._guards = guards
    inside = [moved(model, start, method, name) for name in start]
    assert max(inside) < 1e-4 if stays else max(inside) > 1e-2


def test_frozen_experts_do_not_move(tmp_path):
    old, new = Batches(rows_of_tokens(1, 1, 30)), Batches(rows_of_tokens(2, 30, 60))
    method = same(freeze=True, freeze_below=0.0)
    model = learned(tmp_path, method, old)
    with torch.no_grad():  # routers that prefer one expert for the old inputs, so that the scores differ
        for layer in model.base_model.layers():
            layer.dymoe_router["shared"].mul_(20)
    method.before_task(model, stage_of(tmp_path, 2), new)
    frozen = method._frozen
    assert set(frozen) == {layer.name for layer in model.base_model.layers()}
    assert any(mask.any() for mask in frozen.values())
    gradients(model, new)
    method.before_step(model)
    for layer in model.base_model.layers():
        for held in (layer.dymoe_A, layer.dymoe_B):
            still = held["shared"].grad.flatten(1).abs().sum(1) == 0
            assert still.tolist() == frozen[layer.name].tolist()


def test_freezing_refuses_experts_that_were_not_measured(tmp_path):
    data, method = Batches(rows_of_tokens(1, 1, 60)), same(freeze=True)
    model = learned(tmp_path, method, data)
    kept = InputStatistics.load(tmp_path / "1" / FOLDER / FILE)
    kept.importance = {name: value[:2] for name, value in kept.importance.items()}
    kept.save(tmp_path / "1" / FOLDER)
    with pytest.raises(DymoeError, match="has 3 experts, 2 were measured; it does not go with pruning"):
        method.before_task(model, stage_of(tmp_path, 2), data)


def test_a_resumed_task_has_the_same_guards(tmp_path):
    """A new process makes the method anew and reads what the finished task left."""
    old, new = Batches(rows_of_tokens(1, 1, 30)), Batches(rows_of_tokens(2, 30, 60))
    settings = {"router": "hold", "freeze": True}
    method = same(**settings)
    model = learned(tmp_path, method, old)
    again = same(**settings)
    for each in (method, again):
        each.before_task(model, stage_of(tmp_path, 2), new)
    assert method._guards.keys() == again._guards.keys()
    for name, guard in method._guards.items():
        assert torch.equal(guard.basis, again._guards[name].basis)
        assert torch.equal(guard.inverse, again._guards[name].inverse)
        assert torch.equal(method._start[name], again._start[name])
        assert torch.equal(method._frozen[name], again._frozen[name])


def test_it_looks_without_touching(tmp_path):
    data, method = Batches(rows_of_tokens(1, 1, 60)), same(freeze=True)
    model = learned(tmp_path, method, data)
    before = group_hash(model, "shared")
    model.train()
    method.before_task(model, stage_of(tmp_path, 2), data)
    method.after_task(model, stage_of(tmp_path, 2), data)
    assert model.training
    assert group_hash(model, "shared") == before
    assert model.base_model.trace.observers == []
    assert all(not layer._forward_pre_hooks for layer in model.base_model.layers())


# ---- moelora ------------------------------------------------------------------------------------------------------


def test_moelora_is_coins_bank():
    stage = Stage(1, "a", (), Path("m"))
    method = methods.create("moelora")
    config = method.config(stage)
    assert (config.num_experts, config.r, config.lora_alpha, config.scaling) == (8, 16, 256.0, 2.0)
    assert (config.gate, config.top_k, config.temperature, config.load_balance) == ("linear", 8, 1.0, 0.0)
    assert method.group(stage) == method.group(Stage(2, "b", (), Path("m"))) == "shared"
    pocket = methods.create("same").config(stage)
    assert (pocket.num_experts * pocket.r, pocket.scaling) == (64, 2.0)


@pytest.mark.parametrize("load_balance", [0.0, 0.5])
def test_moelora_layer_and_loss_are_the_formula(load_balance):
    method = methods.create("moelora", num_experts=3, rank=2, lora_alpha=12.0, lora_dropout=0.0)
    method.load_balance = load_balance
    config = method.config(Stage(1, "a", (), Path("m")))
    model = train_group(tiny_llama(), None, "shared", config)
    randomise(model)
    batch = next(iter(Batches(rows_of_tokens(3, 1, 60)).batches()))
    plain, terms = {}, []
    counts = batch["attention_mask"].bool()

    def check(layer, args, result):
        x = args[0]
        weights = torch.softmax(x @ layer.dymoe_router["shared"].T, -1)
        expected = nn.functional.linear(x, layer.base_layer.weight)
        for e in range(3):
            a, b = layer.dymoe_A["shared"][e], layer.dymoe_B["shared"][e]
            expected = expected + 2.0 * weights[..., e : e + 1] * (x @ a.T @ b)
        torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-4)
        tokens = weights[counts]
        best = [int(row.argmax()) for row in tokens]
        terms.append(sum(3 * best.count(e) / len(best) * tokens[:, e].mean() for e in range(3)))
        plain[layer.name] = True

    hooks = [layer.register_forward_hook(check) for layer in model.base_model.layers()]
    with torch.no_grad():
        model.eval()
        answer = model(**batch).loss
        terms.clear()
        model.train()
        total = model(**batch).loss
    for hook in hooks:
        hook.remove()
    assert len(plain) == 14
    torch.testing.assert_close(total, answer + load_balance * sum(terms) / 14, atol=1e-5, rtol=1e-5)
