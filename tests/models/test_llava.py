"""`dymoe assemble`: the parts in their published formats, the model, prompt and tokens against LLaVA's own steps."""

import hashlib
import io
import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
)

from dymoe.cli import main
from dymoe.errors import DymoeError
from dymoe.models import Collator, load
from dymoe.models.llava import assemble, new_rows
from dymoe.models.vicuna import build_config, build_tokenizer
from tests.models.conftest import sample

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
CORPUS = [
    SYSTEM,
    "USER: What is the object in the image?\nAnswer the question using a single word or phrase ASSISTANT: a cat",
    "Please provide the bounding box coordinate of the region this sentence describes: [0.12,0.50,0.99,1.00]",
]
WIDTH, TOWER = 32, 24


def vicuna(folder: Path) -> None:
    """A Vicuna as on the Hub: sentencepiece model, fp16 .bin shards with an index, the old rotary buffers."""
    folder.mkdir()
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 20),
        model_writer=made,
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        allow_whitespace_only_pieces=True,
        character_coverage=1.0,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(made.getvalue())
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    settings = {"legacy": False, "padding_side": "right", "tokenizer_class": "LlamaTokenizer", "model_max_length": 4096}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, **tokens, "add_bos_token": True}))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=420, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.2)
    said = {**config.to_dict(), "architectures": ["LlamaForCausalLM"], "torch_dtype": "float16"}
    (folder / "config.json").write_text(json.dumps(said))
    state = {name: value.half() for name, value in model.state_dict().items()}
    state |= {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(4) for layer in range(2)}
    names = sorted(state)
    shards = {f"pytorch_model-0000{n}-of-00002.bin": names[n - 1 :: 2] for n in (1, 2)}
    for file, kept in shards.items():
        torch.save({name: state[name] for name in kept}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, kept in shards.items() for name in kept}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def clip(folder: Path) -> None:
    """The whole CLIP, both halves, in one .bin with the old position buffers."""
    vision = {"hidden_size": TOWER, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 2}
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        text_config={**text, "vocab_size": 8, "bos_token_id": 6, "eos_token_id": 7},
    )
    torch.manual_seed(1)
    model = CLIPModel(config)
    model.config.save_pretrained(folder)
    state = {**model.state_dict(), "vision_model.embeddings.position_ids": torch.arange(5)[None]}
    torch.save(state, folder / "pytorch_model.bin")


def projector(tower: int = TOWER, width: int = WIDTH) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    shapes = {"0.weight": (width, tower), "0.bias": (width,), "2.weight": (width, width), "2.bias": (width,)}
    return {
        f"model.mm_projector.{name}": torch.randn(shape, generator=generator).bfloat16()
        for name, shape in shapes.items()
    }


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    root = tmp_path_factory.mktemp("parts")
    vicuna(root / "vicuna")
    clip(root / "clip")
    torch.save(projector(), root / "mm_projector.bin")
    return root


@pytest.fixture(scope="module")
def base(parts, tmp_path_factory):
    """The assembled folder."""
    output = tmp_path_factory.mktemp("base") / "llava"
    words = ["--llm", str(parts / "vicuna"), "--vision", str(parts / "clip"), "--output", str(output)]
    assert main(["assemble", *words, "--projector", str(parts / "mm_projector.bin"), "--dtype=float32"]) == 0
    return output


@pytest.fixture(scope="module")
def lvlm(base):
    return load(str(base), "float32")


@pytest.fixture
def copied(parts, tmp_path):
    """The parts once more, to be spoilt."""
    return shutil.copytree(parts, tmp_path / "parts")


def assembled(parts, output, **changes):
    given = {"llm": str(parts / "vicuna"), "vision": str(parts / "clip"), "projector": parts / "mm_projector.bin"}
    return assemble(**{**given, "output": output, "dtype": "float32", **changes})


# --- the model --------------------------------------------------------------------------------------------------


def vicuna_state(parts):
    state = {}
    for file in (parts / "vicuna").glob("*.bin"):
        state |= torch.load(file, weights_only=True)
    return state


