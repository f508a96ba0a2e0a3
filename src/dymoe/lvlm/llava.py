"""LLaVA-1.5 before instruction tuning: Vicuna, CLIP ViT-L/14-336 and the pretrained projector in one model.

This is the base that CoIN and DyMoE start from. The published LLaVA-1.5 is no substitute: it was tuned on data that the
benchmark's tasks are made of. The result is a `LlavaForConditionalGeneration` of transformers in a folder, with a
processor whose chat template writes LLaVA's conversation "vicuna_v1":

    {system} USER: <image>\\n{question} ASSISTANT: {answer}</s>

An image is padded to a square with CLIP's mean colour, scaled to 336 x 336 (bicubic, Pillow) and becomes the 24 x 24
patch tokens of the tower's last layer but one, without the class token. Tokenizer and embeddings grow as in
transformers' own conversion of LLaVA-1.5: <image> and <pad> at the end, rows padded to a multiple of 64. Everything is
checked before anything is written; tensors pass through memory one output shard at a time.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from dymoe.errors import DymoeError
from dymoe.files import atomic_dir, atomic_json, free_space, read_json, sha256_of
from dymoe.lvlm.checkpoint import INDEXES, Weights, fetch, weight_files

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
SPREAD = 1e-5  # share of the old rows' covariance that new rows get, as in transformers' conversion
MANIFEST = "manifest.json"
PROJECTOR = {"0": "linear_1", "2": "linear_2"}  # LLaVA's Sequential(linear, GELU, linear)
SHARD_BYTES = 4 << 30

# Buffers that older transformers saved and newer ones compute.
_COMPUTED = re.compile(r".*\.(rotary_emb\.inv_freq|embeddings\.position_ids)")


@dataclass(frozen=True)
class _Part:
    """One tensor of the result: its name there, where it comes from, its shape there and in the source."""

    name: str
    weights: Weights
    key: str
    shape: tuple[int, ...]
    source: tuple[int, ...]


@dataclass(frozen=True)
class Assembled:
    """What `assemble` wrote: the folder, its parameters and bytes of weights, image tokens of a picture."""

    folder: Path
    parameters: int
    bytes: int
    image_tokens: int


def assemble(
    llm: str,
    vision: str,
    projector: str | Path,
    output: str | Path,
    dtype: str = "bfloat16",
    shard_bytes: int = SHARD_BYTES,
    tell: Callable[[str], None] = lambda text: None,
) -> Assembled:
    """Write the LLaVA-1.5 base model to a new folder that `dymoe.lvlm.load` and transformers read.

    The same inputs give the same bytes. `manifest.json` holds size and SHA-256 of every input and output file.

    Args:
        llm: Vicuna's folder or Hub id (LlamaForCausalLM; safetensors or .bin shards).
        vision: folder or Hub id of CLIP ViT-L/14-336 (the whole CLIP or its vision model).
        projector: LLaVA's `mm_projector.bin` or the same as safetensors, or the folder that holds it.
        output: the folder to write; it must not exist or be empty.
        dtype: floating dtype of the result.
        shard_bytes: largest output file, and so roughly the memory that this takes.
        tell: called with each step in words.

    Raises:
        DymoeError: an input is missing, damaged, of another architecture or size (file and tensor are named), the
            output exists, or the disk is too small. Nothing is written then.
    """
    import torch

    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise DymoeError(f"dtype: {dtype!r} is not a floating dtype of torch; use bfloat16, float32 or float16")
    target = Path(output).expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise DymoeError(f"{target}: exists and is not an empty folder; give a new one with --output or remove it")
    language, tower = fetch(llm, "--llm", ["tokenizer.model"]), fetch(vision, "--vision")
    tell("checking the parts")
    tokenizer = build_tokenizer(language)
    config = build_config(language, tower, tokenizer, kind)
    weights = {
        "llm": Weights(weight_files(language)),
        "vision": Weights(weight_files(tower)),
        "projector": Weights((_projector_file(Path(projector).expanduser()),)),
    }
    parts = _plan(config, weights, language, tower)
    processor = build_processor(tokenizer, config, _pixel_settings(tower))
    size = sum(math.prod(part.shape) for part in parts)
    total = size * kind.itemsize
    _check_space(target, total)
    with atomic_dir(target) as folder:
        _write_weights(parts, folder, kind, shard_bytes, tell)
        config.save_pretrained(folder)
        _generation_config(tokenizer).save_pretrained(folder)
        processor.save_pretrained(folder)
        tell("hashing inputs and outputs")
        atomic_json(folder / MANIFEST, _manifest(folder, dtype, weights, (llm, language), (vision, tower)))
    return Assembled(target, size, total, config.image_seq_length)


# --- tokenizer, configuration, processor -----------------------------------------------------------------------


def build_tokenizer(folder: Path) -> "PreTrainedTokenizerFast":
    """Vicuna's tokenizer with <image> and <pad>, giving the token ids that LLaVA's training code gives.

    LLaVA tokenises the text before and after <image> apart with sentencepiece, which puts a space in front of each
    piece of text ("\\n" after the image becomes the two tokens of " \\n"). A fast tokenizer does the same if it
    prepends in its normaliser, once for each piece between special tokens; that is set here, whatever the folder says.

    Raises:
        DymoeError: the folder has no tokenizer, or it cannot be read.
    """
    from importlib.util import find_spec

    from tokenizers import decoders, normalizers, processors
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    has_model = (folder / "tokenizer.model").exists()
    if not has_model and not (folder / "tokenizer.json").exists():
        raise DymoeError(f"{folder}: no tokenizer here; expected tokenizer.model or tokenizer.json")
    if not (folder / "tokenizer.json").exists():
        missing = [name for name in ("sentencepiece", "google.protobuf") if not _findable(name, find_spec)]
        if missing:
            raise DymoeError(f"{folder}: to read tokenizer.model, install sentencepiece and protobuf with pip")
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
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=old.bos_token,
        eos_token=old.eos_token,
        unk_token=old.unk_token,
        padding_side="left",
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )
    made.add_special_tokens({"additional_special_tokens": [_special(IMAGE_TOKEN)]})
    made.add_special_tokens({"pad_token": _special(PAD_TOKEN)})
    return made


def _special(token: str) -> Any:
    from tokenizers import AddedToken

    return AddedToken(token, special=True, normalized=False)


def _findable(name: str, find_spec: Callable[[str], Any]) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def build_config(
    language: Path, tower: Path, tokenizer: "PreTrainedTokenizerFast", dtype: "torch.dtype"
) -> "LlavaConfig":
    """LLaVA-1.5's configuration around a Llama and a CLIP folder.

    Raises:
        DymoeError: another architecture, or a tokenizer that does not fit the language model.
    """
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    said = _config(language)
    if said.get("model_type") != "llama" or "mm_projector_type" in said or "mm_vision_tower" in said:
        named = said.get("model_type")
        raise DymoeError(
            f"{language / 'config.json'}: model_type {named!r} is not a plain Llama; give Vicuna itself (for example "
            "lmsys/vicuna-7b-v1.5), not a LLaVA: an instruction-tuned one has seen the benchmark's tasks"
        )
    seen = _config(tower)
    if seen.get("model_type") not in ("clip", "clip_vision_model"):
        raise DymoeError(
            f"{tower / 'config.json'}: model_type {seen.get('model_type')!r} is not CLIP; give CLIP ViT-L/14-336 "
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


def _config(folder: Path) -> dict[str, Any]:
    said = read_json(folder / "config.json")
    if not isinstance(said, dict):
        raise DymoeError(f"{folder / 'config.json'}: expected a mapping")
    return said


def _pixel_settings(tower: Path) -> dict[str, Any]:
    """Mean and deviation of the tower's own processor, CLIP's where it has none."""
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    file = tower / "preprocessor_config.json"
    said = read_json(file) if file.exists() else {}
    found = {
        "image_mean": said.get("image_mean", OPENAI_CLIP_MEAN),
        "image_std": said.get("image_std", OPENAI_CLIP_STD),
    }
    for key, value in found.items():
        if not isinstance(value, list) or len(value) != 3 or not all(isinstance(x, int | float) for x in value):
            raise DymoeError(f"{file}: {key} is {value!r}; expected three numbers")
    return found


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


def _generation_config(tokenizer: "PreTrainedTokenizerFast") -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )


# --- weights ---------------------------------------------------------------------------------------------------


def _projector_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    for name in ("mm_projector.bin", "mm_projector.safetensors", "model.safetensors"):
        if (path / name).exists():
            return path / name
    raise DymoeError(f"--projector {path}: no mm_projector.bin or mm_projector.safetensors in this folder")


def _projector_names(weights: Weights) -> dict[str, str]:
    """Names in the file by the name in transformers' projector.

    Raises:
        DymoeError: no projector, another depth, or other tensors beside it.
    """
    (file,) = weights.files
    found: dict[str, str] = {}
    for key in weights.shapes:
        ours = re.fullmatch(r"(?:.*\.)?multi_modal_projector\.(linear_[12]\.(?:weight|bias))", key)
        theirs = re.fullmatch(r"(?:.*\.)?mm_projector\.(?:(\d+)\.)?(weight|bias)", key)
        if ours:
            found[ours[1]] = key
        elif theirs and theirs[1] in PROJECTOR:
            found[f"{PROJECTOR[theirs[1]]}.{theirs[2]}"] = key
        elif theirs and theirs[1] is None:
            raise DymoeError(f"{file}: {key}: a projector of one linear (LLaVA 1.0); LLaVA-1.5's is mlp2x_gelu")
        elif theirs:
            raise DymoeError(
                f"{file}: {key}: layer {theirs[1]} is one too many; LLaVA-1.5's mlp2x_gelu has layers 0, 2"
            )
        else:
            raise DymoeError(
                f"{file}: {key}: not a tensor of the projector; expected model.mm_projector.{{0,2}}.{{weight,bias}} "
                "as in LLaVA's pretraining checkpoints"
            )
    for layer, name in PROJECTOR.items():
        for leaf in ("weight", "bias"):
            if f"{name}.{leaf}" not in found:
                raise DymoeError(f"{file}: model.mm_projector.{layer}.{leaf} is missing; LLaVA-1.5's is mlp2x_gelu")
    return found


def _plan(config: "LlavaConfig", weights: Mapping[str, Weights], language: Path, tower: Path) -> list[_Part]:
    """Every tensor of the result with its source, checked, in the order of the source files.

    Raises:
        DymoeError: a tensor is missing, has another shape than the configuration says, or is not accounted for.
    """
    import torch
    from transformers import LlavaForConditionalGeneration

    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if config.tie_word_embeddings:
        expected.pop("lm_head.weight", None)
    named = _projector_names(weights["projector"])
    prefix = "vision_model." if any(key.startswith("vision_model.") for key in weights["vision"].shapes) else ""
    parts = []
    for name, shape in expected.items():
        source, places, where = shape, weights["llm"], language
        if name == "lm_head.weight":
            key, published = name, "language_model.lm_head.weight"
        elif name.startswith("model.language_model."):
            rest = name.removeprefix("model.language_model.")
            key, published = f"model.{rest}", f"language_model.model.{rest}"
        elif name.startswith("model.vision_tower."):
            rest = name.removeprefix("model.vision_tower.").removeprefix("vision_model.")
            key, published, places, where = prefix + rest, f"vision_tower.vision_model.{rest}", weights["vision"], tower
        else:
            rest = name.removeprefix("model.multi_modal_projector.")
            key, published, places = named[rest], f"multi_modal_projector.{rest}", weights["projector"]
            where = places.files[0]
        if key in ("model.embed_tokens.weight", "lm_head.weight"):
            source = (_text_rows(language), *shape[1:])
        if key not in places.shapes:
            raise DymoeError(f"{where}: tensor {key} is missing; is the download complete?")
        if places.shapes[key] != source:
            raise DymoeError(
                f"{places.file_of(key)}: tensor {key} is {_by(places.shapes[key])}; expected {_by(source)} "
                f"{_expectation(places is weights['projector'])}"
            )
        parts.append(_Part(published, places, key, shape, source))
    _check_left_over(weights, parts, config)
    order = {file: number for places in weights.values() for number, file in enumerate(places.files)}
    kinds = {id(places): number for number, places in enumerate(weights.values())}
    return sorted(parts, key=lambda part: (kinds[id(part.weights)], order[part.weights.file_of(part.key)]))


def _text_rows(language: Path) -> int:
    return int(_config(language)["vocab_size"])


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "a scalar"


def _expectation(projector: bool) -> str:
    if projector:
        return "(tower to language model); 7B and 13B, and CLIP's sizes, have projectors of their own"
    return "by config.json"


def _check_left_over(weights: Mapping[str, Weights], parts: Sequence[_Part], config: "LlavaConfig") -> None:
    """Refuse tensors that would be dropped without a word; CLIP's text half and computed buffers are no loss."""
    used = {(id(part.weights), part.key) for part in parts}
    for kind in ("llm", "vision"):
        places = weights[kind]
        for key in places.shapes:
            if (id(places), key) in used or _COMPUTED.fullmatch(key):
                continue
            if kind == "vision" and key.startswith(("text_", "logit_scale", "visual_projection", "text_model.")):
                continue
            if kind == "llm" and key == "lm_head.weight" and config.tie_word_embeddings:
                continue
            raise DymoeError(
                f"{places.file_of(key)}: tensor {key} has no place in "
                + ("Llama; give Vicuna itself, not a LLaVA" if kind == "llm" else "CLIP's vision tower")
            )


