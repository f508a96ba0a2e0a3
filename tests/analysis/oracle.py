"""Routing the slow way: each stage's groups loaded anew, one sample at a time, weights recomputed from layer inputs."""

from functools import cache

import torch
import yaml

from dymoe.adapter import DyMoELayer
from dymoe.learning.groups import load_group
from dymoe.models import Collator, load
from tests.test_routing import oracle_cosine, oracle_weights

TOP_K, TEMPERATURE, EXPERTS = 3, 0.1, 4  # as the recipe of the run says


@cache
def stage_model(run, stage):
    """Base model, its collator and the first `stage` groups on it."""
    lvlm = load(yaml.safe_load((run / "run.yaml").read_text())["recipe"]["model"], "float32")
    model = None
    for folder in sorted((run / "stages").iterdir())[:stage]:
        model = load_group(lvlm.model, model, folder.name.partition("-")[2], folder / "adapter")
    return lvlm, Collator(lvlm), model.eval()


@cache
def sample_routing(run, stage, sample_id):
    """(part of each token, {layer: (scores, weights) of each token}) of a sample at a stage, in plain floats."""
    lvlm, collator, model = stage_model(run, stage)
    sample = SAMPLES[sample_id]
    batch, prompt = collator([sample]), collator.prompts([sample])["input_ids"].shape[1]
    image = lvlm.processor.tokenizer.convert_tokens_to_ids("<image>")
    ids = batch.pop("input_ids")
    batch.pop("labels")
    parts = ["answer" if n >= prompt else "image" if t == image else "instruction" for n, t in enumerate(ids[0])]
    inputs, hooks = {}, []
    for layer in (module for module in model.modules() if isinstance(module, DyMoELayer)):
        hooks.append(layer.register_forward_pre_hook(lambda layer, x: inputs.update({layer.name: (layer, x[0][0])})))
    with torch.no_grad():
        model(input_ids=ids, **batch)
    for hook in hooks:
        hook.remove()
    found = {}
    for name, (layer, x) in inputs.items():
        rows = [row for group in layer.group_configs for row in layer.dymoe_router[group].tolist()]
        scores = [[oracle_cosine(token, row) for row in rows] for token in x.tolist()]
        found[name] = (scores, [oracle_weights(row, TOP_K, TEMPERATURE) for row in scores])
    return parts, found


SAMPLES = {}


def task_samples(learned, task):
    """The run's own samples of a task, by id; known to `sample_routing` from now on."""
    samples = learned.samples(learned.tasks[task][0], None)
    SAMPLES.update({sample.id: sample for sample in samples})
    return [sample.id for sample in samples]


def place(name):
    """(layer, projection) of a wrapped layer's name."""
    return int(name.split("layers.")[1].split(".")[0]), name.split(".")[-1]


def close(found, expected, tokens):
    """Means over `tokens` are equal: to rounding nearly always, and up to one token at most.

    Rounding in a padded batch may turn a tie of two experts at the border of the top k, or for the first place.
    """
    pairs = [(abs(a - b), n) for a, b, n in zip(found, expected, tokens, strict=True)]
    off = [difference for difference, _ in pairs if difference > 1e-4]
    assert len(off) <= 0.02 * len(pairs), sorted(off)[-9:]
    assert all(difference <= 1.01 / n for difference, n in pairs)