def test_the_language_model_is_vicuna_with_rows_added(parts, base, lvlm):
    config = LlamaConfig.from_pretrained(parts / "vicuna")
    plain = LlamaForCausalLM(config).eval()
    state = {name: value.float() for name, value in vicuna_state(parts).items() if "inv_freq" not in name}
    plain.load_state_dict(state)
    ids = torch.randint(3, 420, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = lvlm.model(input_ids=ids).logits
        torch.testing.assert_close(logits[..., :420], plain(input_ids=ids).logits)
    assert logits.shape[-1] == 448  # 420 + 2 rows, padded to a multiple of 64
    assert lvlm.model.config.image_token_id == 420
    assert lvlm.processor.tokenizer.pad_token_id == 421
    _, info = LlavaForConditionalGeneration.from_pretrained(base, output_loading_info=True)
    assert not any(info.values())


def test_image_tokens_are_llavas(parts, lvlm):
    """LLaVA's steps: hidden state -2 of CLIP, without the class token, through Sequential(linear, GELU, linear)."""
    whole = torch.load(parts / "clip" / "pytorch_model.bin", weights_only=True)
    tower = CLIPVisionModel(CLIPVisionConfig.from_pretrained(parts / "clip")).eval()
    wanted = {name.removeprefix("vision_model."): value for name, value in whole.items() if name.startswith("vision_")}
    missing = tower.load_state_dict(wanted, strict=False).missing_keys
    assert not missing
    linear = torch.nn.Linear
    steps = torch.nn.Sequential(linear(TOWER, WIDTH), torch.nn.GELU(), linear(WIDTH, WIDTH))
    steps.load_state_dict({key.removeprefix("model.mm_projector."): value for key, value in projector().items()})
    pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        patches = tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        found = lvlm.model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output
        torch.testing.assert_close(torch.stack(list(found)), steps(patches))
    assert patches.shape[1] == 4 == lvlm.model.config.image_seq_length


def test_new_rows_have_the_old_rows_mean_and_a_hundred_thousandth_of_their_covariance():
    old = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0)) @ torch.tensor(
        [[1.0, 0.5, 0.0], [0.0, 2.0, 0.0], [0.3, 0.0, 0.1]]
    ) + torch.tensor([1.0, -2.0, 0.5])
    rows = new_rows(old, 3000)
    covariance = 1e-5 * torch.cov(old.double().T, correction=0)
    torch.testing.assert_close(rows.mean(0), old.double().mean(0), atol=5e-4, rtol=0)
    torch.testing.assert_close(
        torch.cov(rows.T) / covariance.diag().max(), covariance / covariance.diag().max(), atol=0.1, rtol=0
    )
    assert torch.equal(rows, new_rows(old, 3000))
    assert not torch.equal(rows, new_rows(old, 3000, seed=1))


def test_bytes_do_not_depend_on_the_format_and_are_the_same_again(parts, base, copied, tmp_path):
    for file in (copied / "vicuna").glob("*.bin*"):
        file.unlink()
    save_file(vicuna_state(parts), copied / "vicuna" / "model.safetensors")
    (copied / "mm_projector.bin").unlink()
    save_file(projector(), copied / "mm_projector.safetensors")
    assembled(copied, tmp_path / "other", projector=copied)
    first = {}
    for folder in (base, tmp_path / "other"):
        with safe_open(folder / "model.safetensors", "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        first = first or tensors
        assert tensors.keys() == first.keys()
        assert all(torch.equal(tensors[name], first[name]) for name in tensors)
    assembled(parts, tmp_path / "again")
    for file in base.iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name


def test_shards_stay_small_and_hold_everything(parts, base, tmp_path):
    done = assembled(parts, tmp_path / "small", shard_bytes=60_000)
    files = sorted((tmp_path / "small").glob("*.safetensors"))
    assert len(files) > 3
    index = json.loads((tmp_path / "small" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}
    assert all(file.stat().st_size < 60_000 + 8_000 for file in files)  # the header comes on top
    small, whole = (LlavaForConditionalGeneration.from_pretrained(folder) for folder in (tmp_path / "small", base))
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), whole.parameters(), strict=True))
    assert done.parameters == sum(value.numel() for value in whole.parameters())


def test_the_manifest_fingerprints_what_went_in_and_came_out(parts, base):
    said = json.loads((base / "manifest.json").read_text())
    files = [(base, said["outputs"])]
    for kind, folder in (("llm", parts / "vicuna"), ("vision", parts / "clip"), ("projector", parts)):
        files.append((folder, said["inputs"][kind]["files"]))
    for folder, records in files:
        assert records
        for name, record in records.items():
            assert record["sha256"] == hashlib.sha256((folder / name).read_bytes()).hexdigest()
    assert {"tokenizer.model", "pytorch_model-00001-of-00002.bin"} <= set(said["inputs"]["llm"]["files"])
    outputs = {file.name for file in base.iterdir()} - {"manifest.json"}
    assert set(said["outputs"]) == outputs