def _check_space(target: Path, total: int) -> None:
    _, free = free_space(target)
    if free < total * 1.01:
        raise DymoeError(f"{target}: needs {total / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free on this disk")


def _shards(parts: Sequence[_Part], itemsize: int, shard_bytes: int) -> Iterator[list[_Part]]:
    shard: list[_Part] = []
    filled = 0
    for part in parts:
        size = math.prod(part.shape) * itemsize
        if shard and filled + size > shard_bytes:
            yield shard
            shard, filled = [], 0
        shard.append(part)
        filled += size
    if shard:
        yield shard


def _write_weights(
    parts: Sequence[_Part], folder: Path, dtype: "torch.dtype", shard_bytes: int, tell: Callable[[str], None]
) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    shards = list(_shards(parts, dtype.itemsize, shard_bytes))
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = ["model.safetensors"]
    for name, shard in zip(names, shards, strict=True):
        tell(f"writing {name}")
        tensors = {part.name: _converted(part, dtype) for part in shard}
        try:
            save_file(tensors, folder / name, metadata={"format": "pt"})
        except SafetensorError as error:
            raise DymoeError(f"{folder / name}: cannot be written ({error})") from error
        del tensors
    if len(shards) > 1:
        total = sum(math.prod(part.shape) for part in parts) * dtype.itemsize
        places = {part.name: name for name, shard in zip(names, shards, strict=True) for part in shard}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        atomic_json(folder / INDEXES[0], index)


