"""How LLaVA-1.5 speaks and sees: Vicuna's tokenizer with image tokens, "vicuna_v1", the configuration, the processor.

The chat template writes

    {system} USER: <image>\\n{question} ASSISTANT: {answer}</s>

An image is padded to a square with CLIP's mean colour, scaled to 336 x 336 (bicubic, Pillow) and becomes the 24 x 24
patch tokens of the tower's last layer but one, without the class token.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from dymoe.errors import DymoeError
from dymoe.files import read_json
from dymoe.libraries import require_extra

if TYPE_CHECKING:
    import torch
    from transformers import LlavaConfig, LlavaProcessor, PreTrainedTokenizerFast

IMAGE_TOKEN = "<image>"
PAD_TOKEN = "<pad>"
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
CHAT_TEMPLATE = (
    "{%- macro words(content) -%}"
    "{%- if content is string -%}{{- content -}}{%- else -%}"
    "{%- for part in content if part['type'] == 'image' -%}{{- '<image>\\n' -}}{%- endfor -%}"
    "{%- for part in content if part['type'] == 'text' -%}{{- part['text'] -}}{%- endfor -%}"
    "{%- endif -%}"
    "{%- endmacro -%}"
    "{%- if messages[0]['role'] == 'system' -%}{{- words(messages[0]['content']) + ' ' -}}"
    '{%- else -%}{{- "' + SYSTEM + ' " -}}{%- endif -%}'
    "{%- for message in messages if message['role'] != 'system' -%}"
    "{%- if message['role'] == 'user' -%}{{- 'USER: ' + words(message['content']) + ' ' -}}"
    "{%- else -%}{{- 'ASSISTANT: ' + words(message['content']) + '</s>' -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}"
)
MAX_LENGTH = 2048  # LLaVA's training length, in tokens
ROWS = 64  # the vocabulary is padded to a multiple of this


def build_tokenizer(folder: Path) -> "PreTrainedTokenizerFast":
    """Vicuna's tokenizer with <image> and <pad>, giving the token ids that LLaVA's training code gives.

    LLaVA tokenises the text before and after <image> apart with sentencepiece, which puts a space in front of each
    piece of text ("\\n" after the image becomes the two tokens of " \\n"). A fast tokenizer does the same if it
    prepends in its normaliser, once for each piece between special tokens; that is set here, whatever the folder says.

    Raises:
        DymoeError: the folder has no tokenizer, or it cannot be read.
    """
    from tokenizers import decoders, normalizers, processors
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    has_model = (folder / "tokenizer.model").exists()
    if not has_model and not (folder / "tokenizer.json").exists():
        raise DymoeError(f"{folder}: no tokenizer here; expected tokenizer.model or tokenizer.json")
    if not (folder / "tokenizer.json").exists():
        require_extra("pocket", f"{folder / 'tokenizer.model'}")
    try:
        old: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DymoeError(f"{folder}: its tokenizer cannot be read ({str(error).strip()})") from error
    for name in ("bos_token", "eos_token"):
        if getattr(old, name) is None:
            raise DymoeError(f"{folder}: its tokenizer has no {name}; expected Vicuna's (<s> and </s>)")
    if old.eos_token != "</s>":
        raise DymoeError(f"{folder}: its tokenizer ends answers with {old.eos_token}; vicuna_v1 ends them with </s>")
    backend = old.backend_tokenizer
    if "▁" in old.get_vocab():  # sentencepiece; not the byte-level vocabularies of later models
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.pre_tokenizer = None
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    backend.post_processor = processors.TemplateProcessing(
        single=f"{old.bos_token} $A",
        pair=f"{old.bos_token} $A {old.bos_token} $B",
        special_tokens=[(old.bos_token, old.bos_token_id)],
    )
    backend.no_padding()
    backend.no_truncation()
    # Not LlamaTokenizer: that class builds its own normaliser when it is loaded again.
    result = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=old.bos_token,
        eos_token=old.eos_token,
        unk_token=old.unk_token,
        padding_side="left",
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )
    result.add_special_tokens({"additional_special_tokens": [_special(IMAGE_TOKEN)]})
    result.add_special_tokens({"pad_token": _special(PAD_TOKEN)})
    return result


def _special(token: str) -> Any:
    from tokenizers import AddedToken

    return AddedToken(token, special=True, normalized=False)


def build_config(
    language: Path, tower: Path, tokenizer: "PreTrainedTokenizerFast", dtype: "torch.dtype"
) -> "LlavaConfig":
    """LLaVA-1.5's configuration around a Llama and a CLIP folder.

    Raises:
        DymoeError: another architecture, or a tokenizer that does not fit the language model.
    """
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    llama = read_config(language)
    if llama.get("model_type") != "llama" or "mm_projector_type" in llama or "mm_vision_tower" in llama:
        named = llama.get("model_type")
        raise DymoeError(
            f"{language / 'config.json'}: model_type {named!r} is not a plain Llama; give Vicuna itself (for example "
            "lmsys/vicuna-7b-v1.5), not a LLaVA: an instruction-tuned one has seen the benchmark's tasks"
        )
    clip = read_config(tower)
    if clip.get("model_type") not in ("clip", "clip_vision_model"):
        raise DymoeError(
            f"{tower / 'config.json'}: model_type {clip.get('model_type')!r} is not CLIP; give CLIP ViT-L/14-336 "
            "(openai/clip-vit-large-patch14-336)"
        )
    try:
        text: Any = LlamaConfig.from_pretrained(language)
        vision: Any = CLIPVisionConfig.from_pretrained(tower)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DymoeError(f"{language} or {tower}: config.json cannot be read ({error})") from error
    plain = len(tokenizer) - 2
    if plain > text.vocab_size:
        raise DymoeError(
            f"{language}: its tokenizer has {plain} tokens but config.json says vocab_size {text.vocab_size}"
        )
    if vision.image_size % vision.patch_size:
        raise DymoeError(f"{tower / 'config.json'}: image_size {vision.image_size} is no multiple of patch_size")
    # transformers' conversion adds two rows to the model's own, then pads.
    text.vocab_size = math.ceil((text.vocab_size + 2) / ROWS) * ROWS
    text.pad_token_id = tokenizer.pad_token_id
    text.architectures, text.dtype, vision.architectures, vision.dtype = None, dtype, None, dtype
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=cast(int, tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)),
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,
        projector_hidden_act="gelu",
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
        tie_word_embeddings=text.tie_word_embeddings,
    )
    config.architectures = ["LlavaForConditionalGeneration"]
    config.dtype = dtype
    config.pad_token_id = tokenizer.pad_token_id
    return config


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json.

    Raises:
        DymoeError: it is missing or no mapping.
    """
    values = read_json(folder / "config.json")
    if not isinstance(values, dict):
        raise DymoeError(f"{folder / 'config.json'}: expected a mapping")
    return values


