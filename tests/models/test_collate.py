"""Batches: what is in them token by token, and that the model reads them right."""

import copy
import io
import subprocess
import sys

import pytest
import torch
from accelerate.utils import send_to_device
from PIL import Image
from transformers import Trainer, TrainingArguments

from dymoe.errors import DymoeError
from dymoe.images import decode
from dymoe.models import Collator, ImageFeatures, Lvlm
from tests.models.conftest import png, sample


def test_prompt_tokens_and_label_mask(real):
    tokenizer = real.processor.tokenizer
    batch = Collator(real)([sample("a", png("red"), "What is it?\nOne word.", "a cat")])
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    image = tokenizer.convert_tokens_to_ids("<image>")
    plain = {text: tokenizer(text, add_special_tokens=False).input_ids for text in ("User:", " a cat")}
    question = tokenizer("\nWhat is it?\nOne word.\nAssistant:", add_special_tokens=False).input_ids
    assert ids == [*plain["User:"], *[image] * 16, *question, *plain[" a cat"], tokenizer.eos_token_id]
    answer = len(plain[" a cat"]) + 1
    assert labels == [-100] * (len(ids) - answer) + ids[-answer:]
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert batch["attention_mask"].tolist() == [[1] * len(ids)]
    assert batch["pixel_values"].shape == (1, 3, 128, 128)


def test_prompts_are_the_training_prompts(real, mixed):
    collator = Collator(real)
    batch, prompts = collator(mixed), collator.prompts(mixed)
    assert "labels" not in prompts
    for row in range(3):
        prompt = prompts["input_ids"][row][prompts["attention_mask"][row] == 1]
        seen = (batch["attention_mask"][row] == 1) & (batch["labels"][row] == -100)
        assert torch.equal(batch["input_ids"][row][seen], prompt)


def test_rows_are_padded_on_the_left_alone(real, mixed):
    batch = Collator(real)(mixed)
    mask = batch["attention_mask"]
    assert mask[:, -1].all()
    assert (mask.diff(dim=1) >= 0).all()
    assert not mask.all()
    assert (batch["labels"][:, -1] == real.processor.tokenizer.eos_token_id).all()


def test_left_padding_gives_the_logits_of_a_sample_alone(tiny, mixed):
    collator = Collator(tiny)
    together = collator(mixed)
    with torch.no_grad():
        logits = tiny.model(**together).logits
        for row, one in enumerate(mixed):
            alone = tiny.model(**collator([one])).logits[0]
            torch.testing.assert_close(logits[row, -len(alone) :], alone, atol=2e-4, rtol=1e-4)
    assert logits.std() > 0.1


@pytest.mark.parametrize("which", ["tiny", "real"])
def test_cached_features_equal_the_pixel_path(which, mixed, request):
    lvlm = request.getfixturevalue(which)
    pixels, features = Collator(lvlm), Collator(lvlm, ImageFeatures(lvlm, batch_size=2))
    one, other = pixels(mixed), features(mixed)
    assert "pixel_values" not in other
    assert torch.equal(one["input_ids"], other["input_ids"])
    assert torch.equal(one["labels"], other["labels"])
    assert other["mm_encoder_outputs"]["image"].pooler_output.shape[:2] == (2, 16)
    with torch.no_grad():
        a, b = lvlm.model(**one), lvlm.model(**other)
    torch.testing.assert_close(a.logits, b.logits, atol=1e-4, rtol=1e-4)
    assert abs(float(a.loss) - float(b.loss)) < 1e-4
    outputs = [
        lvlm.model.generate(**collator.prompts(mixed), max_new_tokens=4, do_sample=False)
        for collator in (pixels, features)
    ]
    assert torch.equal(*outputs)


def test_an_image_changes_the_answer_of_its_own_row_only(tiny, mixed):
    collator = Collator(tiny, ImageFeatures(tiny, batch_size=2))
    changed = [sample("red", png("green", "box"), mixed[0].question, mixed[0].answer), *mixed[1:]]
    with torch.no_grad():
        a, b = (tiny.model(**collator(batch)).logits for batch in (mixed, changed))
    assert (a[0] - b[0]).abs().max() > 1e-2
    torch.testing.assert_close(a[1:], b[1:], atol=1e-5, rtol=1e-5)