def _converted(part: _Part, dtype: "torch.dtype") -> "torch.Tensor":
    """The part's tensor in the result's dtype and shape, in memory of its own."""
    import torch

    old = part.weights.read(part.key)
    if not old.is_floating_point() or not bool(torch.isfinite(old).all()):
        raise DymoeError(f"{part.weights.file_of(part.key)}: tensor {part.key} holds NaN, infinity or no floats")
    made = torch.empty(part.shape, dtype=dtype)
    made[tuple(slice(size) for size in part.source)] = old.to(dtype)
    if part.shape != part.source:
        made[part.source[0] :] = new_rows(old, part.shape[0] - part.source[0]).to(dtype)
    return made


def new_rows(old: "torch.Tensor", count: int, seed: int = 0) -> "torch.Tensor":
    """Rows for new tokens, (count, width) in float64: normal around the mean of `old`, the same for a seed.

    The distribution is that of transformers' LLaVA-1.5 conversion, N(mean, 1e-5 covariance), here for embedding and
    output matrix each with its own. A weighted sum of the centred rows with normal weights has exactly this
    covariance, so nothing need be decomposed.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(count, old.shape[0], generator=generator, dtype=torch.float64)
    chunks = old.split(4096)
    mean = torch.stack([chunk.double().sum(0) for chunk in chunks]).sum(0) / old.shape[0]
    rows = torch.zeros(count, old.shape[1], dtype=torch.float64)
    for chunk, part in zip(chunks, weights.split(4096, dim=1), strict=True):
        rows += part @ (chunk.double() - mean)
    return mean + math.sqrt(SPREAD / old.shape[0]) * rows


# --- manifest --------------------------------------------------------------------------------------------------


def _manifest(
    folder: Path,
    dtype: str,
    weights: Mapping[str, Weights],
    language: tuple[str, Path],
    tower: tuple[str, Path],
) -> dict[str, Any]:
    import tokenizers
    import torch
    import transformers

    settings = {
        "llm": ("config.json", "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
        "vision": ("config.json", "preprocessor_config.json"),
    }
    inputs: dict[str, Any] = {}
    for kind, (name, place) in {"llm": language, "vision": tower}.items():
        files = [*weights[kind].files, *(place / file for file in settings[kind] if (place / file).exists())]
        revision = {} if Path(name).expanduser().is_dir() else {"revision": place.name}
        inputs[kind] = {"name": name, **revision, "files": {file.name: _fingerprint(file) for file in files}}
    (file,) = weights["projector"].files
    inputs["projector"] = {"name": str(file), "files": {file.name: _fingerprint(file)}}
    outputs = {file.name: _fingerprint(file) for file in sorted(folder.iterdir()) if file.is_file()}
    versions = {module.__name__: module.__version__ for module in (torch, transformers, tokenizers)}
    return {
        "kind": "LLaVA-1.5 before instruction tuning",
        "dtype": dtype,
        "image_backend": "pil",
        "versions": versions,
        "inputs": inputs,
        "outputs": outputs,
    }


def _fingerprint(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": sha256_of(file)}


def image_backend(folder: Path) -> str | None:
    """How an assembled folder wants its pictures scaled ("pil"), None for any other folder."""
    try:
        said = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return str(said["image_backend"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
