"""What the page says, and which run folders it refuses."""

import json
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from reading import THREE, Text, matrix_run, page
from run_folders import make_joint, make_run, write_results

from dymoe.analysis.figures import Figure, look, scatter
from dymoe.analysis.forgetting import headline, lost_per_task, over_stages, remarks
from dymoe.analysis.routing_drift import over_stages as routing_drift
from dymoe.analysis.runs import Method, gather, read_run, read_runs, read_sweep
from dymoe.errors import DymoeError
from dymoe.evaluation import AccuracyMatrix
from dymoe.evaluation.intervals import accuracy, change
from dymoe.files import atomic_json, atomic_write, read_json
from dymoe.learning import formats
from dymoe.numbers import Stat, number
from dymoe.report.layout import environment
from dymoe.report.page import write_report

# ---------------------------------------------------------------- what it says


def test_the_numbers_are_those_of_the_matrices(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"{m}{s}", m, s, THREE) for m in ("lora", "dymoe") for s in (0, 1)]
    parsed = page(tmp_path, *runs)
    for method in ("lora", "dymoe"):
        metrics = [
            AccuracyMatrix(read_json(tmp_path / f"{method}{s}" / "results.json")["matrix"]).to_dict() for s in (0, 1)
        ]
        for key in ("MFT", "MFN", "MAA", "BWT", "BWT_T-1"):
            mean = statistics.mean(m[key] for m in metrics)
            spread = statistics.stdev(m[key] for m in metrics)
            shown = f"{mean:+.1f}" if "BWT" in key else f"{mean:.1f}"
            assert f"{shown} ± {spread:.1f}".replace("-", "−") in parsed.sections["metrics"]


def asked(*scores: list[float]) -> dict[str, object]:
    """A task of `watch` in results.json with these scores before the first stage and after each."""
    accuracy = [100 * sum(row) / len(row) for row in scores]
    numbers = {
        "accuracy": accuracy,
        "lenient": accuracy,
        "measures": {"loss": [1.5 + 0.25 * n for n in range(len(scores))]},
    }
    return {"samples": len(scores[0]), "questions": "q", "scores": list(scores), **numbers}


def test_what_was_only_asked_stands_before_after_and_in_between(tmp_path: Path) -> None:
    scores = ([1.0, 1.0, 1.0, 0.5], [1.0, 1.0, 0.0, 0.5], [1.0, 0.0, 0.0, 0.5], [0.0, 0.0, 0.0, 0.5])
    runs = [
        matrix_run(
            tmp_path / f"{seed}", "lora", [[80], [60, 70], [60, 70, 80]], seed, watch={"Captions": asked(*scores)}
        )
        for seed in (0, 1)
    ]
    joint = tmp_path / "joint"
    write_results(joint, method="joint", seed=0, tasks=list(THREE), joint=[80, 80, 80], matrix=[])
    values = read_json(joint / "results.json")
    atomic_json(joint / "results.json", {**values, "watch": {"Captions": asked(scores[0], scores[0])}})
    told = page(tmp_path, *runs, joint).sections["watch"]
    for row in scores:
        interval = accuracy([row, row])
        assert f"{interval.value:.1f} ({interval.low:.0f}–{interval.high:.0f})" in told
    assert change([scores[0]] * 2, [scores[-1]] * 2).text(sign=True) in told
    assert "loss 1.50 → 2.25 nats/token" in told
    assert re.search(r"joint Captions 87\.5 \S+ – – 87\.5 \S+ 0\.0", told.replace("+0.0", "0.0"))
    alone = matrix_run(tmp_path / "alone", "lora", [[80]])
    assert "watch" not in page(tmp_path, alone).sections


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lenient": [50.0]}, "watch.Captions: expected as many numbers of each kind"),
        ({"samples": 5}, "watch.Captions.scores: expected 5 scores in each row"),
        ({"scores": [[1.0, 2.0]]}, "watch.Captions.scores"),
        ({"measures": {"loss": []}}, "watch.Captions: expected as many numbers"),
    ],
)
def test_broken_numbers_of_what_was_only_asked_are_refused(
    tmp_path: Path, values: dict[str, object], message: str
) -> None:
    broken = {**asked([1.0, 0.0], [1.0, 1.0]), **values}
    run = matrix_run(tmp_path / "a", "lora", [[80]], watch={"Captions": broken})
    with pytest.raises(DymoeError, match=message):
        read_run(run)


