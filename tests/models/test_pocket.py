"""The pocket model as a whole: its prompt, its projector, and loading any other model of transformers."""

import copy
import json

import pytest
import torch
from safetensors.torch import save_file

from dymoe.errors import DymoeError
from dymoe.models import Collator, ImageFeatures, Lvlm, load, pocket
from dymoe.models.model import freeze
from dymoe.tasks import Sample
from tests.models.conftest import png, sample

QUESTION = "Describe the picture."


def test_it_is_frozen_and_of_transformers_own_classes(real):
    assert type(real.model).__module__.startswith("transformers.")
    assert type(real.processor).__module__.startswith("transformers.")
    assert real.model.dtype == torch.bfloat16
    assert not real.model.training
    assert not any(parameter.requires_grad for parameter in real.model.parameters())
    assert real.model.lm_head.weight.data_ptr() == real.model.get_input_embeddings().weight.data_ptr()
    assert 138e6 < sum(parameter.numel() for parameter in real.model.parameters()) < 140e6


def test_the_chat_template_is_short(real):
    talk = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]},
        {"role": "user", "content": "Sure?"},
    ]
    text = real.processor.apply_chat_template(talk, add_generation_prompt=True, tokenize=False)
    assert text == "User:<image>\nWhat?\nAssistant: a cat<|im_end|>\nUser:\nSure?\nAssistant:"


def test_the_language_model_speaks_english(real):
    tokens = real.processor.tokenizer("The capital of France is", return_tensors="pt")
    output = real.model.generate(**tokens, max_new_tokens=3, do_sample=False)
    assert "Paris" in real.processor.tokenizer.decode(output[0])
    assert real.processor.tokenizer(" 407").input_ids == real.processor.tokenizer.convert_tokens_to_ids(
        ["Ġ", "4", "0", "7"]
    )


def test_image_tokens_run_row_by_row(real):
    """What is painted in a quarter of the picture changes that quarter's tokens most."""
    plain = ImageFeatures(real, batch_size=2)
    blank, painted = png("white"), png("red", "box")  # the upper left quarter
    change = (plain.get(painted).float() - plain.get(blank).float()).norm(dim=1).reshape(4, 4)
    assert change[:2, :2].mean() > 1.5 * change[2:, 2:].mean()


def caption_loss(lvlm: Lvlm, items: list[Sample]) -> float:
    batch = Collator(lvlm)(items)
    with torch.no_grad():
        return float(lvlm.model(**batch).loss)


def test_the_shipped_projector_reads_pictures(real):
    """On test pictures that it never saw: far below an untrained one, and lower with the right picture."""
    from dymoe.tasks import load_stream

    test = load_stream("pocket-coin", tasks=["ImageNet"]).tasks[0].test[:8]
    items = [sample(s.id, s.image, QUESTION, f"a photo of a {s.answer}") for s in test]
    turned = [sample(a.id, b.image, a.question, a.answer) for a, b in zip(items, items[1:] + items[:1], strict=True)]
    trained, wrong = caption_loss(real, items), caption_loss(real, turned)
    projector = real.model.model.multi_modal_projector
    kept = {key: value.clone() for key, value in projector.state_dict().items()}
    try:
        projector.load_state_dict(pocket.random_projector(576))
        untrained = caption_loss(real, items)
    finally:
        projector.load_state_dict(kept)
    assert trained < 0.5 * untrained
    assert trained < wrong - 0.1


def test_the_record_belongs_to_the_projector():
    from safetensors import safe_open

    record = json.loads(pocket.PROJECTOR.with_suffix(".json").read_text())
    with safe_open(pocket.PROJECTOR, "pt") as file:
        notes = {key: json.loads(value) for key, value in file.metadata().items()}
    assert notes["after"] == record["held_out_loss"]["after"]["all"] < record["held_out_loss"]["before"]["all"]
    assert notes["steps"] == record["steps"]
    assert notes["seed"] == record["seed"]


