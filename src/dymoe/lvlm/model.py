"""Load a frozen vision-language model with its processor: the pocket model, or any one of transformers."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dymoe.errors import DymoeError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, ProcessorMixin


@dataclass
class Lvlm:
    """A model that reads images and text (frozen, evaluation mode) and the processor that prepares its input."""

    model: "PreTrainedModel"
    processor: "ProcessorMixin"


def load(name: str, dtype: str = "bfloat16", cache_dir: Path | None = None) -> Lvlm:
    """Load "pocket", a local folder, or a Hub id of any image-text model of transformers, frozen.

    `dtype` is a floating torch dtype by name ("bfloat16", "float32", "float16"). `cache_dir` is where the pocket
    model's parts (or the Hub's files) are cached. Weights must be safetensors; no code that comes with a model runs.

    Raises:
        DymoeError: unknown dtype, no such folder or Hub id, not an image-text model, weights cannot be fetched.
    """
    import torch

    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise DymoeError(f"dtype: {dtype!r} is not a floating dtype of torch; use bfloat16, float32 or float16")
    if name == "pocket":
        from dymoe.lvlm import pocket

        model, processor = pocket.assemble(kind, cache_dir)
    else:
        model, processor = _from_transformers(name, kind, cache_dir)
    return Lvlm(freeze(model), processor)


def freeze(model: "PreTrainedModel") -> "PreTrainedModel":
    """The model in evaluation mode, without gradients, its output embedding handed contiguous states.

    transformers passes it a slice (the last positions of each row); torch would then copy the whole vocabulary matrix
    for every row of the batch.
    """
    model.requires_grad_(False)
    model.eval()
    head = model.get_output_embeddings()
    if head is not None:
        head.register_forward_pre_hook(lambda module, args: (args[0].contiguous(), *args[1:]))
    return model


def _from_transformers(
    name: str, dtype: "torch.dtype", cache_dir: Path | None
) -> tuple["PreTrainedModel", "ProcessorMixin"]:
    """Any image-text model of transformers by folder or Hub id."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    if name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        raise DymoeError(f"model {name!r}: no such folder; give 'pocket', a folder or a Hub id")
    place = str(Path(name).expanduser()) if Path(name).expanduser().is_dir() else name
    try:
        model = AutoModelForImageTextToText.from_pretrained(
            place, dtype=dtype, use_safetensors=True, trust_remote_code=False, cache_dir=cache_dir
        )
        processor = AutoProcessor.from_pretrained(place, trust_remote_code=False, cache_dir=cache_dir)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DymoeError(
            f"model {name!r}: cannot be loaded as an image-text model of transformers ({first}); "
            "give 'pocket', a folder with config.json, safetensors and a processor, or a Hub id"
        ) from error
    if getattr(processor, "tokenizer", None) is None or getattr(processor, "image_processor", None) is None:
        raise DymoeError(f"model {name!r}: its processor has no tokenizer and image processor")
    return model, processor