def test_metrics_written_in_results_json_are_not_trusted(tmp_path: Path) -> None:
    run = matrix_run(tmp_path / "a", "lora", [[80], [60, 70]], metrics={"MFT": 12.3})
    assert "75.0" in page(tmp_path, run).sections["metrics"]


def test_the_headline_names_who_forgot_least(tmp_path: Path) -> None:
    lora = matrix_run(tmp_path / "lora", "lora", [[80], [50, 80], [20, 50, 80]])
    dymoe = matrix_run(tmp_path / "dymoe", "dymoe", [[70], [70, 60], [64, 60, 62]])
    expected = "dymoe forgot least: backward transfer of −2.0 points against −30.0 for lora."
    assert headline(gather(read_runs([lora, dymoe]))) == expected
    parsed = page(tmp_path, lora, dymoe)
    assert expected in parsed.sections[""]
    assert "scienceqa (60.0 points, mostly while learning" in parsed.sections["metrics"]
    assert "single seed" in parsed.sections[""]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([[80], [50, 80]], r"lora went from 80.0 % .* to 65.0 % .*−15.0 points \(after 2 of 3 tasks\)\."),
        ([[80]], "Only scienceqa has been learned so far, so nothing could be forgotten yet."),
        ([[80], [90, 80], [90, 80, 70]], r"backward transfer of \+3.3 points\."),
    ],
)
def test_the_headline_of_one_method(tmp_path: Path, rows: list[list[float]], expected: str) -> None:
    assert re.search(expected, headline(gather(read_runs([matrix_run(tmp_path / "a", "lora", rows)]))))


def test_the_headline_of_many_methods_stays_one_line(tmp_path: Path) -> None:
    runs = [matrix_run(tmp_path / f"m{i}", f"m{i}", [[80], [80 - i, 80]]) for i in range(6)]
    expected = "m0 forgot least: backward transfer of +0.0 points against −0.5 for m1 down to −2.5 for m5 (after 2 of 3"
    assert headline(gather(read_runs(runs))).startswith(expected)


def test_a_difference_within_the_spread_is_said_to_be_so(tmp_path: Path) -> None:
    def runs(gap: float) -> list[Method]:
        paths = []
        for method, offset in (("lora", 0.0), ("dymoe", gap)):
            for seed in (0, 1):
                rows = [[80], [50 + offset + 9 * seed, 80], [50 + offset + 9 * seed, 80, 80]]
                paths.append(matrix_run(tmp_path / f"{gap}{method}{seed}", method, rows, seed))
        return gather(read_runs(paths))

    assert any("no more than the larger spread" in note for note in remarks(runs(3)))
    assert any("more than the larger spread" in n and "no more" not in n for n in remarks(runs(20)))


def test_a_run_in_progress_is_shown_as_far_as_it_is(tmp_path: Path) -> None:
    done = make_run(tmp_path / "lora", "lora", 0, THREE)
    partial = make_run(tmp_path / "dymoe", "dymoe", 0, THREE, stages=2)
    parsed = page(tmp_path, done, partial)
    assert "dymoe is shown as far as its runs have come: 2 of 3 tasks" in parsed.sections[""]
    assert "lora went from" in parsed.sections[""]  # the unfinished run is not compared
    rows = {row[0]: row for row in over_stages(gather(read_runs([done, partial]))).rows}
    assert rows["scienceqa: dymoe"][3] == "–"
    assert rows["scienceqa: lora"][3] != "–"


def test_joint_is_an_upper_bound_without_stages(tmp_path: Path) -> None:
    parsed = page(tmp_path, make_run(tmp_path / "a", tasks=THREE), joint := make_joint(tmp_path / "j", 0, THREE))
    mean = statistics.mean(read_json(joint / "results.json")["joint"])
    assert f"joint seed 0 – {mean:.1f} – – – –" in " ".join(parsed.sections["metrics"].split())
    assert "joint answer" in parsed.sections["samples"]
    alone = page(tmp_path, joint)
    assert f"All tasks were learned at once: {mean:.1f} %" in alone.sections[""]
    assert "matrices" not in alone.sections