def test_a_batch_of_text_alone_works(tiny, mixed):
    for collator in (Collator(tiny), Collator(tiny, ImageFeatures(tiny, batch_size=2))):
        batch = collator([mixed[1], mixed[1]])
        assert set(batch) == {"input_ids", "attention_mask", "labels"}
        assert torch.isfinite(tiny.model(**batch).loss)


def test_features_survive_what_moves_a_batch(tiny, mixed, tmp_path):
    batch = Collator(tiny, ImageFeatures(tiny, batch_size=2))(mixed)
    output = batch["mm_encoder_outputs"]["image"]
    moved = send_to_device(batch, torch.device("meta"))["mm_encoder_outputs"]["image"]
    assert type(moved) is type(output)
    assert moved.pooler_output.device.type == "meta"
    arguments = TrainingArguments(tmp_path, use_cpu=True, report_to=[], remove_unused_columns=False)
    prepared = Trainer(tiny.model, arguments)._prepare_inputs(batch)
    assert torch.equal(prepared["mm_encoder_outputs"]["image"].pooler_output, output.pooler_output)
    pinned = copy.copy(output)  # what torch's pin_memory does with a mapping
    pinned.update({"pooler_output": output.pooler_output + 1})
    assert torch.equal(pinned.pooler_output, output.pooler_output + 1)
    assert not torch.equal(output.pooler_output, pinned.pooler_output)


def truncated():
    return png("red")[:-200]


@pytest.mark.parametrize("features", [False, True])
@pytest.mark.parametrize("image", [b"", b"no image at all", truncated()], ids=["empty", "text", "truncated"])
def test_a_broken_image_is_named(tiny, image, features):
    collator = Collator(tiny, ImageFeatures(tiny) if features else None)
    with pytest.raises(DymoeError, match="sample 'bad-7': broken image"):
        collator([sample("bad-7", image)])


def test_features_name_the_broken_sample(tiny):
    with pytest.raises(DymoeError, match="sample 'bad-7': broken image"):
        ImageFeatures(tiny).add_samples([sample("good", None), sample("bad-7", b"x")])
    with pytest.raises(DymoeError, match="image 0: broken image"):
        ImageFeatures(tiny).add([b"x"])


def test_bad_text_is_named(tiny):
    collator = Collator(tiny, max_length=30)
    with pytest.raises(DymoeError, match=r"sample 'long': \d+ tokens, more than max_length 30"):
        collator([sample("long", None, "word " * 40)])
    with pytest.raises(DymoeError, match="sample 'sly': its question contains the special token <image>"):
        collator([sample("sly", None, "what is <image>?")])
    with pytest.raises(DymoeError, match="sample 'mute': it has no answer"):
        collator([sample("mute", None, answer=" ")])
    with pytest.raises(DymoeError, match="at least one sample"):
        collator([])


def test_features_do_not_depend_on_their_batch(real):
    images = [png(colour) for colour in ("red", "blue", "green")]
    together, alone = ImageFeatures(real, batch_size=3), ImageFeatures(real, batch_size=3)
    together.add(images)
    for image in reversed(images):
        assert torch.equal(together.get(image), alone.get(image))


def test_features_are_bounded_and_come_back(tiny):
    images = [png(colour) for colour in ("red", "blue", "green")]
    size = ImageFeatures(tiny, batch_size=1).get(images[0]).nbytes
    features = ImageFeatures(tiny, batch_size=1, max_bytes=2 * size)
    first = features.get(images[0])
    features.add(images)
    assert len(features) == 2
    assert torch.equal(features.get(images[0]), first)


