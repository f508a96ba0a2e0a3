"""Whether a processor fits its model: told once, about the model's folder, before any data are looked at."""

from typing import TYPE_CHECKING, Any, cast

import torch

from dymoe.adapter.observation import evaluating
from dymoe.errors import DymoeError

if TYPE_CHECKING:
    from dymoe.models.model import Lvlm

# What transformers, Pillow and torch raise where a processor or a configuration lacks something.
_FAULTS = (DymoeError, TypeError, ValueError, KeyError, AttributeError, IndexError, RuntimeError, NotImplementedError)
SIZE = (40, 24)  # of the picture that is tried


def check_processor(lvlm: "Lvlm", name: str) -> None:
    """Try one made picture: the processor must write as many image tokens as the model makes of it.

    A model on the meta device is compared where its shapes say how many it makes, any other always.

    Args:
        lvlm: the model and its processor.
        name: what the recipe calls the model, for the message.

    Raises:
        DymoeError: they do not fit; the message names the folder's file and key.
    """
    from PIL import Image

    from dymoe.models.collate import Collator
    from dymoe.tasks import Sample

    if cast(Any, lvlm.processor).tokenizer.eos_token is None:
        raise DymoeError(f"model {name!r}: tokenizer_config.json: eos_token: it is missing, so that no answer ends")
    picture = Image.new("RGB", SIZE, "white")
    sample = Sample("made", _png(picture), "What is it?", "It", {})
    try:
        batch = Collator(lvlm).prompts([sample])
    except Exception as error:  # a chat template and a processor's settings are the folder's: they may raise anything
        reason = _first_line(error).removeprefix(f"{sample.label}: ")
        what = "its chat template" if type(error).__module__.startswith("jinja2") else "its processor"
        raise DymoeError(f"model {name!r}: {_differing(lvlm) or f'{what} prepares no picture ({reason})'}") from error
    config = cast(Any, lvlm.model).config
    rows, ids = cast(Any, lvlm.model).get_input_embeddings().weight.shape[0], batch["input_ids"]
    if int(ids.max()) >= rows:
        raise DymoeError(
            f"model {name!r}: config.json: vocab_size: the model has {rows} tokens, its tokenizer writes number "
            f"{int(ids.max())}"
        )
    token = getattr(config, "image_token_id", None)
    if not isinstance(token, int) or not hasattr(getattr(lvlm.model, "model", None), "get_placeholder_mask"):
        return  # its image tokens are no places that features take
    count = _image_tokens(lvlm, picture, name)
    written = int((ids == token).sum())
    if count is not None and count != written:
        raise DymoeError(
            f"model {name!r}: {_differing(lvlm) or _other_number(lvlm, written, count)}; the processor writes "
            f"{written} image tokens for a picture of which the model makes {count}"
        )


def _image_tokens(lvlm: "Lvlm", picture: Any, name: str) -> int | None:
    """Image tokens that the model makes of the picture; None where the meta device cannot tell."""
    model = cast(Any, lvlm.model)
    try:
        inputs = dict(cast(Any, lvlm.processor).image_processor(images=[picture], return_tensors="pt"))
        inputs = {
            key: value.to(model.device, model.dtype if value.is_floating_point() else None)
            for key, value in inputs.items()
            if isinstance(value, torch.Tensor)
        }
        with evaluating(model), torch.no_grad():
            tokens = model.get_image_features(**inputs, return_dict=True).pooler_output
    except _FAULTS as error:
        if model.device.type == "meta" and not isinstance(error, ValueError):
            return None
        raise DymoeError(
            f"model {name!r}: processor_config.json: image_processor: the model takes no such picture "
            f"({_first_line(error)})"
        ) from error
    blocks = [tokens] if isinstance(tokens, torch.Tensor) else tokens
    return sum(block.numel() // block.shape[-1] for block in blocks)


def _differing(lvlm: "Lvlm") -> str | None:
    """The key in which processor and model differ, if it is one that both have."""
    config, processor = cast(Any, lvlm.model).config, lvlm.processor
    vision = getattr(config, "vision_config", None)
    pairs = {
        "patch_size": ("vision_config.patch_size", getattr(vision, "patch_size", None)),
        "vision_feature_select_strategy": (
            "vision_feature_select_strategy",
            getattr(config, "vision_feature_select_strategy", None),
        ),
    }
    for key, (there, right) in pairs.items():
        if right is not None and hasattr(processor, key) and getattr(processor, key) != right:
            had = getattr(processor, key)
            state = "it is missing" if had is None else f"it is {had!r}"
            return f"processor_config.json: {key}: {state}, config.json has {right!r} ({there}); write that"
    return None


def _other_number(lvlm: "Lvlm", written: int, count: int) -> str:
    token, config = getattr(lvlm.processor, "image_token", None), cast(Any, lvlm.model).config
    tokenizer: Any = lvlm.processor.tokenizer  # type: ignore[attr-defined]
    if written == 0:
        number = tokenizer.convert_tokens_to_ids(token)
        return f"config.json: image_token_index: it is {config.image_token_id}, the tokenizer has {token} as {number}"
    added = getattr(lvlm.processor, "num_additional_image_tokens", None)
    if isinstance(added, int) and added + count - written >= 0:
        right = added + count - written
        return f"processor_config.json: num_additional_image_tokens: it is {added}, {right} would be right"
    return "processor_config.json: its sizes are not the model's"


def _png(picture: Any) -> bytes:
    import io

    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