def test_routing_drift_is_the_weight_on_newer_groups(tmp_path: Path) -> None:
    run = matrix_run(tmp_path / "a", "dymoe", [[80], [70, 70], [70, 60, 50]])
    stages = {
        2: {"scienceqa": [0.7, 0.3], "textvqa": [0.1, 0.9]},
        3: {"scienceqa": [0.5, 0.3, 0.2], "textvqa": [0.2, 0.7, 0.1], "imagenet": [0, 0, 1]},
    }
    for stage, weights in stages.items():
        tasks = {task: {"weight": weight} for task, weight in weights.items()}
        file = run / "stages" / f"{stage:02d}-{THREE[stage - 1]}" / "routing.json"
        atomic_json(file, {"groups": list(THREE[:stage]), "tasks": tasks})
    methods = gather(read_runs([run]))
    figure = routing_drift(methods)
    assert figure is not None
    assert figure.panels[0].spec["data"][0]["y"] == pytest.approx([30, 30])
    assert figure.rows == [
        ("dymoe: mean of old tasks", "30.0", "30.0"),
        ("dymoe: scienceqa", "30.0", "50.0"),
        ("dymoe: textvqa", "–", "10.0"),
    ]


def test_without_routing_there_are_no_routing_figures(tmp_path: Path) -> None:
    parsed = page(tmp_path, make_run(tmp_path / "a", "lora", 0, THREE, routed=False))
    assert "routing-drift" not in parsed.sections
    assert "routing-maps" not in parsed.sections


def test_hashes_say_what_changed(tmp_path: Path) -> None:
    entries = [
        {"stage": 1, "groups": {"scienceqa": "aa"}},
        {"stage": 2, "groups": {"scienceqa": "aa", "textvqa": "bb"}},
        {"stage": 3, "groups": {"scienceqa": "aa", "textvqa": "b2", "imagenet": "cc"}},
    ]
    run = matrix_run(tmp_path / "a", "dymoe", [[80], [70, 70], [70, 60, 50]], group_hashes=entries)
    text = page(tmp_path, run).sections["hashes"]
    assert "Expert groups checked at a later stage that are identical: 1." in text
    assert "Changed after they were learned: textvqa of a." in text
    assert "a scienceqa 1 aa identical through stage 3" in " ".join(text.split())
    assert "a textvqa 2 bb differs at stage 3: not frozen" in " ".join(text.split())
    assert "a imagenet 3 cc new at this stage" in " ".join(text.split())


def test_the_one_group_that_all_tasks_train_is_no_broken_promise(tmp_path: Path) -> None:
    entries = [{"stage": stage, "groups": {"shared": f"a{stage}"}} for stage in (1, 2, 3)]
    run = matrix_run(tmp_path / "a", "lora", [[80], [70, 70], [70, 60, 50]], group_hashes=entries)
    text = page(tmp_path, run).sections["hashes"]
    assert "Not frozen, since all tasks share and train it: the one group of a." in text
    assert "changed after" not in text


def test_error_bars_are_drawn_only_where_seeds_differ(tmp_path: Path) -> None:
    rows = [[80.0], [70.0, 70.0], [70.0, 60.0, 50.0]]
    other = [[80.0], [70.0, 70.0], [60.0, 60.0, 50.0]]
    single = [matrix_run(tmp_path / "lora", "lora", rows)]
    several = [matrix_run(tmp_path / f"dymoe{seed}", "dymoe", [rows, other][seed], seed) for seed in (0, 1)]
    figure = lost_per_task(gather(read_runs([*single, *several])))
    assert figure is not None
    lora, dymoe = figure.panels[0].spec["data"]
    assert "error_y" not in lora
    spread = statistics.stdev([10, 20])
    assert dymoe["error_y"]["array"] == [pytest.approx(spread, rel=1e-4), None, None]


def test_format_drift_that_is_nowhere_is_said_and_not_drawn(tmp_path: Path) -> None:
    none, some = dict.fromkeys(THREE, 0.0), dict.fromkeys(THREE, 2.5)
    for drift, plots in ((none, 1), (some, 2)):
        run = matrix_run(tmp_path / str(plots), "lora", [[80], [70, 70], [70, 60, 50]], format_drift=drift)
        figure = lost_per_task(gather(read_runs([run])))
        assert figure is not None
        assert len(figure.panels) == plots
        assert figure.rows[0][-1] == f"{drift['scienceqa']:+.1f}"
        assert ("has no plot" in figure.caption) == (plots == 1)