def test_each_image_is_computed_once_in_full_batches(tiny, monkeypatch):
    """Asked for one picture after the other or all at once, twice the same among them, and when they are there."""
    calls = []
    features = ImageFeatures(tiny, batch_size=4)
    encode = features._encode
    monkeypatch.setattr(features, "_encode", lambda inputs: calls.append(len(inputs["pixel_values"])) or encode(inputs))
    images = [png((place, 0, 0)) for place in range(9)]
    items = [sample(str(place), image) for place, image in enumerate([*images, *images[::-1], None])]
    found = features.of_samples(items)
    assert calls == [4, 4, 4]
    assert len(found) == 18
    assert len(features) == 9
    assert all(torch.equal(one, other) for one, other in zip(found, found[::-1], strict=True))
    features.add_samples(items)
    Collator(tiny, features).see(items)
    assert torch.equal(features.get(images[3]), found[3])
    assert calls == [4, 4, 4]
    alone = ImageFeatures(tiny, batch_size=4)
    assert all(torch.equal(alone.get(image), one) for image, one in zip(images, found, strict=False))


def test_more_images_than_are_kept_come_all_the_same(tiny):
    images = [png((place, 0, 0)) for place in range(9)]
    size = ImageFeatures(tiny, batch_size=1).get(images[0]).nbytes
    features, whole = ImageFeatures(tiny, batch_size=2, max_bytes=3 * size), ImageFeatures(tiny, batch_size=2)
    items = [sample(str(place), image) for place, image in enumerate([*images, *images])]
    for one, other in zip(features.of_samples(items), whole.of_samples(items), strict=True):
        assert torch.equal(one, other)
    assert len(features) == 3
    assert features.holds(3)
    assert not features.holds(4)
    Collator(tiny, features).see(items)  # would only push out what is kept
    assert len(features) == 3


@pytest.mark.parametrize("cached", [False, True])
def test_lengths_are_those_of_the_prompts(tiny, mixed, cached):
    collator = Collator(tiny, ImageFeatures(tiny, batch_size=2) if cached else None)
    for items in (mixed, mixed[1:2], mixed[::-1]):
        assert collator.lengths(items) == collator.prompts(items)["attention_mask"].sum(1).tolist()
    assert collator.lengths([]) == []


def test_transparency_is_laid_on_white_and_exif_turns():
    buffer = io.BytesIO()
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(buffer, "PNG")
    assert decode(buffer.getvalue()).getpixel((1, 1)) == (255, 255, 255)
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.new("RGB", (8, 4)).save(buffer, "JPEG", exif=exif)
    assert decode(buffer.getvalue()).size == (4, 8)


@pytest.fixture
def llava(real):
    """A tiny LLaVA (CLIP tower, LLaMA) of transformers with random weights, for another form of image features."""
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    tokenizer = real.processor.tokenizer
    image_token = real.processor.image_token
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=real.processor.image_token_id, image_seq_length=4
    )
    model = LlavaForConditionalGeneration(config).eval().requires_grad_(False)
    images = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template=real.processor.chat_template,
        image_token=image_token,
        num_additional_image_tokens=1,
    )
    return Lvlm(model, processor)


def test_cached_features_work_for_llava_too(llava, mixed):
    features = ImageFeatures(llava, batch_size=2)
    plain, cached = Collator(llava)(mixed), Collator(llava, features)(mixed)
    assert not features.as_tensor
    assert torch.equal(plain["input_ids"], cached["input_ids"])
    with torch.no_grad():
        torch.testing.assert_close(llava.model(**cached).logits, llava.model(**plain).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("cached", [False, True])
def test_a_batch_of_huge_pictures_takes_the_memory_of_one(cached, tmp_path):
    """Pictures of 81 million pixels, a few kB each as files: all at once they took ten gigabytes."""
    code = f"""
import io, resource
from PIL import Image
from dymoe.models import Collator, ImageFeatures, load
from dymoe.tasks import Sample
lvlm = load("pocket")
features = ImageFeatures(lvlm, batch_size=2) if {cached} else None
buffers = []
for shade in range(3):
    buffer = io.BytesIO()
    Image.new("L", (9000, 9000), shade).save(buffer, "PNG")
    buffers.append(buffer.getvalue())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
Collator(lvlm, features)([Sample(str(n), data, "q", "a", {{}}) for n, data in enumerate(buffers)])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(told.split()[-1]) < 1500  # MiB; one picture takes a GiB until it is scaled
