"""Batched answers are those of one sample at a time; scores and routing are what they say."""

import itertools

import pytest
import torch

from dymoe.errors import DymoeError
from dymoe.evaluation.generate import batches, evaluate, evaluated, generate
from dymoe.learning.groups import freeze_all, train_group
from dymoe.methods import Stage, create
from dymoe.models import Collator, ImageFeatures, load
from dymoe.tasks import Sample, Task, load_stream
from dymoe.tasks.scoring import lenient, scorer
from tests.learning.tiny import save_tiny


@pytest.fixture(scope="module")
def stream():
    return load_stream("pocket-coin", tasks=["ScienceQA", "ImageNet", "VQAv2"])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, stream):
    """A tiny random model with two groups of random experts, as (lvlm, collator, peft model)."""
    lvlm = load(str(save_tiny(tmp_path_factory.mktemp("tiny") / "model")), "float32")
    with torch.no_grad():  # so that an answer depends on what is asked
        for name, parameter in lvlm.model.named_parameters():
            if parameter.ndim == 2 and "vision" not in name:
                parameter.normal_(0, 0.2)
        specials = lvlm.processor.tokenizer.convert_tokens_to_ids(["<pad>", "<s>", "<image>"])
        lvlm.model.lm_head.weight[specials] = 0  # never the most likely token
    method, model = create("incmoelora", num_experts=4, rank=2, top_k=3), None
    for index, name in enumerate(("first", "second"), start=1):
        stage = Stage(index, name, (), None)
        model = train_group(lvlm.model, model, name, method.config(stage))
    with torch.no_grad():
        for layer in model.base_model.layers():
            for parameter in layer.dymoe_B.values():
                parameter.normal_(0, 0.3)
    freeze_all(model)
    features = ImageFeatures(lvlm, batch_size=8)
    for task in stream.tasks:
        features.add_samples(task.test[:8])
    return lvlm, Collator(lvlm, features), model


def mixed(stream, count):
    """Samples of all tasks, of unequal lengths, one of text alone."""
    samples = [task.test[i] for i in range(count) for task in stream.tasks]
    return [*samples, Sample("text", None, "Is water wet?", "yes", {"answer": "yes"})]


@pytest.fixture(scope="module")
def alone(tiny, stream):
    """The answers of one sample at a time."""
    lvlm, collator, _ = tiny
    answers = [generate(lvlm, collator, [sample], 6, 1, "float32")[0] for sample in mixed(stream, 4)]
    assert len(set(answers)) >= 5
    return answers


@pytest.mark.parametrize("batch_size", [2, 5, 64])
def test_batches_answer_as_one_sample_at_a_time(tiny, stream, alone, batch_size):
    lvlm, collator, _ = tiny
    assert generate(lvlm, collator, mixed(stream, 4), 6, batch_size, "float32") == alone


