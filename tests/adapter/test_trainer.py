"""An unmodified transformers Trainer trains the new group alone, also with accumulation and checkpointing."""

import pytest
import torch
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

from dymoe import group_hash

from .conftest import randomise, small, tiny_llama


def examples(count=8):
    generator = torch.Generator().manual_seed(5)
    rows = torch.randint(1, 60, (count, 7), generator=generator)
    return [{"input_ids": row, "labels": row.clone(), "attention_mask": torch.ones_like(row)} for row in rows]


def train(tmp_path, model, **kwargs):
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=3,
        learning_rate=1e-3,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1,
        **{"per_device_train_batch_size": 4, **kwargs},
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=examples())
    trainer.train()
    return trainer


def grown(**kwargs):
    kwargs = {"exclusivity": 0.1, "specialization": 0.1, **kwargs}
    model = get_peft_model(tiny_llama(), small(**kwargs), adapter_name="scienceqa")
    model.add_adapter("textvqa", small(**kwargs))
    randomise(model)
    return model


def moved(model):
    return torch.cat([p.detach().flatten() for n, p in model.named_parameters() if n.endswith(".textvqa")])


@pytest.mark.parametrize(
    "setting",
    [{}, {"activation_checkpointing": True}, {"bf16": True}, {"gradient_accumulation_steps": 2}],
    ids=["plain", "checkpointing", "bf16", "accumulation"],
)
def test_unmodified_trainer_trains_the_new_group_alone(tmp_path, setting):
    model = grown()
    before = {g: group_hash(model, g) for g in ("scienceqa", "textvqa")}
    base = {n: p.detach().clone() for n, p in model.named_parameters() if "dymoe_" not in n}
    trainer = train(tmp_path, model, **setting)
    assert group_hash(model, "scienceqa") == before["scienceqa"]
    assert group_hash(model, "textvqa") != before["textvqa"]
    for name, parameter in model.named_parameters():
        if name in base:
            assert torch.equal(parameter, base[name]), name
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3
    assert all(torch.isfinite(torch.tensor(loss)) for loss in losses)


def test_accumulation_and_checkpointing_end_where_the_plain_run_ends(tmp_path):
    # Load balance is not linear in the tokens: its mean over micro-batches is another number than over the batch.
    plain, checkpointed, accumulated = (grown(load_balance=0.0) for _ in range(3))
    train(tmp_path / "a", plain)
    train(tmp_path / "b", checkpointed, activation_checkpointing=True)
    # Micro-batches of equal length: the mean over all tokens is the mean of the micro-batches' means.
    train(tmp_path / "c", accumulated, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    start = moved(grown(load_balance=0.0))
    assert not torch.equal(moved(plain), start)
    torch.testing.assert_close(moved(checkpointed), moved(plain), atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(moved(accumulated), moved(plain), atol=1e-5, rtol=1e-3)
