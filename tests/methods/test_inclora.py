"""IncLoRA sums its LoRAs, O-LoRA keeps them apart, RegLoRA keeps them small where older ones are large."""

import itertools

import pytest
import torch
from safetensors.torch import load_file

from dymoe import methods
from dymoe.errors import DymoeError
from dymoe.methods.olora import overlap
from dymoe.methods.parameters import load_tensors, save_tensors, training_lora
from dymoe.methods.sefe import largest
from tests.adapter.conftest import tiny_llama
from tests.methods.parameter_cases import answer, begin, change, collate, data, make, samples, stage


def learned(method, folder, count):
    """The model after `count` stages, each changed at random, with what the method keeps."""
    model, given = None, data(samples(4))
    for index in range(1, count + 1):
        at = stage(folder, index)
        model = begin(method, model, at)
        method.before_task(model, at, given)
        change(model, index)
        method.after_task(model, at, given)
    return model


def terms(method, model, folder, index):
    at, batch = stage(folder, index), collate(samples(2))
    model = begin(method, model, at)
    method.before_task(model, at, data(samples(4)))
    change(model, 40 + index)
    return method.loss_terms(model, batch, answer(model, batch))


@pytest.mark.parametrize("name", ["inclora", "olora", "sefe"])
def test_groups_are_summed_like_merged_weights(name, tmp_path):
    model = learned(make(name), tmp_path, 3)
    plain = tiny_llama()
    modules = dict(plain.named_modules())
    with torch.no_grad():
        for layer in model.base_model.layers():
            assert list(layer.dymoe_A) == ["task1", "task2", "task3"]
            assert not layer.dymoe_router
            for group in layer.dymoe_A:
                a, b = layer.dymoe_A[group][0], layer.dymoe_B[group][0]
                modules[layer.name].weight += 2.0 * sum(torch.outer(b[r], a[r]) for r in range(3))
    ids = collate(samples(3))["input_ids"]
    model.eval()
    torch.testing.assert_close(model(input_ids=ids).logits, plain(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
    trained = {key.rsplit(".", 1)[1] for key, value in model.named_parameters() if value.requires_grad}
    assert trained == {"task3"}


@pytest.mark.parametrize("name, rank", [("inclora", 8), ("olora", 8), ("sefe", 64)])
def test_default_rank_and_scale(name, rank, tmp_path):
    config = methods.create(name).config(stage(tmp_path, 1))
    assert (config.num_experts, config.r, config.scaling, config.gate) == (1, rank, 2.0, "uniform")


@pytest.mark.parametrize("norm, rank, older", itertools.product(["l1", "frobenius"], [1, 3], [1, 4]))
def test_overlap_is_the_sum_over_pairs_of_rows(norm, rank, older):
    generator = torch.Generator().manual_seed(rank + older)
    old, new = (torch.randn(rows, 5, generator=generator) for rows in (older, rank))
    products = [float(sum(x * y for x, y in zip(one, two, strict=True))) for one in old for two in new]
    expected = sum(abs(p) if norm == "l1" else p * p for p in products)
    assert overlap(old, new, norm).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("norm, stages", itertools.product(["l1", "frobenius"], [1, 2, 3]))
def test_olora_counts_every_older_group_in_every_linear(norm, stages, tmp_path):
    method = make("olora", orthogonality=0.7, norm=norm, l2=0.2)
    model = learned(method, tmp_path, stages)
    model.zero_grad()
    found = terms(method, model, tmp_path, stages + 1)
    new = f"task{stages + 1}"
    expected = size = torch.zeros(())
    for layer in model.base_model.layers():
        for group, a in layer.dymoe_A.items():
            if group != new:
                product = a[0] @ layer.dymoe_A[new][0].T
                expected = expected + (product.abs() if norm == "l1" else product**2).sum()
        size = size + sum(p[new].square().sum().sqrt() for p in (layer.dymoe_A, layer.dymoe_B))
    assert set(found) == {"orthogonality", "l2"}
    torch.testing.assert_close(found["orthogonality"], 0.7 * expected)
    torch.testing.assert_close(found["l2"], 0.2 * size)
    found["orthogonality"].backward()
    touched = {key for key, value in model.named_parameters() if value.grad is not None}
    assert touched
    assert all(key.endswith(f"dymoe_A.{new}") for key in touched)


def test_olora_has_no_term_at_the_first_task_and_a_finite_gradient_at_zero(tmp_path):
    at = stage(tmp_path, 1)
    plain, sized = make("olora"), make("olora", l2=1.0)
    model = begin(plain, None, at)
    batch = collate(samples(2))
    assert plain.loss_terms(model, batch, None) == {}
    found = sized.loss_terms(model, batch, None)
    assert set(found) == {"l2"}
    found["l2"].backward()  # B is zero, where the norm has no derivative
    gradients = [value.grad for value in model.parameters() if value.requires_grad]
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("shape, share", itertools.product([(4, 6), (7, 3), (1, 1)], [0.02, 0.25, 1.0]))
def test_largest_positions(shape, share):
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    sizes = [abs(value) for row in delta.tolist() for value in row]
    count = max(1, int(share * len(sizes)))
    expected = sorted(sorted(range(len(sizes)), key=lambda i: -sizes[i])[:count])
    found = largest(delta, share)
    assert found.dtype == torch.int32
    assert found.tolist() == expected


def kept_positions(model, name, group, share):
    """The set by sorting a dense dW (the scale does not change the order)."""
    layer = next(layer for layer in model.base_model.layers() if layer.name == name)
    dense = (layer.dymoe_B[group][0].T @ layer.dymoe_A[group][0]).abs().flatten().tolist()
    order = sorted(range(len(dense)), key=lambda i: -dense[i])
    return order[: int(share * len(dense))]


@pytest.mark.parametrize(
    "stages, scaled, counted", [(1, True, "once"), (2, True, "once"), (2, False, "once"), (2, True, "repeated")]
)
def test_reglora_is_the_mean_over_linears_of_the_mean_at_all_keys(stages, scaled, counted, tmp_path):
    # A share this large makes the tasks' sets overlap.
    share = 0.3
    method = make("sefe", share=share, penalty=11.0, scaled=scaled, overlap=counted)
    model = learned(method, tmp_path, stages)
    found = terms(method, model, tmp_path, stages + 1)
    new, means, overlapping = f"task{stages + 1}", [], False
    for layer in model.base_model.layers():
        keys = [i for s in range(1, stages + 1) for i in kept_positions(model, layer.name, f"task{s}", share)]
        overlapping |= len(set(keys)) < len(keys)
        keys = sorted(set(keys)) if counted == "once" else keys
        dense = (2.0 if scaled else 1.0) * layer.dymoe_B[new][0].T @ layer.dymoe_A[new][0]
        means.append(dense.flatten()[keys].abs().mean())
    assert overlapping == (stages > 1)
    assert len(means) == 14
    expected = 11.0 * sum(means) / len(means)
    torch.testing.assert_close(found["reglora"], expected)
    wanted = [layer.dymoe_A[new] for layer in model.base_model.layers()]
    for one, two in zip(
        torch.autograd.grad(found["reglora"], wanted, retain_graph=True),
        torch.autograd.grad(expected, wanted),
        strict=True,
    ):
        torch.testing.assert_close(one, two)


def test_reglora_keeps_no_dense_matrix_for_the_backward_pass(tmp_path):
    method = make("sefe")
    model = learned(method, tmp_path, 1)
    model = begin(method, model, stage(tmp_path, 2))
    method.before_task(model, stage(tmp_path, 2), data(samples(2)))
    change(model, 7)
    largest_saved = 0

    def note(tensor):
        nonlocal largest_saved
        largest_saved = max(largest_saved, tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        method.loss_terms(model, {}, None)
    assert 0 < largest_saved < min(layer.in_features * layer.out_features for layer in model.base_model.layers())


def test_sefe_keeps_int32_positions_and_reads_them_again(tmp_path):
    method = make("sefe")
    model = learned(method, tmp_path, 2)
    kept = load_file(tmp_path / "2" / "keys.safetensors")
    assert {tensor.dtype for tensor in kept.values()} == {torch.int32}
    assert set(kept) == {layer.name for layer in model.base_model.layers()}
    first = terms(method, model, tmp_path, 3)["reglora"].item()
    again = make("sefe")  # as after a kill: nothing but the files
    again.before_task(model, stage(tmp_path, 3), data(samples(2)))
    assert first > 0
    assert again.loss_terms(model, {}, None)["reglora"].item() == first


def test_sefe_has_no_term_at_the_first_task(tmp_path):
    assert terms(make("sefe"), None, tmp_path, 1) == {}


def test_training_lora_is_the_training_group_with_the_older_ones(tmp_path):
    model = learned(make("inclora"), tmp_path, 2)
    for lora, layer in zip(training_lora(model), model.base_model.layers(), strict=True):
        a, b = layer.dymoe_A["task2"][0], layer.dymoe_B["task2"][0]
        assert lora.layer == layer.name
        torch.testing.assert_close(lora.a, a)
        assert [old.tolist() for old in lora.older] == [layer.dymoe_A["task1"][0].tolist()]
        torch.testing.assert_close(lora.delta(), 2.0 * b.T @ a)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(lora.delta(), 2.0 * (b.double().T @ a.double()).float())
    model.base_model.set_training_group(None)
    assert list(training_lora(model)) == []


def test_named_tensors_come_back_and_a_broken_file_is_told(tmp_path):
    tensors = {"x": torch.arange(6).view(2, 3).t(), "y": torch.ones(2, dtype=torch.bfloat16)}
    path = tmp_path / "made" / "here.safetensors"
    save_tensors(path, tensors)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in load_tensors(path).items())
    path.write_bytes(path.read_bytes()[:-3])
    for broken in (path, tmp_path / "none.safetensors"):
        with pytest.raises(DymoeError, match=broken.name):
            load_tensors(broken)