def test_answers_are_those_of_transformers_with_pictures_read_each_time(tiny, stream):
    """Oracle: what the field's evaluation scripts do, one prompt at a time through transformers' own loop."""
    lvlm, _, model = tiny
    plain, words = Collator(lvlm), lvlm.processor.tokenizer
    expected = []
    for sample in mixed(stream, 6):
        prompt = plain.prompts([sample])
        tokens = lvlm.model.generate(
            **prompt, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=plain.stop_tokens
        )
        expected.append(words.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    fresh = Collator(lvlm, ImageFeatures(lvlm))
    trace = model.base_model.trace
    assert generate(lvlm, fresh, mixed(stream, 6), 8, 7, "float32", context=trace.context) == expected


def test_batches_are_of_like_length_and_the_same_for_any_number_of_processes():
    lengths = [5, 9, 5, 7, 9, 1, 7, 7]
    whole = batches(lengths, 3)
    assert whole == [[1, 4, 3], [6, 7, 0], [2, 5]]
    for count in (2, 3, 5):
        shares = [batches(lengths, 3, (rank, count)) for rank in range(count)]
        assert [share for row in itertools.zip_longest(*shares) for share in row if share is not None] == whole
    assert batches([], 3) == []


def test_greedy_answers_are_the_argmax_of_the_full_forward(tiny, stream):
    """Oracle: extend the prompt by the most likely token, without a cache, until the end token."""
    lvlm, collator, _ = tiny
    words = lvlm.processor.tokenizer
    for sample in mixed(stream, 2):
        batch = collator.prompts([sample])
        tokens = []
        for _ in range(5):
            with torch.no_grad():
                token = int(lvlm.model(**batch).logits[0, -1].argmax())
            if token == words.eos_token_id:
                break
            tokens.append(token)
            batch["input_ids"] = torch.cat([batch["input_ids"], torch.tensor([[token]])], 1)
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        expected = words.decode(tokens, skip_special_tokens=True).strip()
        assert generate(lvlm, collator, [sample], 5, dtype="float32") == [expected]


def test_the_pocket_model_answers_in_batches_as_alone(stream):
    lvlm = load("pocket", "float32")
    collator = Collator(lvlm, ImageFeatures(lvlm, batch_size=1))
    samples = mixed(stream, 1)
    single = [generate(lvlm, collator, [sample], 5, 1, "float32")[0] for sample in samples]
    assert any(single)
    assert generate(lvlm, collator, samples, 5, 4, "float32") == single


def test_scores_and_routing(tiny, stream):
    lvlm, collator, model = tiny
    task = stream.tasks[1]
    result = evaluate(lvlm, collator, task, peft_model=model, limit=5, batch_size=2, dtype="float32")
    assert [p.id for p in result.predictions] == [sample.id for sample in task.test[:5]]
    for prediction, sample in zip(result.predictions, task.test, strict=False):
        assert prediction.score == scorer(task.scorer)(prediction.prediction, sample.reference)
        assert prediction.lenient == lenient(task.scorer)(prediction.prediction, sample.reference)
    assert result.strict == pytest.approx(20 * sum(p.score for p in result.predictions))
    assert result.groups == ("first", "second")
    assert sum(result.weight) == pytest.approx(1, abs=1e-5)
    assert all(weight > 0 for weight in result.weight)
    assert set(result.by_layer) == {0, 1}
    mean = torch.tensor(list(result.by_layer.values())).mean(0)
    assert torch.allclose(mean, torch.tensor(result.weight), atol=1e-6)
    assert not model.base_model.trace.observers


def test_routing_does_not_depend_on_the_batch(tiny, stream, monkeypatch):
    """Padding counts for nothing, nor do the tokens of a row that has ended while its batch goes on."""
    lvlm, collator, model = tiny
    task, weights = stream.tasks[0], []
    written = []
    for sample in task.test[:6]:
        prompt = collator.prompts([sample])
        tokens = lvlm.model.generate(**prompt, max_new_tokens=3, do_sample=False, pad_token_id=0)
        written.append(tokens[0, prompt["input_ids"].shape[1] :].tolist())
    # Let the second token of one answer end an answer, so that rows end at different times.
    stop = written[0][1]
    assert any(stop not in tokens for tokens in written)
    monkeypatch.setattr(collator, "stop_tokens", [*collator.stop_tokens, stop])
    for batch_size in (1, 6):
        result = evaluate(lvlm, collator, task, peft_model=model, limit=6, batch_size=batch_size, dtype="float32")
        weights.append(torch.tensor(result.weight))
    assert torch.allclose(*weights, atol=1e-5)
    assert model.base_model.trace.context.finished is None


def test_an_empty_split_and_a_bad_reference_are_named(tiny):
    lvlm, collator, _ = tiny
    empty = Task("odd", (), (), (), "exact_match", 4)
    with pytest.raises(DymoeError, match="'odd': its test split is empty"):
        evaluated(empty, "test", None)
    bad = Sample("s7", None, "Which?", "A", {})
    with pytest.raises(DymoeError, match="task 'odd': sample 's7'"):
        evaluate(lvlm, collator, Task("odd", (), (), (bad,), "letter", 4), dtype="float32")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_an_error_that_names_the_task(tiny, stream, value):
    lvlm, collator, model = tiny
    weight = lvlm.model.lm_head.weight
    before = weight[7, 0].item()
    try:
        with torch.no_grad():
            weight[7, 0] = value
        with pytest.raises(DymoeError, match="task 'ImageNet': the model's scores for the next token are not finite"):
            evaluate(lvlm, collator, stream.tasks[1], peft_model=model, limit=3, dtype="float32")
    finally:
        with torch.no_grad():
            weight[7, 0] = before
