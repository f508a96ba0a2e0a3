"""What a reader finds in `dymoe.routing` is what runs: a formula that is edited there changes the layer and the run."""

import pytest
import torch

from dymoe import routing
from dymoe.learning.run import run
from tests.methods.test_matrix import Quiet, recipe

from .test_adapter import two_groups

EDITS = {
    "cosine_scores": lambda plain: lambda *a, **k: 0.5 * plain(*a, **k),
    "token_types": lambda plain: lambda *a, **k: torch.full_like(plain(*a, **k), routing.TokenType.OLD),
    "token_assignment_guidance": lambda plain: lambda scores, *_: scores,
    "topk_weights": lambda plain: lambda scores, *_: torch.softmax(scores, -1),
    "load_balance_loss": lambda plain: lambda *a, **k: 2 * plain(*a, **k),
    "group_mass": lambda plain: lambda *a, **k: tuple(0.5 * each for each in plain(*a, **k)),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_formula_changes_what_a_layer_learns(name, batch, monkeypatch):
    def learned():
        model = two_groups().train()
        model(**batch).loss.backward()
        return torch.cat([p.grad.flatten() for n, p in model.named_parameters() if p.grad is not None])

    before = learned()
    assert torch.equal(learned(), before), "nothing else does"
    monkeypatch.setattr(routing, name, EDITS[name](getattr(routing, name)))
    assert not torch.equal(learned(), before)


def test_an_edited_formula_changes_a_run(tiny_folder, tmp_path, monkeypatch):
    def hashes(folder):
        output = run(recipe(folder, tiny_folder, "dymoe", None), display=Quiet())
        return [file.read_bytes() for file in sorted(output.glob("stages/*/adapter/adapter_model.safetensors"))]

    before = hashes(tmp_path / "before")
    monkeypatch.setattr(routing, "group_mass", EDITS["group_mass"](routing.group_mass))
    first, second = hashes(tmp_path / "after")
    assert first == before[0], "there is no regularization on the first task"
    assert second != before[1]
