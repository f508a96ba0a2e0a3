"""Models of nine families, loaded by name: prompt, label mask and image tokens one by one; and two tasks learned."""

import copy
import itertools
import json
import weakref
from dataclasses import replace

import pytest
import torch
from peft import get_peft_model
from safetensors import safe_open

from dymoe.adapter import DyMoEConfig
from dymoe.adapter.decoder import decoder_linears
from dymoe.errors import DymoeError
from dymoe.evaluation.generate import generate
from dymoe.images import decode
from dymoe.learning.recipe import load_recipe
from dymoe.learning.run import run
from dymoe.models import Collator, Lvlm, cached_features, load
from dymoe.models.count import TokenCounter
from dymoe.models.options import ModelOptions
from dymoe.models.shapes import outline
from dymoe.preflight.memory import shape_of
from tests.learning.tiny import write_recipe
from tests.models.conftest import png, sample
from tests.models.families import FAMILIES

QUESTION = "What is it?\nAnswer with one word."
SIZES = [(40, 24), (20, 60), None, (64, 50)]  # height, width


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.name)
def loaded(request, tmp_path_factory):
    family = request.param
    folder = tmp_path_factory.mktemp(family.name) / "model"
    family.save(folder)
    return family, folder, load(str(folder), "float32")


def made(family, answer="a cat", sizes=SIZES):
    """Samples of several sizes, one without a picture where the family takes it, with each one's size."""
    kept = [size for size in sizes if size is not None or family.name != "paligemma"]
    return [
        (size, sample(str(size), png("red", size=(size[1], size[0])) if size else None, QUESTION, answer))
        for size in kept
    ]


def expected(family, words, size, answer):
    """Ids of the prompt and of the answer, the border between them being one of tokens."""
    prompt = words(family.start + family.prompt(QUESTION, size), add_special_tokens=False).input_ids
    return prompt, words(family.answer(answer), add_special_tokens=False).input_ids


def test_tokens_are_counted_without_weights_and_pictures_as_batches_have_them(loaded):
    family, folder, lvlm = loaded
    counter, collator = TokenCounter(outline(str(folder), ModelOptions())), Collator(lvlm)
    for size, item in made(family):
        shown = None if size is None else (size[1], size[0])
        assert counter.length(item, shown, learned=True) == collator([item])["input_ids"].shape[1]
        assert counter.length(item, shown, learned=False) == collator.prompts([item])["input_ids"].shape[1]
    _, item = made(family)[0]
    cut = counter.cut(item, "a cat that sits on a wall", 3)
    assert "a cat that sits on a wall".startswith(cut)
    assert 0 < len(cut) < len("a cat that sits on a wall")
    assert counter.cut(item, item.answer, 40) == item.answer


