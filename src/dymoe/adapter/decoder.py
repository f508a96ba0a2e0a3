"""What dymoe relies on in transformers' language models: their linears, their arguments, their key/value cache."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from dymoe.libraries import untested

if TYPE_CHECKING:
    from torch import nn
    from transformers import Cache


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
    names: list[str] = []
    for name, module in model.named_modules():
        if module not in inside or module is head:
            continue
        if isinstance(getattr(module, "in_features", None), int) and hasattr(module, "out_features"):
            names.append(name)
            inside -= set(module.modules())
    return names


def key_value_cache(model: "nn.Module", arguments: Iterable[Any], needed: bool) -> "Cache | None":
    """The key/value cache among the arguments of a call, known by its class, since its name changes.

    Args:
        model: what is called.
        arguments: the values that are handed on to it.
        needed: whether the call goes on from a cache, so that there must be one.

    Raises:
        DymoeError: a needed one is missing.
    """
    from transformers import Cache

    cache = next((value for value in arguments if isinstance(value, Cache)), None)
    if needed and cache is None:
        raise untested(model, "gets no key/value cache while an answer is decoded")
    return cache


def drop_capture_hooks(model: "nn.Module") -> None:
    """Take away the local functions by which transformers notes what layers give, since they cannot be pickled.

    It hangs them on the layers at the first forward pass that needs them, for example with a picture, and hangs them
    there again at the next.
    """
    for module in model.modules():
        vars(module).pop("_output_capturing_hooks_installed", None)
        for key, hook in list(module._forward_hooks.items()):
            if getattr(hook, "__module__", None) == "transformers.utils.output_capturing":
                del module._forward_hooks[key]
