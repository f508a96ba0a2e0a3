"""The real pocket model once per session, a tiny model of the same class in fp32, and made pictures."""

import io
import json

import pytest
import torch
from PIL import Image, ImageDraw

from dymoe.models import Lvlm, assets, load, pocket
from dymoe.tasks import Sample


def png(colour, shape="circle", size=(96, 80)):
    """A picture (PNG bytes) of one shape in the upper left quarter."""
    picture = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(picture)
    (pen.ellipse if shape == "circle" else pen.rectangle)((5, 5, size[0] // 2, size[1] // 2), fill=colour)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def sample(name, image, question="What is this?", answer="a cat"):
    return Sample(name, image, question, answer, {"answer": answer})


@pytest.fixture(scope="session")
def real():
    """The pocket model as users get it."""
    return load("pocket")


@pytest.fixture(scope="session")
def tiny(real):
    """The pocket model's classes and tower with a random two-layer language model of width 64, in fp32."""
    from safetensors.torch import load_file
    from transformers import FastVlmForConditionalGeneration

    text = json.loads((assets.language_model() / "config.json").read_text())
    text.update(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    text.update(num_key_value_heads=2, head_dim=16, pad_token_id=0, dtype="float32")
    torch.manual_seed(0)
    model = FastVlmForConditionalGeneration(pocket.build_config(text, real.processor.image_token_id))
    tower = load_file(assets.vision_tower() / "model.safetensors")
    model.model.vision_tower.timm_model.load_state_dict(
        {key: value for key, value in tower.items() if not key.startswith("classifier.")}
    )
    with torch.no_grad():  # so that a token's prediction depends on what it sees
        for parameter in [*model.model.language_model.parameters(), *model.model.multi_modal_projector.parameters()]:
            if parameter.ndim == 2:
                parameter.normal_(0, 0.2)
    return Lvlm(model.float().requires_grad_(False).eval(), real.processor)


@pytest.fixture
def mixed():
    """A batch of unequal lengths, one sample without an image."""
    return [
        sample("red", png("red"), "What colour is it?\nAnswer with one word.", "red"),
        sample("sum", None, "How much is 2 and 3, please tell me?", "5"),
        sample("blue", png("blue", "box"), "And this?", "a blue box"),
    ]