def test_machines_and_versions_stand_apart_and_whole(tmp_path: Path) -> None:
    machine = {"system": "Linux x86_64", "cores": 2, "gpu": None}
    run = matrix_run(tmp_path / "a", "lora", [[80], [70, 70]], machine=machine, trainable_parameters=2442240)
    text = page(tmp_path, run).sections["runs"]
    assert "system Linux x86_64, cores 2" in text
    assert "gpu" not in text
    assert "2 442 240" in text  # the reader makes all spaces plain


def test_runs_of_one_method_and_seed_are_not_averaged(tmp_path: Path) -> None:
    first = matrix_run(tmp_path / "tag", "dymoe", [[80], [70, 70]])
    second = matrix_run(tmp_path / "no-tag", "dymoe", [[80], [60, 70]])
    assert [m.label for m in gather(read_runs([first, second]))] == ["dymoe (tag)", "dymoe (no-tag)"]


def test_settings_make_variants_and_seeds_of_each_are_averaged(tmp_path: Path) -> None:
    runs = [
        matrix_run(tmp_path / f"{tag}{seed}", "dymoe", [[80], [70, 70]], seed=seed, settings={"tau": 0.2, "tag": tag})
        for tag in ("exclusive", "none")
        for seed in (0, 1)
    ]
    gathered = gather(read_runs(runs))
    assert [(m.label, len(m.runs)) for m in gathered] == [("dymoe (tag exclusive)", 2), ("dymoe (tag none)", 2)]


def test_unlike_settings_are_remarked(tmp_path: Path) -> None:
    first = matrix_run(tmp_path / "a", "lora", [[80], [70, 70]], steps_per_task=60)
    second = matrix_run(tmp_path / "b", "dymoe", [[80], [70, 70]], steps_per_task=90, base="llava", split="validation")
    text = page(tmp_path, first, second).sections[""]
    assert "differ in their steps per task (60, 90)" in text
    assert "differ in their evaluation split (None, validation)" in text
    assert "differ in their base model (llava, pocket)" in text


def test_numbers_are_shown_with_a_real_minus_and_no_minus_zero() -> None:
    assert [number(-1.25, sign=True), number(-0.01, sign=True), number(None)] == ["−1.2", "+0.0", "–"]
    assert Stat.of([1.0, 3.0]).text() == "2.0 ± 1.4"
    assert Stat.of([2.0]).text() == "2.0"


# ---------------------------------------------------------------- safety of the page


