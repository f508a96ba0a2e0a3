"""The benchmark of the evaluation runs from learning to its file, and its three ways answer alike."""

import importlib.util
import json
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_the_benchmark_compares_three_ways(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("benchmark_of_evaluation", BENCHMARKS / "evaluation.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    words = ["--model", str(tiny_folder), "--tasks", "ImageNet", "VQAv2", "--samples", "8", "--steps", "1"]
    monkeypatch.setattr(
        sys, "argv", ["evaluation.py", *words, "--rounds", "2", "--batch-size", "3", "--results", str(tmp_path)]
    )
    looped = []
    op = module.computed_by
    monkeypatch.setattr(module, "computed_by", lambda model, way: looped.append(way) or op(model, way))
    module.main()
    (file,) = tmp_path.glob("evaluation-*.json")
    found = json.loads(file.read_text())
    assert found["questions"] == 8
    assert found["groups"] == ["ImageNet", "VQAv2"]
    assert found["answers_equal_to_ours"] == {"one by one": "8 of 8", "expert by expert": "8 of 8"}
    assert looped == ["reference"] * 3  # once to warm up, then in every round
    assert all(found[key]["one by one"]["median"] > 0 for key in ("times_faster", "seconds_a_question"))
