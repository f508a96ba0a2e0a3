"""What dymoe relies on in transformers' language models: their linears, their arguments, their key/value cache."""

import inspect
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from dymoe.errors import DymoeError

if TYPE_CHECKING:
    from torch import nn
    from transformers import Cache

ARGUMENTS = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")


def decoder_linears(model: "nn.Module") -> list[str]:
    """Names of the linears in the language model's decoder, in the model's order.

    A linear is a module with `in_features` and `out_features`, fused projections and quantised linears among them; what
    stands inside one (the base of a wrapped linear) does not count. The output embedding is none, nor is what a vision
    tower holds where the decoder is the whole model. A module without `get_decoder` has none.
    """
    if not hasattr(model, "get_decoder"):
        return []
    decoder = model.get_decoder()  # type: ignore[operator]
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    inside = set(decoder.modules())
    for module in decoder.modules():
        if module is not decoder and "text" not in getattr(module, "input_modalities", "text"):
            inside -= set(module.modules())
    found: list[str] = []
    for name, module in model.named_modules():
        if module not in inside or module is head:
            continue
        if isinstance(getattr(module, "in_features", None), int) and hasattr(module, "out_features"):
            found.append(name)
            inside -= set(module.modules())
    return found


def check_arguments(decoder: "nn.Module") -> None:
    """Refuse a decoder that does not take the arguments which a selector reads and passes on (`ARGUMENTS`).

    Raises:
        DymoeError: one is not among the arguments of its forward; names it and the version of transformers.
    """
    known = inspect.signature(decoder.forward).parameters
    missing = [name for name in ARGUMENTS if name not in known]
    if missing:
        raise DymoeError(
            f"{type(decoder).__name__} of transformers {_version()} takes no {', '.join(missing)}: a selector cannot "
            "read its prompts; install the versions that dymoe was tested with (requirements.lock)"
        )


def key_value_cache(arguments: Iterable[Any], needed: bool) -> "Cache | None":
    """The key/value cache among the arguments of a call, known by its class, since its name changes.

    Args:
        arguments: the values that are handed on.
        needed: whether the call goes on from a cache, so that there must be one.

    Raises:
        DymoeError: a needed one is missing.
    """
    from transformers import Cache

    found = next((value for value in arguments if isinstance(value, Cache)), None)
    if needed and found is None:
        raise DymoeError(
            f"transformers {_version()} hands on no key/value cache while an answer is decoded: dymoe cannot tell a "
            "prompt from its answer; install the versions that dymoe was tested with (requirements.lock)"
        )
    return found


def _version() -> str:
    import transformers

    return transformers.__version__
