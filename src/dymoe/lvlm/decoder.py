"""Which linears of a model are its language model's: those that get experts, are counted and held in 4 bits."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


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