def test_the_page_is_self_contained(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / m, m) for m in ("lora", "dymoe")]
    html = write_report(runs, tmp_path / "r.html").read_text(encoding="utf-8")
    assert html.count("* plotly.js v") == 1
    assert len(html.encode()) < 10_000_000
    for tag, attributes in Text(html).tags:
        assert not (tag in ("script", "link", "iframe", "object") and {"src", "href"} & set(attributes)), tag
        if tag == "img":
            assert (attributes["src"] or "").startswith("data:image/")
        if tag == "a":
            assert (attributes["href"] or "").startswith("#")
    policy = next(a["content"] for t, a in Text(html).tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy.split("script-src")[1]


HOSTILE = '</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1>"onload=" {{7*7}} &amp;'


def test_text_from_models_and_data_is_escaped(tmp_path: Path) -> None:
    tasks = ("<img src=x onerror=window.hacked=1>", '{{ 7*7 }}"onload="', "<b>bold<b>")
    runs = [make_run(tmp_path / "a", HOSTILE, 0, tasks, text=HOSTILE)]
    for key, value in {"name": HOSTILE, "base": HOSTILE, "machine": {HOSTILE: HOSTILE}}.items():
        file = runs[0] / "results.json"
        atomic_json(file, read_json(file) | {key: value})
    parsed = page(tmp_path, *runs)
    assert [a for t, a in parsed.tags if t == "script" and a.get("type") != "application/json"] == [
        {"type": "text/plain", "id": "library"},
        {},
    ]
    images = [a for t, a in parsed.tags if t == "img"]
    assert images
    assert all((a["src"] or "").startswith("data:") for a in images)
    assert not [a for _, a in parsed.tags for name in a if name.startswith("on")]
    assert HOSTILE in parsed.sections["samples"]
    assert HOSTILE in parsed.sections["runs"]
    assert tasks[1] in parsed.sections["matrices"]


def test_a_figure_cannot_end_the_script_element_it_stands_in() -> None:
    figure = Figure("f", "")
    figure.plot("", "", [scatter(look(0, "a"), [1], [2], "", name=HOSTILE)], 100)
    macros = environment().get_template("parts.html.jinja").module
    html = str(macros.plot(figure.panels[0], "p", figure))  # type: ignore[attr-defined]
    spec = html.partition('id="p-spec">')[2].partition("</script>")[0]
    assert not set("<>&") & set(spec)
    assert json.loads(spec)["data"][0]["name"] == HOSTILE


def test_half_a_surrogate_pair_and_long_answers_are_written(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", tasks=THREE, text="\ud800" + "long " * 500)
    text = page(tmp_path, run).sections["samples"]
    assert "?long long" in text
    assert "more characters)" in text
    assert "long " * 200 not in text


# ---------------------------------------------------------------- refusals


def edit(key: str, value: object) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        file = run / "results.json"
        file.write_text(json.dumps(read_json(file) | {key: value}))

    return change


def drop(key: str) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        data = read_json(run / "results.json")
        del data[key]
        atomic_json(run / "results.json", data)

    return change


def text(name: str, content: str) -> Callable[[Path], None]:
    return lambda run: atomic_write(run / name, content)


STAGE = "stages/01-scienceqa"
SAMPLE = {"task": "scienceqa", "id": "1", "question": "q", "answer": "a"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: (run / "results.json").unlink(), "no results.json here; give a run folder"),
        (shutil.rmtree, "no results.json here; give a run folder"),
        (text("results.json", '{"name": '), r"results\.json: not valid JSON \(column 10: "),
        (text("results.json", "[]"), r"results\.json: the file: expected a mapping of keys, got \[\]"),
        (drop("matrix"), "matrix: the run has finished no stage yet"),
        (drop("seed"), r"results\.json: seed: is missing; expected a whole number from 0"),
        (edit("seed", True), r"results\.json: seed: expected a whole number from 0, got True"),
        (edit("tasks", []), r"results\.json: tasks: expected different names, got \[\]"),
        (edit("tasks", ["a", "a"]), r"results\.json: tasks: expected different names, got \['a', 'a'\]"),
        (edit("tasks", [1]), r"results\.json: tasks.1: expected str, got 1"),
        (edit("matrix", []), "has finished no stage yet"),
        (edit("matrix", [[1]] * 2), r"results\.json: matrix.2: expected 2 accuracies, got \[1.0\]"),
        (edit("matrix", [[1], [2, float("nan")]]), "NaN is no number of JSON"),
        (edit("matrix", [[1] * t for t in range(1, 6)]), "matrix: expected a row for each of the 3 tasks, got 5"),
        (edit("joint", [1]), r"joint: expected 3 accuracies, got \[1.0\]"),
        (edit("format_drift", {"a": "b"}), "format_drift.a: expected float, got 'b'"),
        (edit("group_hashes", [{"stage": 1}]), "group_hashes.1.groups: is missing; expected a mapping of keys"),
        (edit("group_hashes", 5), "group_hashes: expected a list of a mapping of keys or nothing, got 5"),
        (text(f"{STAGE}/routing.json", "{"), r"01-scienceqa/routing\.json: not valid JSON"),
        (
            text(f"{STAGE}/routing.json", '{"groups": ["a"], "tasks": {"x": {"weight": [-0.4]}}}'),
            r"routing\.json: tasks.x.weight.1: expected a number from -1e-06, got -0.4",
        ),
        (
            text(f"{STAGE}/routing.json", '{"groups": ["a"], "tasks": {"x": []}}'),
            r"tasks.x: expected a mapping of keys, got \[\]",
        ),
        (text("samples.json", "{}"), r"samples\.json: the file: expected a list of a mapping of keys, got {}"),
        (text("samples.json", "[3]"), r"samples\.json: 1: expected a mapping of keys, got 3"),
        (text("samples.json", json.dumps([SAMPLE, SAMPLE | {"id": 4}])), r"samples\.json: 2.id: expected str, got 4"),
        (
            text("samples.json", json.dumps([SAMPLE | {"task": "x"}])),
            "1.task: expected one of scienceqa",
        ),
        (
            text("samples.json", json.dumps([SAMPLE | {"image_base64": "aa", "mime": "image/svg+xml"}])),
            "mime: expected one",
        ),
        (text("samples.json", json.dumps([SAMPLE | {"image_base64": "%", "mime": "image/png"}])), "no base64"),
        (text("samples.json", json.dumps([SAMPLE | {"image_base64": "aaaa", "mime": "image/png"}])), "no image/png"),
        (
            text(f"{STAGE}/predictions/scienceqa.jsonl", '{"id": 1}\n'),
            "line 1: prediction: is missing",
        ),
        (text(f"{STAGE}/predictions/scienceqa.jsonl", "{\n"), "line 1: not valid JSON"),
    ],
)
def test_a_broken_run_folder_is_refused(tmp_path: Path, change: Callable[[Path], None], message: str) -> None:
    run = make_run(tmp_path / "run", tasks=THREE)
    change(run)
    out = tmp_path / "report.html"
    with pytest.raises(DymoeError, match=message) as error:
        write_report([run], out)
    assert str(run) in str(error.value)
    assert not out.exists()


