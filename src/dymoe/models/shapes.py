"""Models of true shapes without their weights: on the meta device for counting, with random weights for a dry run."""

from typing import TYPE_CHECKING, Any

from dymoe.adapter.decoder import decoder_linears
from dymoe.errors import DymoeError
from dymoe.files import expand
from dymoe.libraries import require_extra
from dymoe.models.assembled import MODULES, assembled
from dymoe.models.model import Lvlm, freeze, processor_at
from dymoe.models.options import ModelOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Llama 2 (arXiv 2307.09288) as Vicuna 1.5 has it: hidden size, FFN size, layers, heads.
LLAMA = {"llava-1.5-7b": (4096, 11008, 32, 32), "llava-1.5-13b": (5120, 13824, 40, 40)}
PIECES = 32000  # tokens of Vicuna's tokenizer


def published_config(name: str) -> Any:
    """The `LlavaConfig` of LLaVA-1.5 as `dymoe assemble` writes it.

    Args:
        name: ``llava-1.5-7b`` or ``llava-1.5-13b``.
    """
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    hidden, inner, layers, heads = LLAMA[name]
    vision: Any = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )
    text: Any = LlamaConfig(
        vocab_size=32064,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        pad_token_id=PIECES + 1,
    )
    config: Any = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=PIECES,
        image_seq_length=576,
        projector_hidden_act="gelu",
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
    )
    config.pad_token_id = PIECES + 1
    return config


def config_of(name: str, options: ModelOptions) -> Any:
    """The configuration of a model: of its folder (or Hub id), else of the published shape named beside it.

    Raises:
        DymoeError: no such folder or Hub id and no shape named.
    """
    from transformers import AutoConfig

    folder = expand(name)
    if not folder.is_dir() and options.shape != "none":
        return published_config(options.shape)
    if name in MODULES:
        raise DymoeError(f"the model {name!r} is put together from parts and has no configuration of its own")
    try:
        return AutoConfig.from_pretrained(str(folder) if folder.is_dir() else name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise DymoeError(
            f"model {name!r}: its config.json cannot be read; give a folder that holds one, or model_options.shape"
        ) from error


def meta_model(config: Any) -> "PreTrainedModel":
    """The model of a configuration on the meta device: all shapes and names, no memory.

    Raises:
        DymoeError: not an image-text model of transformers.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    try:
        with torch.device("meta"):
            return AutoModelForImageTextToText.from_config(config, trust_remote_code=False)
    except ValueError as error:
        raise DymoeError(f"{type(config).__name__}: not an image-text model of transformers") from error


def outline(name: str, options: ModelOptions) -> Lvlm:
    """A model on the meta device with its own processor: enough to count tokens, without any weights.

    Raises:
        DymoeError: as `config_of`; or there is no processor, or it does not fit the model.
    """
    from dymoe.models.check import check_processor

    if (parts := assembled(name)) is not None:
        config, processor = parts.outline()
    else:
        config = config_of(name, options)
        try:
            processor = processor_of(name, config)
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise DymoeError(f"model {name!r}: its processor cannot be loaded ({first})") from error
        if getattr(processor, "tokenizer", None) is None or getattr(processor, "image_processor", None) is None:
            raise DymoeError(f"model {name!r}: its processor has no tokenizer and image processor")
    lvlm = Lvlm(meta_model(config), processor)
    check_processor(lvlm, name)
    return lvlm


def random_lvlm(name: str, dtype: str, options: ModelOptions) -> Lvlm:
    """A model of the true shapes with random weights, on the GPU where there is one, and its processor.

    The processor is that of the model's folder; where the folder is not there, one with the published image size and
    prompt whose tokenizer makes one token of every word.

    Raises:
        DymoeError: as `config_of`; or 4 bits without bitsandbytes.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    kind = getattr(torch, dtype)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = config_of(name, options)
    if options.load_in_4bit:
        require_extra("quantization", "model_options.load_in_4bit")
        # Quantised while they move to the GPU, a linear at a time: the whole would not fit there.
        with torch.device("cpu"):
            model = AutoModelForImageTextToText.from_config(config, dtype=kind, trust_remote_code=False)
        quantize(model, kind, options)
        model.to(device)
    else:
        with torch.device(device):
            model = AutoModelForImageTextToText.from_config(config, dtype=kind, trust_remote_code=False)
    return Lvlm(freeze(model), processor_of(name, config))


def quantize(model: "PreTrainedModel", dtype: Any, options: ModelOptions) -> None:
    """Put 4-bit linears in the place of the language model's; they hold 4 bits once they are moved to a device."""
    import bitsandbytes as bnb

    for path in decoder_linears(model):
        parent, _, leaf = path.rpartition(".")
        holder = model.get_submodule(parent)
        old: Any = getattr(holder, leaf)
        quantized = bnb.nn.Linear4bit(
            old.in_features,
            old.out_features,
            bias=old.bias is not None,
            compute_dtype=dtype,
            compress_statistics=options.double_quant,
            quant_type=options.quant_type,
        )
        quantized.weight = bnb.nn.Params4bit(
            old.weight.data,
            requires_grad=False,
            compress_statistics=options.double_quant,
            quant_type=options.quant_type,
            module=quantized,
        )
        if old.bias is not None:
            quantized.bias = old.bias
        setattr(holder, leaf, quantized)


def processor_of(name: str, config: Any) -> Any:
    """The model's own processor; where its folder is not there, a made one (see `random_lvlm`)."""
    from dymoe.models.vicuna import build_processor

    folder = expand(name)
    if folder.is_dir() or config.model_type != "llava":
        return processor_at(str(folder) if folder.is_dir() else name)
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    pixels = {"image_mean": OPENAI_CLIP_MEAN, "image_std": OPENAI_CLIP_STD}
    return build_processor(word_tokenizer(), config, pixels)


def word_tokenizer() -> Any:
    """A tokenizer of Vicuna's size that makes one token of every word; the words are w0, w1, .."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{number}": number for number in range(3, PIECES)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    result = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )
    result.add_special_tokens({"additional_special_tokens": ["<image>"]})
    result.add_special_tokens({"pad_token": "<pad>"})
    return result
