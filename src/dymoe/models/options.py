"""How a model is loaded: the key ``model_options`` of a recipe."""

from dataclasses import dataclass
from typing import Literal

from dymoe.schema import Size, check_fields


@dataclass(frozen=True)
class ModelOptions:
    """What is said about a model beside its name.

    Attributes:
        load_in_4bit: hold the language model's linears in 4 bits (bitsandbytes, which is not installed with dymoe);
            tower, projector, embeddings and output stay as they are.
        quant_type: the 4-bit numbers: ``nf4`` (QLoRA, arXiv 2305.14314) or ``fp4``.
        double_quant: hold the blocks' scales in 8 bits too (QLoRA): 0.37 bits a weight less.
        max_length: longest sequence in tokens, image tokens included (2048, LLaVA's).
        shape: whose shapes a dry run and the estimates of memory take as long as the model's folder is not there.
    """

    load_in_4bit: bool = False
    quant_type: Literal["nf4", "fp4"] = "nf4"
    double_quant: bool = True
    max_length: Size = 2048
    shape: Literal["none", "llava-1.5-7b", "llava-1.5-13b"] = "none"

    def __post_init__(self) -> None:
        """Refuse a length that holds nothing."""
        check_fields(self)