def test_runs_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", tasks=THREE)
    other = make_run(tmp_path / "b", "lora", tasks=THREE[::-1])
    with pytest.raises(DymoeError, match=r"b/results\.json: tasks is .*a/results\.json has .*same order"):
        write_report([run, other], tmp_path / "r.html")
    edit("tasks", list(THREE))(other)
    edit("stream", "coin")(other)
    with pytest.raises(DymoeError, match=r"stream is 'coin'"):
        write_report([run, other], tmp_path / "r.html")
    with pytest.raises(DymoeError, match="more than once"):
        write_report([run, tmp_path / "x" / ".." / "a"], tmp_path / "r.html")
    with pytest.raises(DymoeError, match="no run folder given"):
        write_report([], tmp_path / "r.html")


def test_an_unwritable_place_is_one_error_and_keeps_what_stood_there(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", tasks=THREE)
    (tmp_path / "file").write_text("kept")
    with pytest.raises(DymoeError, match="cannot be written"):
        write_report([run], tmp_path / "file" / "report.html")
    assert (tmp_path / "file").read_text() == "kept"


def test_reading_a_run_gives_its_matrix(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "a", tasks=THREE))
    assert run.matrix().names == THREE
    assert run.matrix(2).rows == run.rows[:2]


def test_importing_the_report_does_not_import_torch() -> None:
    code = "import sys, dymoe.report.page; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_zero_shot_run_is_a_level_too(tmp_path: Path) -> None:
    zero = tmp_path / "zero"
    write_results(zero, method="zero-shot", seed=0, tasks=list(THREE), matrix=[], zero_shot=[10.0, 20.0, 30.0])
    line = {"id": "a", "prediction": "no idea", "score": 0.0}
    atomic_write(zero / "zero-shot" / "predictions" / "scienceqa.jsonl", json.dumps(line) + "\n")
    atomic_json(zero / "samples.json", [{"task": "scienceqa", "id": "a", "question": "what?", "answer": "cat"}])
    assert headline(gather(read_runs([zero]))) == "No task was learned: 20.0 % correct on average."
    parsed = page(tmp_path, make_run(tmp_path / "a", tasks=THREE), zero)
    assert "zero-shot seed 0 – 20.0 – – – –" in " ".join(parsed.sections["metrics"].split())
    assert "no idea" in page(tmp_path, zero).sections["samples"]
    beside = matrix_run(tmp_path / "b", "lora", [[80], [70, 70]], zero_shot=[10.0, 20.0, 30.0])
    assert read_run(beside).level is None  # a run that learns keeps its stages


def test_plugins_are_part_of_a_methods_name(tmp_path: Path) -> None:
    kinds = ({}, {"replay": {"size": 10}}, {"replay": {"size": 20}}, {"asd": {}, "replay": {"size": 10}})
    runs = [
        matrix_run(tmp_path / str(i), "dymoe", [[80], [70, 70]], settings={"tau": 0.2}, **{"with": kind})
        for i, kind in enumerate(kinds)
    ]
    labels = [method.label for method in gather(read_runs(runs))]
    assert labels == [
        "dymoe",
        "dymoe with replay (replay.size 10)",
        "dymoe with replay (replay.size 20)",
        "dymoe with asd, replay",
    ]


