"""Load a frozen vision-language model with its processor: the pocket model, or any one of transformers."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dymoe.adapter.decoder import decoder_linears, drop_capture_hooks
from dymoe.errors import DymoeError
from dymoe.files import expand
from dymoe.libraries import require_extra
from dymoe.models.assembled import MODULES, assembled
from dymoe.models.identity import commit
from dymoe.models.options import ModelOptions

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, ProcessorMixin


@dataclass
class Lvlm:
    """A model that reads images and text (frozen, evaluation mode) and the processor that prepares its input."""

    model: "PreTrainedModel"
    processor: "ProcessorMixin"

    def __getstate__(self) -> dict[str, Any]:
        drop_capture_hooks(self.model)
        return vars(self)


def load(
    name: str,
    dtype: str = "bfloat16",
    cache_dir: Path | None = None,
    options: ModelOptions | None = None,
    revision: str | None = None,
) -> Lvlm:
    """Load "pocket", a local folder, or a Hub id of any image-text model of transformers, frozen.

    `dtype` is a floating torch dtype by name ("bfloat16", "float32", "float16"). `cache_dir` is where the pocket
    model's parts (or the Hub's files) are cached. Weights must be safetensors; no code that comes with a model runs.
    `options` may ask for 4-bit linears. `revision` is the commit of a Hub model (`dymoe.models.identity`), its newest
    one when None; all of its files are read at one commit.

    Raises:
        DymoeError: unknown dtype, no such folder or Hub id, not an image-text model, weights cannot be fetched, 4 bits
            without bitsandbytes or of the pocket model, a processor that does not fit the model.
    """
    import torch

    from dymoe.models.check import check_processor

    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise DymoeError(f"dtype: {dtype!r} is not a floating dtype of torch; use bfloat16, float32 or float16")
    if options is not None and options.load_in_4bit:
        require_extra("quantization", "model_options.load_in_4bit")
        if name in MODULES:
            raise DymoeError(f"model_options.load_in_4bit: the model {name!r} is small and has no 4-bit form")
    if (parts := assembled(name)) is not None:
        model, processor = parts.assemble(kind, cache_dir)
    else:
        model, processor = _from_transformers(name, kind, cache_dir, options or ModelOptions(), revision)
    loaded = Lvlm(freeze(model), processor)
    check_processor(loaded, name)
    drop_capture_hooks(loaded.model)  # the model as it was read
    return loaded


def _contiguous(module: "torch.nn.Module", args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0].contiguous(), *args[1:])


def freeze(model: "PreTrainedModel") -> "PreTrainedModel":
    """The model in evaluation mode, without gradients, its output embedding handed contiguous states.

    transformers passes it a slice (the last positions of each row); torch would then copy the whole vocabulary matrix
    for every row of the batch.
    """
    model.requires_grad_(False)
    model.eval()
    head = model.get_output_embeddings()
    if head is not None:
        head.register_forward_pre_hook(_contiguous)
    return model


def _quantization(source: str, dtype: "torch.dtype", options: ModelOptions, revision: str | None) -> dict[str, Any]:
    """What makes transformers load the decoder's linears in 4 bits and nothing else; empty without."""
    if not options.load_in_4bit:
        return {}
    from torch import nn
    from transformers import AutoConfig, BitsAndBytesConfig

    from dymoe.models.shapes import meta_model

    model = meta_model(AutoConfig.from_pretrained(source, trust_remote_code=False, revision=revision))
    inside = set(decoder_linears(model))
    outside = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in inside]
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=options.quant_type,
        bnb_4bit_use_double_quant=options.double_quant,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=outside,
    )
    return {"quantization_config": config}


def _from_transformers(
    name: str, dtype: "torch.dtype", cache_dir: Path | None, options: ModelOptions, revision: str | None
) -> tuple["PreTrainedModel", "ProcessorMixin"]:
    """Any image-text model of transformers by folder or Hub id."""
    from transformers import AutoModelForImageTextToText

    if name.startswith((".", "/", "~")) and not expand(name).is_dir():
        raise DymoeError(f"model {name!r}: no such folder; give 'pocket', a folder or a Hub id")
    local = expand(name).is_dir()
    source = str(expand(name)) if local else name
    if not local:
        revision = commit(name, cache_dir, revision)
    try:
        model = AutoModelForImageTextToText.from_pretrained(
            source,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            cache_dir=cache_dir,
            revision=revision,
            **_quantization(source, dtype, options, revision),
        )
        processor = processor_at(source, cache_dir, revision)
    except (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DymoeError(
            f"model {name!r}: cannot be loaded as an image-text model of transformers ({first}); "
            "give 'pocket', a folder with config.json, safetensors and a processor, or a Hub id"
        ) from error
    if getattr(processor, "tokenizer", None) is None or getattr(processor, "image_processor", None) is None:
        raise DymoeError(f"model {name!r}: its processor has no tokenizer and image processor")
    return model, processor


def processor_at(source: str, cache_dir: Path | None = None, revision: str | None = None) -> Any:
    """The processor of a folder or Hub id, of the latter at a commit if `revision` names one.

    A folder that `dymoe assemble` wrote scales pictures as LLaVA's training did; transformers alone would not.
    """
    from transformers import AutoProcessor

    from dymoe.models.llava import image_backend

    backend = image_backend(Path(source))
    how = {} if backend is None else {"backend": backend}
    return AutoProcessor.from_pretrained(source, trust_remote_code=False, cache_dir=cache_dir, revision=revision, **how)