def pixel_settings(tower: Path) -> dict[str, Any]:
    """Mean and deviation of the tower's own processor, CLIP's where it has none.

    Raises:
        DymoeError: its preprocessor_config.json holds other things than three numbers each.
    """
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    file = tower / "preprocessor_config.json"
    settings = read_json(file) if file.exists() else {}
    pixels = {
        "image_mean": settings.get("image_mean", OPENAI_CLIP_MEAN),
        "image_std": settings.get("image_std", OPENAI_CLIP_STD),
    }
    for key, value in pixels.items():
        if not isinstance(value, list) or len(value) != 3 or not all(isinstance(x, int | float) for x in value):
            raise DymoeError(f"{file}: {key} is {value!r}; expected three numbers")
    return pixels


def build_processor(
    tokenizer: "PreTrainedTokenizerFast", config: "LlavaConfig", pixels: Mapping[str, Any]
) -> "LlavaProcessor":
    """LLaVA's processor: vicuna_v1, pictures padded to a square with the mean colour and scaled with Pillow."""
    from transformers import LlavaProcessor
    from transformers.image_utils import PILImageResampling
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    vision: Any = config.vision_config
    side = vision.image_size
    images = LlavaImageProcessorPil(
        do_pad=True,
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        resample=PILImageResampling.BICUBIC,
        **pixels,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=1,  # the class token, which "default" takes away again
    )


def generation_config(tokenizer: "PreTrainedTokenizerFast") -> Any:
    """Where generation begins, ends and pads."""
    from transformers import GenerationConfig

    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