@pytest.mark.parametrize(
    ("width", "inner", "layers", "heads", "llama"),
    [(4096, 11008, 32, 32, 6_738_415_616), (5120, 13824, 40, 40, 13_015_864_320)],
    ids=["7b", "13b"],
)
def test_published_sizes(parts, tmp_path, width, inner, layers, heads, llama):
    """Parameters on the meta device: Llama's and the tower's as published, 64 rows twice, the projector."""
    shutil.copy(parts / "vicuna" / "tokenizer.model", tmp_path)
    shutil.copy(parts / "vicuna" / "tokenizer_config.json", tmp_path)
    sizes = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers}
    LlamaConfig(vocab_size=32000, num_attention_heads=heads, **sizes).save_pretrained(tmp_path)
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    CLIPVisionConfig(image_size=336, patch_size=14, **sizes).save_pretrained(tmp_path / "clip")
    config = build_config(tmp_path, tmp_path / "clip", build_tokenizer(tmp_path), torch.bfloat16)
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    projector = (1024 + 1) * width + (width + 1) * width
    assert sum(value.numel() for value in model.parameters()) == llama + 303_507_456 + 64 * 2 * width + projector
    assert config.image_seq_length == 576
    assert config.text_config.vocab_size == 32064


# --- prompt and tokens ------------------------------------------------------------------------------------------


class Llava:
    """LLaVA's training steps, written down anew: conversation, tokens by sentencepiece, mask."""

    def __init__(self, folder: Path) -> None:
        self.pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))

    def text(self, question: str, answer: str | None, image: bool) -> str:
        messages = [("USER", f"<image>\n{question}" if image else question), ("ASSISTANT", answer)]
        written, ends = SYSTEM + " ", (" ", "</s>")
        for turn, (role, message) in enumerate(messages):
            written += f"{role}:" if message is None else f"{role}: {message}{ends[turn % 2]}"
        return written

    def ids(self, text: str, places: int = 4) -> list[int]:
        """Each piece of text between images apart, as the slow tokenizer does it; <s> once in front."""
        end = self.pieces.eos_id() if text.endswith("</s>") else None
        parts = [self.pieces.encode(part) for part in text.removesuffix("</s>").split("<image>")]
        ids = [self.pieces.bos_id(), *parts[0]]
        for part in parts[1:]:
            ids += [420] * places + part
        return ids if end is None else [*ids, end]

    def labels(self, question: str, answer: str, image: bool) -> list[int]:
        """Masked up to the answer: the length of "... ASSISTANT: " less the space that it ends with."""
        whole = self.text(question, answer, image)
        before = whole[: whole.index(" ASSISTANT: ") + len(" ASSISTANT: ")]
        ids = self.ids(whole)
        masked = len(self.ids(before)) - 1
        return [-100] * masked + ids[masked:]


@pytest.fixture(scope="module")
def theirs(parts):
    return Llava(parts / "vicuna")


def picture(width: int = 40, height: int = 24) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "PNG")
    return buffer.getvalue()


SAMPLES = [
    ("What is the object in the image?\nAnswer the question using a single word or phrase", "tabby cat", True),
    ("Context: N/A\nWhich?\nA. one\nB. two\nAnswer with the letter", "B", False),
    ("Provide the bounding box: caf\u00e9 \u4e16 sign", "[0.12,0.50,0.99,1.00]", True),
    ("x", " two  words ", True),
]


