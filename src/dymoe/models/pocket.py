"""The pocket model: SmolLM2-135M and EfficientNet-Lite0, joined by a small projector as transformers' FastVLM.

An image is scaled to 128 x 128 pixels; the tower's last map of 4 x 4 x 1280 becomes 16 image tokens, row by row.
The prompt is short (the language model is small and so is the machine):

    User:<image>\\n{question}\\nAssistant: {answer}<|im_end|>

The weights of tower and language model come from `dymoe.models.assets`; the projector is shipped with this package
and was trained by `python -m scripts.pocket.train_projector` on captions alone (docs/pocket-model.md).
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dymoe.errors import DymoeError
from dymoe.files import read_json, sha256_of
from dymoe.libraries import require_extra
from dymoe.models import assets

if TYPE_CHECKING:
    import torch
    from transformers import LlavaProcessor, PreTrainedModel, ProcessorMixin

PROJECTOR = Path(__file__).with_name("pocket_projector.safetensors")
IMAGE_SIZE = 128  # pixels, both sides
STRIDE = 32  # of the tower: pixels per image token and side
TOWER_WIDTH = 1280
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if not loop.first -%}{{ '\\n' }}{%- endif -%}"
    "{{- message['role'] | capitalize + ':' -}}"
    "{%- if message['content'] is string -%}{%- set parts = [{'type': 'text', 'text': message['content']}] -%}"
    "{%- else -%}{%- set parts = message['content'] -%}{%- endif -%}"
    "{%- for part in parts if part['type'] == 'image' -%}{{ '<image>' }}{%- endfor -%}"
    "{%- for part in parts if part['type'] == 'text' -%}"
    "{{- (' ' if message['role'] == 'assistant' else '\\n') + part['text'] -}}"
    "{%- endfor -%}"
    "{%- if message['role'] == 'assistant' -%}{{ '<|im_end|>' }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '\\nAssistant:' }}{%- endif -%}"
)


def build_processor(tokenizer_folder: Path) -> "LlavaProcessor":
    """The processor of the pocket model: scaling to 128 x 128 without cropping, [-1, 1] pixels, left padding.

    EfficientNet-Lite was trained on pixels (x - 127) / 128; timm states mean and deviation 0.5 for these weights.
    """
    from transformers import AutoTokenizer, CLIPImageProcessor, LlavaProcessor
    from transformers.image_utils import PILImageResampling

    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    image_processor = CLIPImageProcessor(
        size=side,
        crop_size=side,
        do_center_crop=False,
        resample=PILImageResampling.BICUBIC,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=STRIDE,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
        image_token=assets.IMAGE_TOKEN,
    )


def build_config(text_config: dict[str, Any], image_token_id: int) -> Any:
    """The FastVlmConfig of the pocket model around a Llama config given as a dict."""
    from transformers import FastVlmConfig

    return FastVlmConfig(
        vision_config={
            "model_type": "timm_wrapper",
            "architecture": assets.VISION_ARCHITECTURE,
            "do_pooling": False,
            "hidden_size": TOWER_WIDTH,
            "initializer_range": 0.02,
        },
        text_config=text_config,
        image_token_index=image_token_id,
        image_seq_length=(IMAGE_SIZE // STRIDE) ** 2,
        tie_word_embeddings=True,
    )


def describe(language: Path) -> "tuple[Any, LlavaProcessor]":
    """Configuration and processor of the pocket model.

    Args:
        language: the folder of its language model.
    """
    import json

    processor: Any = build_processor(language)
    text_config = json.loads((language / "config.json").read_text(encoding="utf-8"))
    text_config["pad_token_id"] = processor.tokenizer.pad_token_id
    return build_config(text_config, processor.image_token_id), processor


def outline() -> "tuple[Any, LlavaProcessor]":
    """Configuration and processor; of the parts, only the language model's folder is needed."""
    return describe(assets.language_model())


def digests(cache_dir: Path | None = None) -> list[tuple[str, str]]:
    """Name and SHA-256 of every file that is read; those of the parts were compared when they were opened."""
    hashes = [(PROJECTOR.name, sha256_of(PROJECTOR))]
    for part in (assets.language_model(cache_dir), assets.vision_tower(cache_dir)):
        files = read_json(part / assets.MANIFEST)["files"]
        hashes += [(f"{part.name}/{name}", entry["sha256"]) for name, entry in sorted(files.items())]
    return hashes


def load_projector(path: Path = PROJECTOR) -> dict[str, "torch.Tensor"]:
    """The projector's weights: linear_1.weight (576, 1280), linear_2.weight (576, 576) and their biases.

    Raises:
        DymoeError: the file is missing or is no safetensors file with exactly these weights.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise DymoeError(f"{path}: the projector of the pocket model cannot be read ({error})") from error
    expected = {f"linear_{n}.{leaf}" for n in (1, 2) for leaf in ("weight", "bias")}
    if set(state) != expected:
        raise DymoeError(f"{path}: holds {', '.join(sorted(state))}; expected {', '.join(sorted(expected))}")
    return state


def random_projector(width: int, seed: int = 0) -> dict[str, "torch.Tensor"]:
    """An untrained projector (fp32) to the language width `width`, as torch starts a Linear; the same for a seed."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first, second = torch.nn.Linear(TOWER_WIDTH, width), torch.nn.Linear(width, width)
    layers = {"linear_1": first, "linear_2": second}
    return {f"{name}.{key}": value for name, layer in layers.items() for key, value in layer.state_dict().items()}


def assemble(
    dtype: "torch.dtype",
    cache_dir: str | Path | None = None,
    projector: dict[str, "torch.Tensor"] | None = None,
    source: str | None = None,
) -> tuple["PreTrainedModel", "ProcessorMixin"]:
    """Model and processor of the pocket model in `dtype`; `projector` is the shipped one unless given.

    Raises:
        DymoeError: the extra `pocket` is not installed, the weights are neither cached nor can be fetched, or the
            projector's file is broken.
    """
    import torch
    from safetensors.torch import load_file
    from transformers import FastVlmForConditionalGeneration

    require_extra("pocket", "model: pocket")
    language = assets.language_model(cache_dir, source)
    vision = assets.vision_tower(cache_dir, source)
    config, processor = describe(language)
    projector = load_projector() if projector is None else projector
    state = {f"model.multi_modal_projector.{key}": value for key, value in projector.items()}
    state |= {
        f"model.vision_tower.timm_model.{key}": value
        for key, value in load_file(vision / "model.safetensors").items()
        if not key.startswith("classifier.")
    }
    state |= {
        f"model.language_model.{key.removeprefix('model.')}": value
        for key, value in load_file(language / "model.safetensors").items()
        if key != "lm_head.weight"  # tied to the embedding
    }
    model = FastVlmForConditionalGeneration.from_pretrained(None, config=config, state_dict=state, dtype=dtype)
    if not torch.cuda.is_available():
        # On a CPU the fused attention with a padding mask is slower than plain products.
        model.set_attn_implementation({"text_config": "eager"})
    tokens = processor.tokenizer
    model.generation_config.update(
        bos_token_id=tokens.bos_token_id, eos_token_id=tokens.eos_token_id, pad_token_id=tokens.pad_token_id
    )
    return model, processor
