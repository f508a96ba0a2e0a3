"""Tiny models of several families with random weights, built offline through transformers' own classes.

Each has the published prompt format of its family and says, by arithmetic of its own, which tokens a picture of a given
size takes and how the prompt reads around it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXT = [
    "What is the object in the image? Answer the question using a single word or phrase.",
    "USER: ASSISTANT: User: Assistant: system user assistant model",
]
SMALL: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
LINEARS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
CHATML = (
    "{%- for message in messages -%}{{- '<|im_start|>' + message['role'] + '\\n' -}}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{- 'IMAGE' -}}{%- else -%}{{- part['text'] -}}{%- endif -%}{%- endfor -%}"
    "{{- '<|im_end|>\\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)


def tokenizer(
    extra: list[str], eos: str = "</s>", bos: str | None = "<s>", add_bos: bool = False, **named: str
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer; `named` become attributes such as `tokenizer.image_token`."""
    base = Tokenizer(models.BPE())
    base.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    base.decoder = decoders.ByteLevel()
    special = list(dict.fromkeys(["<pad>", *([bos] if bos else []), eos, *extra, *named.values()]))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=360 + len(special), special_tokens=special, initial_alphabet=alphabet)
    base.train_from_iterator(TEXT, trainer)
    if add_bos:
        base.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B:1", special_tokens=[(bos, base.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=base,
        pad_token="<pad>",
        bos_token=bos,
        eos_token=eos,
        extra_special_tokens={**named} if named else extra,
        **({"additional_special_tokens": extra} if named else {}),
    )


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        name: for the test's id.
        save: writes model and processor into a folder.
        prompt: the prompt as text with the picture's tokens written out, of (question, (height, width) or None).
        answer: what follows the prompt, the end token with it, of the answer.
        image_token: the token whose place an image feature takes.
        start: a token that the tokenizer puts in front.
        linears: last names of the linears that get experts.
        layers: number of wrapped linears.
        caches: whether the tower's output may be cached.
    """

    name: str
    save: Callable[[Path], None]
    prompt: Callable[[str, tuple[int, int] | None], str]
    answer: Callable[[str], str]
    image_token: str
    start: str = ""
    linears: frozenset[str] = frozenset(LINEARS)
    layers: int = 14
    caches: bool = False


def _text(config: type, words: PreTrainedTokenizerFast, **changes: Any) -> Any:
    settings = {
        "vocab_size": len(words),
        "num_key_value_heads": 2,
        "pad_token_id": words.pad_token_id,
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
        **SMALL,
    }
    return config(**{**settings, **changes})


def _vision(config: type, **changes: Any) -> Any:
    return config(**{**SMALL, "num_attention_heads": 2, "image_size": 28, "patch_size": 14, **changes})


def _store(folder: Path, model: Any, processor: Any) -> None:
    torch.manual_seed(0)
    with torch.no_grad():  # so that a token's prediction depends on what it sees
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.2)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


# --- LLaVA-1.5, with Llama and with Phi-3's fused projections ---------------------------------------------------

VICUNA = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{- 'USER: ' -}}{%- else -%}{{- 'ASSISTANT: ' -}}{%- endif -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{- '<image>\n' -}}{%- else -%}{{- part['text'] -}}{%- endif -%}{%- endfor -%}"
    "{{- ' ' if message['role'] == 'user' else '</s>' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}"
)


def _vicuna_prompt(question: str, size: tuple[int, int] | None, tokens: int = 4) -> str:
    return f"USER: {'<image>' * tokens + chr(10) if size else ''}{question} ASSISTANT:"


def _save_llava(folder: Path, fused: bool = False) -> None:
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        Phi3Config,
    )

    words = tokenizer(["<image>"], add_bos=True)
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=_vision(CLIPVisionConfig),
        text_config=_text(Phi3Config if fused else LlamaConfig, words),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        image_seq_length=4,
    )
    images = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = LlavaProcessor(
        images,
        words,
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template=VICUNA,
        num_additional_image_tokens=1,
    )
    _store(folder, LlavaForConditionalGeneration(config), processor)


# --- LLaVA-NeXT: the picture whole and in tiles -----------------------------------------------------------------

GRID = [[28, 56], [56, 28], [56, 56]]  # height, width


def _save_llava_next(folder: Path) -> None:
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        LlavaNextImageProcessor,
        LlavaNextProcessor,
    )

    words = tokenizer(["<image>"], add_bos=True)
    torch.manual_seed(0)
    config = LlavaNextConfig(
        vision_config=_vision(CLIPVisionConfig),
        text_config=_text(LlamaConfig, words),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=GRID,
    )
    images = LlavaNextImageProcessor(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, image_grid_pinpoints=GRID
    )
    processor = LlavaNextProcessor(
        images,
        words,
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template=VICUNA,
        num_additional_image_tokens=1,
    )
    _store(folder, LlavaNextForConditionalGeneration(config), processor)


def _next_tokens(size: tuple[int, int]) -> int:
    """4 tokens of the whole picture; of the tiles' tokens those not padding, and one more at the end of each line."""
    height, width = size

    def kept(grid: list[int]) -> tuple[int, int]:
        scale = min(grid[0] / height, grid[1] / width)
        used = min(int(height * scale) * int(width * scale), height * width)
        return used, used - grid[0] * grid[1]  # the most pixels kept, then the least waste

    rows, columns = (side // 14 for side in max(GRID, key=kept))
    if width / height > columns / rows:
        rows -= 2 * ((rows - int(height * columns / width)) // 2)
    else:
        columns -= 2 * ((columns - int(width * rows / height)) // 2)
    return 4 + rows * columns + rows


# --- SmolVLM: tiles with their places written out ---------------------------------------------------------------

IDEFICS = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% else %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
TILE = 28


def _save_idefics3(folder: Path) -> None:
    from transformers import (
        Idefics3Config,
        Idefics3ForConditionalGeneration,
        Idefics3ImageProcessor,
        Idefics3Processor,
        LlamaConfig,
    )
    from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig

    places = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    marks = ["<image>", "<fake_token_around_image>", "<global-img>", "<|im_start|>", "<end_of_utterance>"]
    words = tokenizer([*marks, *places], eos="<end_of_utterance>", bos="<|im_start|>")
    torch.manual_seed(0)
    config = Idefics3Config(
        vision_config=_vision(Idefics3VisionConfig),
        text_config=_text(LlamaConfig, words),
        image_token_id=words.convert_tokens_to_ids("<image>"),
        scale_factor=1,
        pad_token_id=words.pad_token_id,
    )
    images = Idefics3ImageProcessor(size={"longest_edge": 2 * TILE}, max_image_size={"longest_edge": TILE})
    processor = Idefics3Processor(images, words, image_seq_len=4, chat_template=IDEFICS)
    _store(folder, Idefics3ForConditionalGeneration(config), processor)


def _idefics3_prompt(question: str, size: tuple[int, int] | None) -> str:
    if size is None:
        return f"<|im_start|>User: {question}<end_of_utterance>\nAssistant:"
    # The long side becomes two tiles; the short one in proportion (to an even number), then as many as cover it.
    height, width = size
    long, short = max(size), min(size)
    other = int(2 * TILE * short / long)
    other += other % 2
    count = -(-other // TILE)
    rows, columns = (2, count) if height >= width else (count, 2)
    fake, four = "<fake_token_around_image>", "<image>" * 4
    lines = [
        "".join(f"{fake}<row_{row}_col_{column}>{four}" for column in range(1, columns + 1)) + "\n"
        for row in range(1, rows + 1)
    ]
    picture = f"{''.join(lines)}\n{fake}<global-img>{four}{fake}"
    return f"<|im_start|>User:{picture}{question}<end_of_utterance>\nAssistant:"


# --- Qwen2-VL and Qwen2.5-VL: any size, three-dimensional positions ---------------------------------------------


def _save_qwen(folder: Path, newer: bool = False) -> None:
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
    )

    marks = ["<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    words = tokenizer(marks, eos="<|im_end|>", bos=None)
    torch.manual_seed(0)
    number = words.convert_tokens_to_ids
    text = {
        **SMALL,
        "vocab_size": len(words),
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
        "pad_token_id": words.pad_token_id,
        "bos_token_id": None,
        "eos_token_id": words.eos_token_id,
    }
    vision: dict[str, Any] = {"depth": 2, "num_heads": 2, "patch_size": 14}
    if newer:
        vision |= {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32, "fullatt_block_indexes": [1]}
    else:
        vision |= {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}
    make = (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor)
    config_class, model_class, processor_class = (
        make if newer else (Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor)
    )
    config = config_class(
        text_config=text,
        vision_config=vision,
        image_token_id=number("<|image_pad|>"),
        video_token_id=number("<|video_pad|>"),
        vision_start_token_id=number("<|vision_start|>"),
        vision_end_token_id=number("<|vision_end|>"),
    )
    processor = processor_class(
        Qwen2VLImageProcessor(size={"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 16}),
        words,
        Qwen2VLVideoProcessor(),
        chat_template=CHATML.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"),
    )
    _store(folder, model_class(config), processor)


def _chatml(question: str, picture: str) -> str:
    return f"<|im_start|>user\n{picture}{question}<|im_end|>\n<|im_start|>assistant\n"


def _qwen_prompt(question: str, size: tuple[int, int] | None) -> str:
    count = 1
    for side in size or ():
        count *= max(round(side / 28), 1)  # patches of 14 pixels, merged two by two
    return _chatml(question, f"<|vision_start|>{'<|image_pad|>' * count}<|vision_end|>" if size else "")


# --- InternVL ---------------------------------------------------------------------------------------------------


def _save_internvl(folder: Path) -> None:
    from transformers import (
        GotOcr2ImageProcessor,
        InternVLConfig,
        InternVLForConditionalGeneration,
        InternVLProcessor,
        InternVLVideoProcessor,
        InternVLVisionConfig,
        Qwen2Config,
    )

    words = tokenizer(
        ["<|im_start|>"],
        eos="<|im_end|>",
        bos=None,
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    torch.manual_seed(0)
    config = InternVLConfig(
        vision_config=_vision(InternVLVisionConfig, image_size=[28, 28], patch_size=[14, 14]),
        text_config=_text(Qwen2Config, words),
        image_token_id=words.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=1,
        downsample_ratio=0.5,
    )
    images = GotOcr2ImageProcessor(size={"height": 28, "width": 28}, crop_to_patches=True, min_patches=1, max_patches=4)
    processor = InternVLProcessor(
        images,
        words,
        InternVLVideoProcessor(size={"height": 28, "width": 28}),
        image_seq_length=1,
        chat_template=CHATML.replace("IMAGE", "<IMG_CONTEXT>\\n"),
    )
    _store(folder, InternVLForConditionalGeneration(config), processor)


def _internvl_prompt(question: str, size: tuple[int, int] | None) -> str:
    if size is None:
        return _chatml(question, "")
    height, width = size
    grids = [(columns, rows) for columns in range(1, 5) for rows in range(1, 5) if columns * rows <= 4]
    nearest = min(abs(width / height - columns / rows) for columns, rows in grids)
    fitting = [grid for grid in grids if abs(abs(width / height - grid[0] / grid[1]) - nearest) < 1e-9]
    # Of grids of one shape the larger, if the picture has more than half its pixels.
    grid = min(fitting, key=lambda grid: grid[0] * grid[1])
    for other in sorted(fitting, key=lambda grid: grid[0] * grid[1]):
        if width * height > 0.5 * 28 * 28 * other[0] * other[1]:
            grid = other
    tiles = grid[0] * grid[1]
    tiles += tiles > 1  # the whole picture comes last
    return _chatml(question, f"<img>{'<IMG_CONTEXT>' * tiles}</img>\n")


# --- Gemma 3: picture tokens see each other both ways, turns end with a token that is not the tokenizer's end ------

GEMMA = (
    "{{ bos_token }}{%- for message in messages -%}"
    "{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}"
    "{{ '<start_of_turn>' + role + '\n' }}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{ '<start_of_image>' }}{%- else -%}{{ part['text'] | trim }}{%- endif -%}"
    "{%- endfor -%}{{ '<end_of_turn>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"
)


def _save_gemma3(folder: Path) -> None:
    from transformers import (
        Gemma3Config,
        Gemma3ForConditionalGeneration,
        Gemma3ImageProcessor,
        Gemma3Processor,
        Gemma3TextConfig,
        SiglipVisionConfig,
    )

    words = tokenizer(
        ["<start_of_turn>", "<end_of_turn>"],
        eos="<eos>",
        bos="<bos>",
        add_bos=True,
        image_token="<image_soft_token>",
        boi_token="<start_of_image>",
        eoi_token="<end_of_image>",
    )
    torch.manual_seed(0)
    number = words.convert_tokens_to_ids
    config = Gemma3Config(
        vision_config=_vision(SiglipVisionConfig),
        text_config=_text(Gemma3TextConfig, words, head_dim=8, sliding_window=64),
        mm_tokens_per_image=4,
        image_token_index=number("<image_soft_token>"),
        boi_token_index=number("<start_of_image>"),
        eoi_token_index=number("<end_of_image>"),
    )
    images = Gemma3ImageProcessor(size={"height": 28, "width": 28})
    processor = Gemma3Processor(images, words, chat_template=GEMMA, image_seq_length=4)
    _store(folder, Gemma3ForConditionalGeneration(config), processor)


def _gemma3_prompt(question: str, size: tuple[int, int] | None) -> str:
    picture = f"\n\n<start_of_image>{'<image_soft_token>' * 4}<end_of_image>\n\n" if size else ""
    return f"<bos><start_of_turn>user\n{picture}{question}<end_of_turn>\n<start_of_turn>model\n"


# --- PaliGemma: no chat template, and a processor that writes the answer itself -----------------------------------


def _save_paligemma(folder: Path) -> None:
    from transformers import (
        GemmaConfig,
        PaliGemmaConfig,
        PaliGemmaForConditionalGeneration,
        PaliGemmaProcessor,
        SiglipImageProcessor,
        SiglipVisionConfig,
    )

    words = tokenizer(["<image>"], eos="<eos>", bos="<bos>")
    images = SiglipImageProcessor(size={"height": 28, "width": 28})
    images.image_seq_length = 4
    processor = PaliGemmaProcessor(images, words)
    torch.manual_seed(0)
    config = PaliGemmaConfig(
        vision_config=_vision(SiglipVisionConfig, projection_dim=32),
        text_config=_text(GemmaConfig, words, head_dim=8),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        projection_dim=32,
        hidden_size=32,
    )
    _store(folder, PaliGemmaForConditionalGeneration(config), processor)


FAMILIES = [
    Family("llava", _save_llava, _vicuna_prompt, lambda a: f" {a}</s>", "<image>", "<s>", caches=True),
    Family(
        "llava-phi3",
        lambda folder: _save_llava(folder, fused=True),
        _vicuna_prompt,
        lambda a: f" {a}</s>",
        "<image>",
        "<s>",
        frozenset({"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}),
        8,
        caches=True,
    ),
    Family(
        "llava-next",
        _save_llava_next,
        lambda q, size: _vicuna_prompt(q, size, _next_tokens(size) if size else 0),
        lambda a: f" {a}</s>",
        "<image>",
        "<s>",
    ),
    Family("idefics3", _save_idefics3, _idefics3_prompt, lambda a: f" {a}<end_of_utterance>", "<image>"),
    Family("qwen2-vl", _save_qwen, _qwen_prompt, lambda a: f"{a}<|im_end|>", "<|image_pad|>"),
    Family(
        "qwen2.5-vl",
        lambda folder: _save_qwen(folder, newer=True),
        _qwen_prompt,
        lambda a: f"{a}<|im_end|>",
        "<|image_pad|>",
    ),
    Family("internvl", _save_internvl, _internvl_prompt, lambda a: f"{a}<|im_end|>", "<IMG_CONTEXT>"),
    Family("gemma3", _save_gemma3, _gemma3_prompt, lambda a: f"{a}<end_of_turn>", "<image_soft_token>"),
    Family(
        "paligemma",
        _save_paligemma,
        lambda q, size: f"{'<image>' * 4}<bos>{q}\n",
        lambda a: f"{a}<eos>",
        "<image>",
    ),
]
