"""A group is saved when its file, read back, is the group; what is loaded is a group, whole, and nothing else."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from dymoe.adapter import group_hash, group_tensors
from dymoe.errors import DymoeError
from dymoe.learning.groups import load_group, save_group, train_group
from tests.adapter.conftest import randomise, small, tiny_llama

FILE = "adapter_model.safetensors"
Q = "base_model.model.model.layers.0.self_attn.q_proj.dymoe_A"


@pytest.fixture
def model():
    made = train_group(tiny_llama(), None, "a", small(gate="cosine"))
    randomise(made)
    return made


def spoil(folder, change) -> None:
    """Change the tensors of a saved group."""
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE)


def test_what_is_saved_is_loaded_bit_for_bit(model, tmp_path):
    save_group(model, "a", tmp_path / "a")
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == ["adapter_config.json", FILE]
    loaded = load_group(tiny_llama(), None, "a", tmp_path / "a")
    assert group_hash(loaded, "a") == group_hash(model, "a")
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert not loaded.training
    assert loaded.active_adapters == ["a"]


CHANGES = {
    "lacks 2 of 42 tensors": lambda tensors: [tensors.pop(name) for name in sorted(tensors)[:2]],
    "holds 'other', which is no part": lambda tensors: tensors.update(other=torch.zeros(1)),
    "differs in ": lambda tensors: tensors[Q].add_(1e-3),
}


@pytest.mark.parametrize("message", CHANGES)
def test_a_file_that_is_not_the_group_is_not_saved(model, tmp_path, monkeypatch, message):
    """What writes tensors may lose, rename or change some (PEFT drops keys that hold another adapter's name)."""
    save_group(model, "a", tmp_path / "old")
    write = PeftModel.save_pretrained

    def lossy(self, folder, *args, **kwargs):
        write(self, folder, *args, **kwargs)
        spoil(tmp_path.__class__(folder) / "a", CHANGES[message])

    monkeypatch.setattr(PeftModel, "save_pretrained", lossy)
    before = (tmp_path / "old" / FILE).read_bytes()
    for name in ("old", "new"):
        with pytest.raises(DymoeError, match=f"{name}: expert group 'a' is not saved: its file, read back, ") as caught:
            save_group(model, "a", tmp_path / name)
        assert message.partition("'")[0] in str(caught.value) or "no place for: other" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert (tmp_path / "old" / FILE).read_bytes() == before


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_group_with_numbers_that_are_not_finite_is_not_saved(model, tmp_path, value):
    with torch.no_grad():
        group_tensors(model, "a")[Q][0, 0, 0] = value
    with pytest.raises(DymoeError, match=r"q_proj\.dymoe_A, which has numbers that are not finite"):
        save_group(model, "a", tmp_path / "a")
    assert not list(tmp_path.iterdir())


EMBEDDING = "base_model.model.model.embed_tokens.weight"
FOREIGN = {
    "lacks 1 of 42 tensors: " + Q: lambda tensors: tensors.pop(Q),
    f"holds '{EMBEDDING}', which is no part of an expert group": lambda tensors: tensors.update(
        {EMBEDDING: torch.zeros(60, 32)}
    ),
    "lacks ": lambda tensors: tensors.update({Q.replace("q_proj", "z_proj"): tensors.pop(Q)}),
    "no place for: base_model.model.lm_head.dymoe_A": lambda tensors: tensors.update(
        {"base_model.model.lm_head.dymoe_A": torch.zeros(4, 2, 32)}
    ),
    "dymoe_A.b', which is no part": lambda tensors: tensors.update({f"{Q}.b": torch.zeros(1)}),
    "of shape (3, 2, 32), expected (4, 2, 32)": lambda tensors: tensors.update({Q: tensors[Q][:3]}),
    "of shape (4, 2, 31), expected (4, 2, 32)": lambda tensors: tensors.update({Q: tensors[Q][..., :31].contiguous()}),
    "numbers that are not finite": lambda tensors: tensors[Q].fill_(float("-inf")),
    "which has numbers": lambda tensors: tensors.update({Q: tensors[Q].int()}),
}


@pytest.mark.parametrize("message", FOREIGN)
@pytest.mark.parametrize("first", [True, False])
def test_tensors_that_are_not_exactly_the_group_s_are_refused_and_change_nothing(model, tmp_path, message, first):
    save_group(model, "a", tmp_path / "a")
    spoil(tmp_path / "a", FOREIGN[message])
    base = tiny_llama()
    there = None if first else train_group(base, None, "b", small(gate="cosine"))
    before = {name: tensor.clone() for name, tensor in (there or base).state_dict().items()}
    with pytest.raises(DymoeError) as caught:
        load_group(base, there, "a", tmp_path / "a")
    assert str(tmp_path / "a") in str(caught.value)
    assert message in str(caught.value)
    after = (there or base).state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert there is None or there.active_adapters == ["b"]
    spoil(tmp_path / "a", lambda tensors: None)
    (tmp_path / "good").mkdir()
    save_group(model, "a", tmp_path / "good")
    assert group_hash(load_group(base, there, "a", tmp_path / "good"), "a") == group_hash(model, "a")


def test_another_method_s_adapter_and_a_broken_file_are_refused(model, tmp_path):
    save_group(model, "a", tmp_path / "a")
    (tmp_path / "a" / FILE).write_bytes(b"half")
    with pytest.raises(DymoeError, match=r"adapter_model\.safetensors: cannot be read"):
        load_group(tiny_llama(), None, "a", tmp_path / "a")
    (tmp_path / "a" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4}')
    save_file({Q: torch.zeros(1)}, tmp_path / "a" / FILE)
    with pytest.raises(DymoeError, match="'a' is no expert group"):
        load_group(tiny_llama(), None, "a", tmp_path / "a")
    with pytest.raises(DymoeError, match="nowhere: expert group 'a' cannot be loaded"):
        load_group(tiny_llama(), None, "a", tmp_path / "nowhere")