def test_folding_the_normalisation_changes_nothing():
    from scripts.pocket.train_projector import Projector

    mean, deviation = torch.rand(1280), 0.1 + torch.rand(1280)
    projector = Projector(mean, deviation, 32, 0.1, seed=0)
    folded = projector.folded()
    x = torch.randn(2, 16, 1280) * deviation + mean
    hidden = torch.nn.functional.gelu(x @ folded["linear_1.weight"].T + folded["linear_1.bias"])
    expected = hidden @ folded["linear_2.weight"].T + folded["linear_2.bias"]
    torch.testing.assert_close(projector(x), expected, atol=1e-5, rtol=1e-4)
    assert 0.05 < float(projector(x).detach().std()) < 0.2


def test_a_broken_projector_file_is_named(tmp_path):
    path = tmp_path / "projector.safetensors"
    with pytest.raises(DymoeError, match=r"projector\.safetensors: .* cannot be read"):
        pocket.load_projector(path)
    path.write_bytes(b"no tensors")
    with pytest.raises(DymoeError, match="cannot be read"):
        pocket.load_projector(path)
    save_file({"other": torch.zeros(1)}, path)
    with pytest.raises(DymoeError, match=r"holds other; expected linear_1\.bias"):
        pocket.load_projector(path)


def test_a_saved_model_loads_from_its_folder(tiny, tmp_path):
    tiny.model.save_pretrained(tmp_path)
    tiny.processor.save_pretrained(tmp_path)
    again = load(str(tmp_path), dtype="float32")
    items = [sample("red", png("red")), sample("none", None)]
    with torch.no_grad():
        expected, got = (lvlm.model(**Collator(lvlm)(items)).logits for lvlm in (tiny, again))
    torch.testing.assert_close(got, expected)
    assert not any(parameter.requires_grad for parameter in again.model.parameters())


def test_the_last_logits_alone_are_the_same_and_need_no_copies(tiny):
    """With a slice of the positions torch would copy the vocabulary matrix for every sample."""
    seen: list[torch.Tensor] = []
    model = freeze(copy.deepcopy(tiny.model))
    batch = Collator(tiny).prompts([sample("red", png("red")), sample("blue", png("blue"))])
    watch = model.get_output_embeddings().register_forward_hook(lambda _, inputs, output: seen.append(inputs[0]))
    with torch.no_grad():
        last, whole = model(**batch, logits_to_keep=3).logits, model(**batch).logits
    watch.remove()
    assert seen[0].shape[1] == 3
    assert seen[0].is_contiguous()
    torch.testing.assert_close(last, whole[:, -3:])


def test_what_cannot_be_loaded_is_named(tmp_path):
    with pytest.raises(DymoeError, match="dtype: 'bf17' is not a floating dtype"):
        load("pocket", dtype="bf17")
    with pytest.raises(DymoeError, match="dtype: 'int8' is not a floating dtype"):
        load("pocket", dtype="int8")
    with pytest.raises(DymoeError, match="no such folder"):
        load(str(tmp_path / "nowhere"))
    with pytest.raises(DymoeError, match="cannot be loaded as an image-text model"):
        load(str(tmp_path))


def test_a_pickled_model_is_refused(tiny, tmp_path):
    tiny.model.config.save_pretrained(tmp_path)
    tiny.processor.save_pretrained(tmp_path)
    torch.save(tiny.model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(DymoeError, match="cannot be loaded as an image-text model"):
        load(str(tmp_path))


def test_captions_keep_training_and_held_out_apart():
    from scripts.pocket import captions
    from scripts.pocket.sources import Item

    emoji = [Item(f"emoji/{vendor}/1f{n:03x}", "cat", None) for vendor in ("twitter", "google") for n in range(200)]
    held = [captions._held_out(item) for item in emoji]
    assert held[:200] == held[200:]
    assert 0 < sum(held[:200]) < 40
