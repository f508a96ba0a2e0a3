"""The decoding loop writes what transformers' own loop writes, whoever leaves the batch when."""

import itertools

import pytest
import torch
from transformers import Cache

from dymoe.errors import DymoeError
from dymoe.evaluation.decode import Greedy
from tests.adapter.test_selection import grown

LONGEST = 8


@pytest.fixture(scope="module", params=["none", "keys", "prototypes"])
def model(request):
    """Three groups on a tiny language model, weighed by a selector or all alike."""
    torch.manual_seed(5)
    made = grown(selector=request.param).eval()
    with torch.no_grad():  # so that an answer depends on what is asked
        for name, parameter in made.named_parameters():
            if parameter.ndim == 2 and "dymoe" not in name:
                parameter.normal_(0, 0.3)
    return made


@pytest.fixture(scope="module")
def prompts():
    """Seven prompts of 3 to 9 tokens, padded on the left."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 60, (7, 9), generator=generator)
    mask = torch.stack([(torch.arange(9) >= 9 - length).long() for length in (9, 3, 7, 5, 9, 4, 6)])
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def generate(model, prompts, stops, **options):
    options = {"max_new_tokens": LONGEST, "do_sample": False, "pad_token_id": 0, "eos_token_id": stops, **options}
    return model.generate(**prompts, **options)


def test_the_loop_is_that_of_transformers(model, prompts):
    """Over pairs of end tokens, so that rows end together, early, late or never."""
    trace = model.base_model.trace
    free = generate(model, prompts, [59])[:, 9:]
    shrunk = 0
    for stops in itertools.combinations(sorted(set(free.flatten().tolist()))[:4], 2):
        expected = generate(model, prompts, list(stops))[:, 9:]
        sizes = []
        trace.observers.append(lambda routing, sizes=sizes: sizes.append(len(routing.weights)))
        found = generate(model, prompts, list(stops), custom_generate=Greedy(trace.context))
        trace.observers.clear()
        assert torch.equal(found, expected)
        assert trace.context.finished is None
        shrunk += sizes[-1] < sizes[0] == 7
    assert shrunk


def test_a_penalty_of_the_model_itself_holds(model, prompts):
    assert torch.equal(
        generate(model, prompts, [59], custom_generate=Greedy(), repetition_penalty=5.0),
        generate(model, prompts, [59], repetition_penalty=5.0)[:, 9:],
    )


@pytest.mark.parametrize("model", ["none"], indirect=True)  # a selector would decide anew at every step
def test_without_a_cache_the_batch_stays(model, prompts):
    stop = generate(model, prompts, [59])[0, 10].item()
    assert torch.equal(
        generate(model, prompts, [stop], custom_generate=Greedy(), use_cache=False),
        generate(model, prompts, [stop])[:, 9:],
    )


def test_an_error_leaves_no_finished_rows_behind(model, prompts, monkeypatch):
    trace, told = model.base_model.trace, []
    prepare = model.base_model.model.prepare_inputs_for_generation

    def broken(*args, **kwargs):
        told.append(trace.context.finished)
        if trace.context.finished is not None:
            raise RuntimeError("out of memory")
        return prepare(*args, **kwargs)

    monkeypatch.setattr(model.base_model.model, "prepare_inputs_for_generation", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        generate(model, prompts, [59], custom_generate=Greedy(trace.context))
    assert told[-1] is not None
    assert trace.context.finished is None


def test_a_lost_cache_is_an_error(model, prompts, monkeypatch):
    """What a release of transformers does that hands the cache on as something else."""
    kind = type(model.base_model.model)
    update = kind._update_model_kwargs_for_generation

    def renamed(self, outputs, carried, **kwargs):
        carried = update(self, outputs, carried, **kwargs)
        return {name: value for name, value in carried.items() if not isinstance(value, Cache)}

    monkeypatch.setattr(kind, "_update_model_kwargs_for_generation", renamed)
    with pytest.raises(DymoeError, match="gets no key/value cache"):
        generate(model, prompts, [59], custom_generate=Greedy())
