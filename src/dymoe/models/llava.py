"""LLaVA-1.5 before instruction tuning: Vicuna, CLIP ViT-L/14-336 and the pretrained projector in one model.

This is the base that CoIN and DyMoE start from. The published LLaVA-1.5 is no substitute: it was tuned on data that the
benchmark's tasks are made of. The result is a `LlavaForConditionalGeneration` of transformers in a folder, with the
tokenizer, chat template and processor of `dymoe.models.vicuna`. Tokenizer and embeddings grow as in transformers' own
conversion of LLaVA-1.5: <image> and <pad> at the end, rows padded to a multiple of 64. Everything is checked before
anything is written; tensors pass through memory one output shard at a time.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dymoe.errors import DymoeError
from dymoe.files import atomic_dir, atomic_json, expand, free_space, sha256_of
from dymoe.models.checkpoint import INDEXES, Weights, fetch, weight_files
from dymoe.models.vicuna import (
    build_config,
    build_processor,
    build_tokenizer,
    generation_config,
    pixel_settings,
    read_config,
)

if TYPE_CHECKING:
    import torch
    from transformers import LlavaConfig

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
    """Write the LLaVA-1.5 base model to a new folder that `dymoe.models.load` and transformers read.

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
    target = expand(output)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise DymoeError(f"{target}: exists and is not an empty folder; give a new one with --output or remove it")
    language, tower = fetch(llm, "--llm", ["tokenizer.model"]), fetch(vision, "--vision")
    tell("checking the parts")
    tokenizer = build_tokenizer(language)
    config = build_config(language, tower, tokenizer, kind)
    weights = {
        "llm": Weights(weight_files(language)),
        "vision": Weights(weight_files(tower)),
        "projector": Weights((_projector_file(expand(projector)),)),
    }
    parts = _plan(config, weights, language, tower)
    processor = build_processor(tokenizer, config, pixel_settings(tower))
    size = sum(math.prod(part.shape) for part in parts)
    total = size * kind.itemsize
    _check_space(target, total)
    with atomic_dir(target) as folder:
        _write_weights(parts, folder, kind, shard_bytes, tell)
        config.save_pretrained(folder)
        generation_config(tokenizer).save_pretrained(folder)
        processor.save_pretrained(folder)
        tell("hashing inputs and outputs")
        atomic_json(folder / MANIFEST, _manifest(folder, dtype, weights, (llm, language), (vision, tower)))
    return Assembled(target, size, total, config.image_seq_length)


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
    names: dict[str, str] = {}
    for key in weights.shapes:
        ours = re.fullmatch(r"(?:.*\.)?multi_modal_projector\.(linear_[12]\.(?:weight|bias))", key)
        theirs = re.fullmatch(r"(?:.*\.)?mm_projector\.(?:(\d+)\.)?(weight|bias)", key)
        if ours:
            names[ours[1]] = key
        elif theirs and theirs[1] in PROJECTOR:
            names[f"{PROJECTOR[theirs[1]]}.{theirs[2]}"] = key
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
            if f"{name}.{leaf}" not in names:
                raise DymoeError(f"{file}: model.mm_projector.{layer}.{leaf} is missing; LLaVA-1.5's is mlp2x_gelu")
    return names


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
        source, origin, where = shape, weights["llm"], language
        if name == "lm_head.weight":
            key, published = name, "language_model.lm_head.weight"
        elif name.startswith("model.language_model."):
            rest = name.removeprefix("model.language_model.")
            key, published = f"model.{rest}", f"language_model.model.{rest}"
        elif name.startswith("model.vision_tower."):
            rest = name.removeprefix("model.vision_tower.").removeprefix("vision_model.")
            key, published, origin, where = prefix + rest, f"vision_tower.vision_model.{rest}", weights["vision"], tower
        else:
            rest = name.removeprefix("model.multi_modal_projector.")
            key, published, origin = named[rest], f"multi_modal_projector.{rest}", weights["projector"]
            where = origin.files[0]
        if key in ("model.embed_tokens.weight", "lm_head.weight"):
            source = (_text_rows(language), *shape[1:])
        if key not in origin.shapes:
            raise DymoeError(f"{where}: tensor {key} is missing; is the download complete?")
        if origin.shapes[key] != source:
            raise DymoeError(
                f"{origin.file_of(key)}: tensor {key} is {_by(origin.shapes[key])}; expected {_by(source)} "
                f"{_expectation(origin is weights['projector'])}"
            )
        parts.append(_Part(published, origin, key, shape, source))
    _check_left_over(weights, parts, config)
    order = {file: number for origin in weights.values() for number, file in enumerate(origin.files)}
    kinds = {id(origin): number for number, origin in enumerate(weights.values())}
    return sorted(parts, key=lambda part: (kinds[id(part.weights)], order[part.weights.file_of(part.key)]))


def _text_rows(language: Path) -> int:
    return int(read_config(language)["vocab_size"])


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
        source = weights[kind]
        for key in source.shapes:
            if (id(source), key) in used or _COMPUTED.fullmatch(key):
                continue
            if kind == "vision" and key.startswith(("text_", "logit_scale", "visual_projection", "text_model.")):
                continue
            if kind == "llm" and key == "lm_head.weight" and config.tie_word_embeddings:
                continue
            raise DymoeError(
                f"{source.file_of(key)}: tensor {key} has no place in "
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
        shard_of = {part.name: name for name, shard in zip(names, shards, strict=True) for part in shard}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(shard_of.items()))}
        atomic_json(folder / INDEXES[0], index)


def _converted(part: _Part, dtype: "torch.dtype") -> "torch.Tensor":
    """The part's tensor in the result's dtype and shape, in memory of its own."""
    import torch

    old = part.weights.read(part.key)
    if not old.is_floating_point() or not bool(torch.isfinite(old).all()):
        raise DymoeError(f"{part.weights.file_of(part.key)}: tensor {part.key} holds NaN, infinity or no floats")
    result = torch.empty(part.shape, dtype=dtype)
    result[tuple(slice(size) for size in part.source)] = old.to(dtype)
    if part.shape != part.source:
        result[part.source[0] :] = new_rows(old, part.shape[0] - part.source[0]).to(dtype)
    return result


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
    for kind, (name, source) in {"llm": language, "vision": tower}.items():
        files = [*weights[kind].files, *(source / file for file in settings[kind] if (source / file).exists())]
        revision = {} if expand(name).is_dir() else {"revision": source.name}
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
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return str(manifest["image_backend"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