def test_prompt_labels_and_image_tokens_token_by_token(loaded):
    family, _, lvlm = loaded
    words = lvlm.processor.tokenizer
    image = words.convert_tokens_to_ids(family.image_token)
    assert image == lvlm.model.config.image_token_id
    items = made(family)
    collator = Collator(lvlm)
    batch, prompts = collator([item for _, item in items]), collator.prompts([item for _, item in items])
    counts = []
    for row, (size, item) in enumerate(items):
        prompt, answer = expected(family, words, size, item.answer)
        mask = batch["attention_mask"][row].bool()
        assert batch["input_ids"][row][mask].tolist() == prompt + answer
        assert batch["labels"][row].tolist() == [-100] * (mask.numel() - len(answer)) + answer
        assert prompts["input_ids"][row][prompts["attention_mask"][row].bool()].tolist() == prompt
        assert mask.tolist() == sorted(mask.tolist())  # padding on the left alone
        counts.append((size, prompt.count(image)))
    assert all((count > 0) == (size is not None) for size, count in counts)
    for size, count in counts:  # and the tower gives as many as the prompt has places for
        if size is not None:
            alone = collator([item for other, item in items if other == size])
            pixels = {key: alone[key] for key in alone if key not in ("input_ids", "attention_mask", "labels")}
            pixels = {key: value for key, value in pixels.items() if "token_type" not in key}
            with torch.no_grad():
                found = lvlm.model.get_image_features(**pixels, return_dict=True).pooler_output
            parts = [found] if isinstance(found, torch.Tensor) else list(found)
            assert sum(part.numel() // part.shape[-1] for part in parts) == count


def test_a_row_does_not_depend_on_its_batch(loaded):
    family, _, lvlm = loaded
    collator = Collator(lvlm)
    items = [item for _, item in made(family)]
    with torch.no_grad():
        together = lvlm.model(**collator(items)).logits
        for row, item in enumerate(items):
            alone = lvlm.model(**collator([item])).logits[0]
            torch.testing.assert_close(together[row, -len(alone) :], alone, atol=2e-4, rtol=1e-3)
    assert together.std() > 0.1


def test_one_picture_is_in_memory_at_a_time_and_the_batch_is_the_processors(loaded, monkeypatch):
    family, _, lvlm = loaded
    alive: list[weakref.ref] = []
    most = []

    def watched(data):
        picture = decode(data)
        alive.append(weakref.ref(picture))
        most.append(sum(reference() is not None for reference in alive))
        return picture

    items = [item for size, item in made(family) if size is not None]
    collator = Collator(lvlm)
    collator.prompts(items)  # the first batch tries out whether pictures can be joined
    monkeypatch.setattr("dymoe.models.collate.decode", watched)
    batch = collator.prompts(items)
    assert most == [1] * len(items)
    if not lvlm.processor.chat_template:
        return
    texts = [
        lvlm.processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}],
            add_generation_prompt=True,
            tokenize=False,
        )
        for _ in items
    ]
    pictures = [[decode(item.image)] for item in items]
    whole = lvlm.processor(text=texts, images=pictures, padding=True, padding_side="left", return_tensors="pt")
    compared = set(whole) - {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"}
    assert {name for name in compared if "pixel" in name}
    for name in compared:
        assert torch.equal(batch[name], torch.as_tensor(whole[name])), name


def test_the_picture_counts_and_an_answer_does_not_see_its_future(loaded):
    family, _, lvlm = loaded
    size, item = made(family, "blue cat")[0]
    collator = Collator(lvlm)
    other = sample("other", png("blue", "box", size=(size[1], size[0])), QUESTION, "blue cat")
    batch, changed = collator([item]), collator([item])
    changed["input_ids"][0, -2] = changed["input_ids"][0, -3]
    assert not torch.equal(batch["input_ids"], changed["input_ids"])
    with torch.no_grad():
        # In training mode some families build other attention masks than in evaluation mode.
        lvlm.model.train()
        first, second = (lvlm.model(**inputs).logits[0] for inputs in (batch, changed))
        lvlm.model.eval()
        third = lvlm.model(**collator([other])).logits[0]
    torch.testing.assert_close(first[:-2], second[:-2], atol=1e-5, rtol=1e-5)
    assert (first[-2] - second[-2]).abs().max() > 1e-3
    assert (first[-1] - third[-1]).abs().max() > 1e-3


def test_generation_starts_as_the_training_forward_predicts(loaded):
    family, _, lvlm = loaded
    collator = Collator(lvlm)
    items = [item for _, item in made(family)]
    prompts = collator.prompts(items)
    with torch.no_grad():
        tokens = lvlm.model.generate(
            **prompts, max_new_tokens=2, do_sample=False, eos_token_id=collator.stop_tokens, pad_token_id=0
        )
        logits = lvlm.model(**prompts).logits[:, -1]
    assert torch.equal(tokens[:, prompts["input_ids"].shape[1]], logits.argmax(-1))


def test_a_batch_that_shrinks_answers_as_one_question_at_a_time(loaded, monkeypatch):
    """Rows end at different steps and leave the batch; whatever a family carries from step to step goes with them."""
    family, _, kept = loaded
    lvlm = Lvlm(copy.deepcopy(kept.model), kept.processor)
    with torch.no_grad():  # so that an answer depends on what is asked
        torch.manual_seed(3)
        for name, parameter in lvlm.model.named_parameters():
            if parameter.ndim == 2 and "vision" not in name:
                parameter.normal_(0, 0.2)
    collator = Collator(lvlm)
    items = [item for _, item in made(family)]
    items += [replace(items[0], id=f"more-{n}", question="Why?" + " x" * n) for n in range(5)]
    written = []
    for item in items:
        batch = collator.prompts([item])
        tokens = lvlm.model.generate(
            **batch, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0, use_cache=True
        )
        written.append(tokens[0, batch["input_ids"].shape[1] :].tolist())
    # End tokens with which most rows end early, one does not.
    said = sorted({token for tokens in written for token in tokens})
    for stops in itertools.chain(itertools.combinations(said, 1), itertools.combinations(said, 2)):
        expected = [next((n + 1 for n, token in enumerate(tokens) if token in stops), 6) for tokens in written]
        if sorted(expected)[len(expected) // 2] < max(expected):
            break
    monkeypatch.setattr(collator, "stop_tokens", list(stops))
    sizes = []
    forward = lvlm.model.get_decoder().forward

    def watched(*args, **kwargs):
        sizes.append(len(kwargs["inputs_embeds"]))
        return forward(*args, **kwargs)

    monkeypatch.setattr(lvlm.model.get_decoder(), "forward", watched)
    answers = generate(lvlm, collator, items, 6, len(items), "float32")
    words = lvlm.processor.tokenizer
    told = [tokens[:count] for tokens, count in zip(written, expected, strict=True)]
    assert answers == [words.decode(tokens, skip_special_tokens=True).strip() for tokens in told]
    assert sizes[0] == len(items) > sizes[-1], "the batch did not shrink"


def test_cache_where_it_is_right(loaded):
    family, _, lvlm = loaded
    features = cached_features(lvlm)
    assert (features is not None) == family.caches
    if features is None:
        return
    assert features.holds(100)
    assert not features.holds(10**9)
    items = [item for _, item in made(family)]
    plain, cached = Collator(lvlm)(items), Collator(lvlm, features)(items)
    assert torch.equal(plain["input_ids"], cached["input_ids"])
    with torch.no_grad():
        a, b = lvlm.model(**plain).logits, lvlm.model(**cached).logits
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_two_tasks_are_learned_on_the_language_model_alone(loaded, tmp_path):
    family, folder, lvlm = loaded
    recipe = write_recipe(
        tmp_path / "run.yaml",
        folder,
        settings={"num_experts": 2, "top_k": 2},
        training={"steps_per_task": 2, "batch_size": 2, "limit": 4, "save_steps": 50},
        evaluation={"limit": 2, "batch_size": 2},
    )
    results = json.loads((run(load_recipe(str(recipe), [])) / "results.json").read_text())
    assert [len(row) for row in results["matrix"]] == [1, 2]
    stages = sorted((tmp_path / "run" / "stages").iterdir())
    assert [stage.name for stage in stages] == ["01-ImageNet", "02-VQAv2"]
    first, second = (json.loads((stage / "training.json").read_text()) for stage in stages)
    assert second["hashes"][first["group"]] == first["hashes"][first["group"]]
    inside = {id(module) for module in lvlm.model.get_decoder().modules()}
    linears = {
        name
        for name, module in lvlm.model.named_modules()
        if isinstance(module, torch.nn.Linear) and id(module) in inside
    }
    assert len(linears) == family.layers
    assert {name.rpartition(".")[2] for name in linears} == family.linears
    for stage in stages:
        (file,) = (stage / "adapter").glob("**/*.safetensors")
        with safe_open(file, "pt") as weights:
            names = list(weights.keys())
            learned = [name for name in names if "lora_B" in name or "dymoe_B" in name]
            assert learned
            assert all(weights.get_tensor(name).abs().sum() > 0 for name in learned)
        owners = {name.removeprefix("base_model.model.").split(".dymoe_")[0] for name in names}
        assert owners == linears


@pytest.mark.parametrize("whole", [False, True], ids=["its own decoder", "a decoder that holds the tower"])
def test_the_linears_that_are_counted_are_those_that_get_experts(loaded, whole, monkeypatch):
    family, _, lvlm = loaded
    model = copy.deepcopy(lvlm.model)
    if whole:
        monkeypatch.setattr(model, "get_decoder", lambda: model.base_model)
    counted = decoder_linears(model)
    shape = shape_of(model)
    assert [linear.name for linear in shape.linears] == counted
    wrapped = get_peft_model(model, DyMoEConfig(num_experts=1, r=1, top_k=1), adapter_name="a")
    assert [layer.name for layer in wrapped.base_model.layers()] == counted
    assert decoder_linears(model) == counted  # the bases of wrapped linears do not count again
    assert not any("vision_" in name for name in counted)
    assert whole or len(counted) == family.layers


# --- what the families have in common -----------------------------------------------------------------------------


def merging():
    """A LLaVA whose tokenizer merges the prompt's ':' with an answer that starts with ')' or with a letter."""
    from tokenizers import AddedToken, Tokenizer, models
    from tokenizers.decoders import Fuse
    from transformers import PreTrainedTokenizerFast

    letters = sorted(set("USERASSISTANT: What is it?\nabcdefghijklmnopqrstuvwxyz.<>/\u00e9)("))
    vocab = {"<unk>": 0, "</s>": 1, "<image>": 2, "<pad>": 3}
    for piece in [*letters, ":)", ": ", ": c", "ca", ": ca"]:
        vocab.setdefault(piece, len(vocab))
    merges = [(":", ")"), (":", " "), ("c", "a"), (": ", "c"), (": ", "ca")]
    base = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>"))
    base.decoder = Fuse()
    base.add_special_tokens([AddedToken(token, special=True) for token in ("</s>", "<image>", "<pad>")])
    return PreTrainedTokenizerFast(tokenizer_object=base, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    from transformers import CLIPImageProcessor, LlavaProcessor

    folder = tmp_path_factory.mktemp("merging") / "model"
    FAMILIES[0].save(folder)
    lvlm = load(str(folder), "float32")
    side = {"height": 28, "width": 28}
    processor = LlavaProcessor(
        CLIPImageProcessor(size=side, crop_size=side),
        merging(),
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template=lvlm.processor.chat_template,
        num_additional_image_tokens=1,
    )
    return Lvlm(lvlm.model, processor)


@pytest.mark.parametrize("answer", ["cat", "ca", "c", "a", ") no", "a cat."])
def test_an_answer_that_would_merge_with_the_prompt_keeps_its_loss(merged, answer):
    words = merged.processor.tokenizer
    whole = words("What is it? ASSISTANT: " + answer, add_special_tokens=False).input_ids
    before = words("What is it? ASSISTANT:", add_special_tokens=False).input_ids
    assert whole[: len(before)] != before  # a length of the prompt counted apart would be wrong
    collator, item = Collator(merged), sample("a", None, "What is it?", answer)
    batch, prompt = collator([item]), collator.prompts([item])["input_ids"][0]
    learned = batch["labels"][0] != -100
    assert torch.equal(batch["input_ids"][0][~learned], prompt)
    assert words.decode(batch["labels"][0][learned]) == f" {answer}</s>"
    assert words.decode(batch["input_ids"][0]) == f"USER: What is it? ASSISTANT: {answer}</s>"


def test_an_answer_that_cannot_be_told_from_the_prompt_is_named(merged):
    from tokenizers import AddedToken, Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    base = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "<image>": 2}, unk_token="<unk>"))  # a text is one token
    base.add_special_tokens([AddedToken(token, special=True) for token in ("</s>", "<image>")])
    words = PreTrainedTokenizerFast(tokenizer_object=base, eos_token="</s>", unk_token="<unk>")
    processor = copy.copy(merged.processor)
    processor.tokenizer = words
    with pytest.raises(DymoeError, match=r"sample 'odd-3': its answer 'cat' cannot be tokenised apart"):
        Collator(Lvlm(merged.model, processor))([sample("odd-3", None, "What is it?", "cat")])


def test_special_tokens_in_the_text_are_named_for_every_family(loaded):
    family, _, lvlm = loaded
    with pytest.raises(DymoeError, match="sample 'sly': its question contains the special token"):
        Collator(lvlm)([sample("sly", png("red"), f"What {family.image_token}?", "cat")])
