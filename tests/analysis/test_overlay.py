"""Single tokens: which group serves them, their type, their text and their place in the picture."""

import io

import numpy as np
import pytest
from PIL import Image

from dymoe import analysis
from dymoe.analysis.token_overlay import seen_picture
from dymoe.errors import DymoeError
from dymoe.images import decode
from tests.analysis.conftest import TASKS
from tests.analysis.oracle import EXPERTS, SAMPLES, place, sample_routing, task_samples
from tests.test_routing import oracle_type


@pytest.fixture(scope="module")
def frame(learned):
    return analysis.overlay(learned, samples=2, layer=0)


def test_every_token_is_that_of_a_single_sample(frame, learned, run):
    types = set()
    for stage, task in [(1, "ScienceQA"), (3, "ScienceQA"), (2, "ImageNet"), (3, "VQAv2")]:
        for sample in task_samples(learned, task)[:2]:
            parts, layers = sample_routing(run, stage, sample)
            own = frame[(frame["sample"] == sample) & (frame["stage"] == stage)]
            for name, (scores, weights) in layers.items():
                number, projection = place(name)
                if number != 0:
                    continue
                rows = own[own["projection"] == projection].to_dict("records")
                assert [row["position"] for row in rows] == [*range(len(parts))]
                assert [row["kind"] for row in rows] == parts
                for row, score, weight in zip(rows, scores, weights, strict=True):
                    by_group = [sum(weight[n * EXPERTS : (n + 1) * EXPERTS]) for n in range(stage)]
                    assert row["weight"] == pytest.approx(max(by_group), abs=1e-4)
                    assert by_group[TASKS.index(row["group"])] == pytest.approx(max(by_group), abs=1e-4)
                    types.add((stage, row["type"]))
                    assert row["type"] == oracle_type(score, EXPERTS, 0.2).name.lower()
    assert {kind for stage, kind in types if stage == 1} == {"new"}
    assert {kind for stage, kind in types if stage == 3} == {"new", "ambiguous", "old"}


def test_stages_and_samples(frame, learned):
    found = {(task, stage) for task, stage in zip(frame["task"], frame["stage"], strict=True)}
    assert found == {("ScienceQA", 1), ("ScienceQA", 3), ("ImageNet", 2), ("ImageNet", 3), ("VQAv2", 3)}
    assert frame.groupby("task")["sample"].nunique().tolist() == [2, 2, 2]
    assert set(analysis.overlay(learned, tasks=["VQAv2"], samples=1)["layer"]) == {1}  # the middle one of two
    for arguments, message in (
        ({"layer": 7}, "layer 7: the experts sit in layers 0 to 1"),
        ({"tasks": ["GQA"]}, "GQA"),
    ):
        with pytest.raises(DymoeError, match=message):
            analysis.overlay(learned, **arguments)


def test_words_and_patches(frame, learned):
    (sample,) = task_samples(learned, "ScienceQA")[:1]
    rows = frame[(frame["sample"] == sample) & (frame["stage"] == 1) & (frame["projection"] == "q_proj")]
    patches = rows[rows["kind"] == "image"]
    assert patches[["row", "column"]].to_numpy().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert (patches["text"] == "").all()
    words = rows[rows["kind"] != "image"]
    assert (words[["row", "column"]] == -1).all(axis=None)
    asked = SAMPLES[sample]
    text = "".join(words["text"])
    assert text == f"user: {asked.question}\nassistant: {asked.answer}</s>"
    assert "".join(rows[rows["kind"] == "answer"]["text"]) == f" {asked.answer}</s>"


def test_pictures_are_what_the_model_sees(frame, run, learned):
    (sample,) = task_samples(learned, "ImageNet")[:1]
    (name,) = set(frame[frame["sample"] == sample]["picture"])
    kept = Image.open(run / "analysis" / "overlay" / name)
    seen = seen_picture(learned.lvlm, SAMPLES[sample])
    assert kept.size == seen.size == (64, 64)
    plain = np.asarray(decode(SAMPLES[sample].image).resize((64, 64), Image.Resampling.BICUBIC), dtype=float)
    assert np.abs(np.asarray(seen, dtype=float) - plain).mean() < 3
    assert np.abs(np.asarray(kept, dtype=float) - plain).mean() < 12  # lossy
    buffer = io.BytesIO()
    seen.save(buffer, "PNG")
    again = learned.lvlm.processor.image_processor(images=[seen], return_tensors="np")["pixel_values"]
    first = learned.lvlm.processor.image_processor(images=[decode(SAMPLES[sample].image)], return_tensors="np")
    assert np.abs(again - first["pixel_values"]).max() < 0.05


def test_a_model_in_memory_without_an_answer(learned):
    task_samples(learned, "VQAv2")
    sample = next(value for key, value in SAMPLES.items() if key.startswith("vqav2"))
    arguments = (learned.lvlm, learned.model, learned.collator, sample)
    learned.activate(3)
    alone = analysis.token_routing(*arguments, None, 1, "float32")
    answered = analysis.token_routing(*arguments, "a cat", 1, "float32")
    assert "answer" not in set(alone["kind"])
    said = answered[(answered["kind"] == "answer") & (answered["projection"] == "v_proj")]
    assert "".join(said["text"]) == " a cat</s>"
    prompt = answered[answered["kind"] != "answer"].reset_index(drop=True)
    assert prompt["group"].tolist() == alone["group"].tolist()
    assert prompt["weight"].tolist() == pytest.approx(alone["weight"].tolist(), abs=1e-5)