def test_prompt_is_vicuna_v1_byte_for_byte(lvlm, theirs):
    for question, answer, image in SAMPLES:
        parts = [{"type": "image"}] if image else []
        asked = [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]
        replied = [*asked, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        render = lvlm.processor.apply_chat_template
        assert render(asked, add_generation_prompt=True) == theirs.text(question, None, image)
        assert render(replied) == theirs.text(question, answer, image)
    plain = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert render(plain, add_generation_prompt=True) == "Be brief. USER: Hi ASSISTANT:"
    turns = [plain[1], {"role": "assistant", "content": "Yes"}, {"role": "user", "content": "So?"}]
    assert render(turns, add_generation_prompt=True) == f"{SYSTEM} USER: Hi ASSISTANT: Yes</s>USER: So? ASSISTANT:"


def test_tokens_and_labels_are_llavas(lvlm, theirs):
    items = [sample(str(n), picture() if image else None, q, a) for n, (q, a, image) in enumerate(SAMPLES)]
    collator = Collator(lvlm)
    batch, prompts = collator(items), collator.prompts(items)
    for row, (question, answer, image) in enumerate(SAMPLES):
        seen = batch["attention_mask"][row].bool()
        assert batch["input_ids"][row][seen].tolist() == theirs.ids(theirs.text(question, answer, image))
        assert batch["labels"][row][seen].tolist() == theirs.labels(question, answer, image)
        asked = prompts["input_ids"][row][prompts["attention_mask"][row].bool()].tolist()
        assert asked == theirs.ids(theirs.text(question, None, image))
        assert asked.count(420) == (4 if image else 0)
    assert collator.stop_tokens == [2]


WORDS = st.text("abz AUSER:.,?[]0159\n\u00e9\u4e16", min_size=1, max_size=24)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(WORDS, WORDS.filter(lambda text: text.strip()), st.booleans())
def test_tokens_and_labels_of_any_text(lvlm, theirs, question, answer, image):
    batch = Collator(lvlm)([sample("any", picture() if image else None, question, answer)])
    assert batch["input_ids"][0].tolist() == theirs.ids(theirs.text(question, answer, image))
    assert batch["labels"][0].tolist() == theirs.labels(question, answer, image)


@pytest.mark.parametrize("size", [(40, 24), (24, 41), (28, 28), (100, 7)])
def test_pixels_are_those_of_coins_training(lvlm, size):
    """A square of CLIP's mean colour with the picture in the middle, bicubic by Pillow, CLIP's normalisation."""
    data = picture(*size)
    opened, side = Image.open(io.BytesIO(data)), max(size)
    square = Image.new("RGB", (side, side), (122, 116, 104))
    square.paste(opened, ((side - size[0]) // 2, (side - size[1]) // 2))
    pixels = np.asarray(square.resize((28, 28), Image.Resampling.BICUBIC), dtype=np.float64) / 255
    mean, deviation = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    wanted = torch.tensor((pixels - mean) / deviation).permute(2, 0, 1).float()
    found = Collator(lvlm)([sample("a", data)])["pixel_values"][0]
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)


# --- what is refused, before anything is written ----------------------------------------------------------------


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def changed_index(parts, change):
    file = parts / "vicuna" / "pytorch_model.bin.index.json"
    said = json.loads(file.read_text())
    change(said["weight_map"])
    file.write_text(json.dumps(said))


def changed_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def changed_shard(parts, **changes):
    file = parts / "vicuna" / "pytorch_model-00001-of-00002.bin"
    torch.save({**torch.load(file, weights_only=True), **changes}, file)


def changed_projector(parts, drop=None, **changes):
    state = {**projector(), **{key.replace("__", "."): value for key, value in changes.items()}}
    state.pop(drop, None)
    torch.save(state, parts / "mm_projector.bin")


SPOILT = {
    "projector of 13B": (
        lambda p: torch.save(projector(width=40), p / "mm_projector.bin"),
        r"mm_projector.bin: tensor model.mm_projector.0.weight is 40 x 24; expected 32 x 24",
    ),
    "projector without a bias": (
        lambda p: changed_projector(p, drop="model.mm_projector.2.bias"),
        r"mm_projector.bin: model.mm_projector.2.bias is missing",
    ),
    "deeper projector": (
        lambda p: changed_projector(p, model__mm_projector__4__weight=torch.ones(WIDTH, WIDTH)),
        r"model.mm_projector.4.weight: layer 4 is one too many",
    ),
    "projector of one linear": (
        lambda p: torch.save({"model.mm_projector.weight": torch.ones(WIDTH, TOWER)}, p / "mm_projector.bin"),
        "a projector of one linear",
    ),
    "adapter in place of the projector": (
        lambda p: changed_projector(p, model__layers__0__lora_A=torch.ones(2)),
        r"mm_projector.bin: model.layers.0.lora_A: not a tensor of the projector",
    ),
    "projector with NaN": (
        lambda p: changed_projector(p, model__mm_projector__0__bias=torch.full((WIDTH,), torch.nan)),
        r"tensor model.mm_projector.0.bias holds NaN",
    ),
    "no projector": (lambda p: (p / "mm_projector.bin").unlink(), r"mm_projector.bin: no such file"),
    "empty projector": (lambda p: (p / "mm_projector.bin").write_bytes(b""), r"mm_projector.bin: "),
    "Git LFS pointer": (
        lambda p: (p / "mm_projector.bin").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "is a Git LFS pointer",
    ),
    "numbers in place of tensors": (
        lambda p: torch.save({"model.mm_projector.0.weight": 1.0}, p / "mm_projector.bin"),
        "expected a mapping from names to tensors",
    ),
    "missing shard": (
        lambda p: (p / "vicuna" / "pytorch_model-00002-of-00002.bin").unlink(),
        r"index.json: names pytorch_model-00002-of-00002.bin, which is not there",
    ),
    "shard elsewhere": (
        lambda p: changed_index(p, lambda names: names.update({"lm_head.weight": "../../secret.bin"})),
        r"names the file '../../secret.bin'; only files in the same folder",
    ),
    "index without a map": (
        lambda p: (p / "vicuna" / "pytorch_model.bin.index.json").write_text("{}"),
        "expected a `weight_map`",
    ),
    "shard of another model": (
        lambda p: changed_shard(p, **{"model.norm.weight": torch.ones(WIDTH), "lm_head.weight": torch.ones(9, 9)}),
        r"(is in .* too|tensor lm_head.weight is 9 x 9; expected 420 x 32 by config.json)",
    ),
    "missing tensor": (
        lambda p: changed_config(p / "vicuna", num_hidden_layers=3),
        r"vicuna: tensor model.layers.2.* is missing; is the download complete",
    ),
    "wrong width": (lambda p: changed_config(p / "vicuna", intermediate_size=64), r"expected 64 x 32 by config.json"),
    "an instruction-tuned LLaVA": (
        lambda p: changed_config(p / "vicuna", model_type="llava_llama"),
        r"vicuna/config.json: model_type 'llava_llama' is not a plain Llama; .* has seen the benchmark's tasks",
    ),
    "a LLaVA that says it is a Llama": (
        lambda p: changed_shard(p, **{"model.mm_projector.0.weight": torch.ones(2, 2)}),
        r"tensor model.mm_projector.0.weight has no place in Llama",
    ),
    "SigLIP": (lambda p: changed_config(p / "clip", model_type="siglip"), "model_type 'siglip' is not CLIP"),
    "too many tokens": (
        lambda p: changed_config(p / "vicuna", vocab_size=300),
        "its tokenizer has 420 tokens but config.json says vocab_size 300",
    ),
    "no tokenizer": (lambda p: (p / "vicuna" / "tokenizer.model").unlink(), "no tokenizer here"),
    "no weights": (lambda p: (p / "clip" / "pytorch_model.bin").unlink(), "clip: no weights here"),
    "no config": (lambda p: (p / "clip" / "config.json").unlink(), r"clip/config.json: no such file"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_bad_part_is_named_and_nothing_is_written(copied, tmp_path, case):
    spoil, message = SPOILT[case]
    spoil(copied)
    with pytest.raises(DymoeError, match=message):
        assembled(copied, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts"]


@pytest.mark.parametrize("file", ["mm_projector.bin", "vicuna/pytorch_model-00001-of-00002.bin"])
@pytest.mark.parametrize("zipped", [False, True])
def test_nothing_pickled_runs(copied, tmp_path, file, zipped):
    marker = tmp_path / "ran"
    if zipped:
        torch.save({"model.mm_projector.0.weight": Evil(marker)}, copied / file)
    else:
        (copied / file).write_bytes(pickle.dumps(Evil(marker)))
    with pytest.raises(DymoeError, match=f"{Path(file).name}: is damaged or holds something other than tensors"):
        assembled(copied, tmp_path / "out")
    assert not marker.exists()
    assert not (tmp_path / "out").exists()


def test_other_refusals(parts, base, tmp_path, capsys, monkeypatch):
    before = {file.name: file.read_bytes() for file in base.iterdir()}
    with pytest.raises(DymoeError, match="exists and is not an empty folder"):
        assembled(parts, base)
    assert {file.name: file.read_bytes() for file in base.iterdir()} == before
    with pytest.raises(DymoeError, match="'int8' is not a floating dtype"):
        assembled(parts, tmp_path / "out", dtype="int8")
    with pytest.raises(DymoeError, match=r"--llm .*nowhere: no such folder"):
        assembled(parts, tmp_path / "out", llm=str(tmp_path / "nowhere"))
    with pytest.raises(DymoeError, match="--vision someone/clip: no such folder, and the Hub does not give it"):
        assembled(parts, tmp_path / "out", vision="someone/clip")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(DymoeError, match=r"out: needs .* GB, but 0.0 GB are free"):
        assembled(parts, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    assert main(["assemble", "--llm", "a", "--vison", "b"]) == 2
    assert "--vison: unknown option" in capsys.readouterr().err
    assert main(["assemble", "--llm", "a", "--output", "b"]) == 2
    assert "--vision is missing" in capsys.readouterr().err
    assert main(["assemble", "--llm", "--vision"]) == 2
    assert "--llm: expected a value after it" in capsys.readouterr().err