def test_groups_that_all_have_full_weight_are_not_routed(tmp_path: Path) -> None:
    run = matrix_run(tmp_path / "a", "inclora", [[80], [70, 70]])
    tasks = {"scienceqa": {"weight": [1.0, 1.0]}, "textvqa": {"weight": [1.0, 1.0]}}
    atomic_json(run / "stages" / "02-textvqa" / "routing.json", {"groups": ["scienceqa", "textvqa"], "tasks": tasks})
    parsed = page(tmp_path, run)
    assert not {"routing-drift", "routing-maps", "drift-parts", "activation", "overlay"} & set(parsed.sections)


# ---------------------------------------------------------------- a sweep's results

LEADERBOARD = Path(__file__).parents[2] / "results" / "leaderboard.jsonl"


def record(label: str, seed: int, matrix: list[list[float]], **more: object) -> dict[str, object]:
    """A sweep's record with just these numbers."""
    names = {"label": label, "order": "origin", "instructions": "original", "seed": seed, "fingerprint": label}
    about = {"method": "dymoe", "stream": "s", "base": "b", "tasks": list(THREE), "matrix": matrix, "metrics": {}}
    about |= {"trainable_parameters": 1, "stored_parameters": 1, "recipe": {"training": {"lr": 1e-3}}}
    return {**names, **about, "settings": {"tau": len(label)}, **more}


def test_a_sweep_stands_for_its_runs(tmp_path: Path) -> None:
    """The page and docs/leaderboard.md are made from the same records by different code."""
    methods = {method.label: method for method in gather(read_sweep(LEADERBOARD))}
    lines = Path("docs/leaderboard.md").read_text(encoding="utf-8").splitlines()
    start = next(place for place, line in enumerate(lines) if line.startswith("| method | seeds |"))
    head, _, *table = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines[start : lines.index("", start)]
    )
    assert len(table) == len(methods) == 14
    for cells in table:
        row = dict(zip(head, cells, strict=True))
        for key in ("MFT", "MFN", "MAA", "BWT"):
            stat = methods[row["method"]].metric(key)
            if stat is None:
                assert row[key] == "–"
            else:  # 5.25 may be rounded to either side
                shown = [float(part) for part in row[key].replace("−", "-").split(" ± ")]
                assert shown == pytest.approx([stat.mean, stat.spread], abs=0.0501)
        assert row["seeds"] == str(len(methods[row["method"]].runs))
    told = page(tmp_path, LEADERBOARD)
    assert "14 methods" in told.sections[""]
    assert "dymoe, seed 2" in told.sections["runs"]


def test_a_sweeps_rows_keep_their_names_beside_a_run(tmp_path: Path) -> None:
    file = tmp_path / "tau.jsonl"
    rows = [record(f"dymoe tau={tau}", seed, [[80], [70, 80], [tau, 70, 80]]) for tau in (10, 20) for seed in (0, 1)]
    formats.write_results(file, {"about": {}}, rows)
    write_results(tmp_path / "mine", method="dymoe", seed=0, stream="s", tasks=list(THREE), matrix=[[90], [90, 90]])
    methods = gather(read_runs([file, tmp_path / "mine"]))
    assert [method.label for method in methods] == ["dymoe tau=10", "dymoe tau=20", "dymoe"]
    assert [len(method.runs) for method in methods] == [2, 2, 1]


def test_results_that_make_no_page_are_refused(tmp_path: Path) -> None:
    def refused(message: str, *rows: dict[str, object]) -> None:
        formats.write_results(tmp_path / "r.jsonl", {"about": {}}, rows)
        with pytest.raises(DymoeError, match=message):
            write_report([tmp_path / "r.jsonl"], tmp_path / "out.html")
        assert not (tmp_path / "out.html").exists()

    whole = record("a", 0, [[80], [70, 80], [60, 70, 80]])
    refused(r"r\.jsonl: holds no finished run yet")
    refused(r"r\.jsonl: line 2: method: is missing; expected str", {"label": "a"})
    refused(r"r\.jsonl: line 2: matrix.2: expected 2 accuracies", {**whole, "matrix": [[80], [70]]})
    turned = record("a", 0, [[80]], order="reverse", tasks=[*reversed(THREE)])
    refused(r"r\.jsonl: a, reverse, seed 0: tasks is .* only runs of one stream", whole, turned)
    with pytest.raises(DymoeError, match=r"none\.jsonl: no such file"):
        write_report([tmp_path / "none.jsonl"], tmp_path / "out.html")
