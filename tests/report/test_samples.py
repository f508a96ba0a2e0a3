"""Which samples are shown, and what is said of them."""

import base64
import json
from pathlib import Path

from reading import THREE, matrix_run, page
from run_folders import make_joint, make_run, picture

from dymoe.analysis.runs import gather, read_runs
from dymoe.files import atomic_json, atomic_write, read_json
from dymoe.report.page import write_report
from dymoe.report.samples import PER_PAIR, Comparison, compare


def sampled(tmp_path: Path, name: str, answers: dict[str, list[float]]) -> Path:
    """A run over two stages whose samples have these scores at stage 1 and 2."""
    run = matrix_run(tmp_path / name, name, [[80], [70, 70]])
    for stage in (1, 2):
        lines = [
            {"id": i, "prediction": f"{name} {i} {stage}", "score": scores[stage - 1], "lenient": 1.0}
            for i, scores in answers.items()
        ]
        file = run / "stages" / f"0{stage}-{THREE[stage - 1]}" / "predictions" / "scienceqa.jsonl"
        atomic_write(file, "".join(json.dumps(line) + "\n" for line in lines))
    records = [{"task": "scienceqa", "id": i, "question": f"q {i}", "answer": "x"} for i in answers]
    atomic_json(run / "samples.json", records)
    return run


def test_samples_that_one_method_lost_and_another_kept_come_first(tmp_path: Path) -> None:
    lora = sampled(tmp_path, "lora", {"same": [1, 1], "never": [0, 0], "both": [1, 0], "told": [1, 0], "found": [0, 1]})
    dymoe = sampled(
        tmp_path, "dymoe", {"same": [1, 1], "never": [0, 0], "both": [1, 0], "told": [1, 1], "found": [0, 1]}
    )
    chosen = compare(gather(read_runs([lora, dymoe]))).shown
    assert [shown.question.id for shown in chosen[:2]] == ["told", "both"]
    assert [fate.method.label for fate in chosen[0].fates if fate.lost] == ["lora"]
    assert [fate.method.label for fate in chosen[1].fates if fate.lost] == ["lora", "dymoe"]
    text = page(tmp_path, lora, dymoe).sections["samples"]
    assert "lora told 1" in text
    assert "dymoe told 2" in text
    assert "lost by lora" in text


def test_without_samples_json_the_section_says_so(tmp_path: Path) -> None:
    text = page(tmp_path, make_run(tmp_path / "a", tasks=THREE, samples=0)).sections["samples"]
    assert "None of these runs wrote a samples.json" in text


def test_images_stay_within_the_page_budget(tmp_path: Path) -> None:
    run = sampled(tmp_path, "lora", {str(i): [1, 0] for i in range(3)})
    big = base64.b64encode(picture(0) + bytes(900_000)).decode()
    records = read_json(run / "samples.json")
    atomic_json(run / "samples.json", [r | {"image_base64": big, "mime": "image/jpeg"} for r in records])
    out = write_report([run], tmp_path / "r.html")
    assert out.read_bytes().count(big.encode()) == 1
    assert out.stat().st_size < 10_000_000


def oracle_counts(paths: list[Path]) -> list[list[int]]:
    """counts[a][b] straight from the predictions files: right before and at the end in a, right before and not in b."""
    found = []
    for path in paths:
        history: dict[str, list[bool]] = {}
        for folder in sorted((path / "stages").iterdir()):
            for file in sorted((folder / "predictions").glob("*.jsonl")):
                for row in map(json.loads, file.read_text().splitlines()):
                    history.setdefault(row["id"], []).append(row["score"] == 1)
        found.append(history)
    was = [{i for i, h in run.items() if any(h[:-1])} for run in found]
    now = [{i for i, h in run.items() if h[-1]} for run in found]
    return [
        [len((was[a] & now[a]) & (was[b] - now[b])) if a != b else 0 for b in range(len(paths))]
        for a in range(len(paths))
    ]


def compared(paths: list[Path]) -> Comparison:
    return compare(gather(read_runs(paths)))


def test_every_pair_has_its_samples_and_all_are_counted(tmp_path: Path) -> None:
    paths = [make_run(tmp_path / name, name, samples=20) for name in ("lora", "incmoelora", "dymoe", "ewc")]
    found = compared(paths)
    assert [list(row) for row in found.counts] == oracle_counts(paths)
    assert found.total == 8 * 20
    for a, row in enumerate(found.counts):
        for b, count in enumerate(row):
            fates = [shown.fates for shown in found.shown if (a, b) in shown.pairs]
            assert len(fates) >= min(count, PER_PAIR)
            for own in fates:
                assert own[a].last is not None
                assert own[b].last is not None
                assert (own[a].last.right, own[b].last.right) == (True, False)
    assert found.pair is not None
    assert found.counts[found.pair[0]][found.pair[1]] == max(found.counts[found.pair[0]])


def test_a_lost_sample_says_since_which_stage(tmp_path: Path) -> None:
    run = make_run(tmp_path / "lora", "lora", tasks=THREE, samples=0)
    right = {1: True, 2: True, 3: False}
    for stage, folder in enumerate(sorted((run / "stages").iterdir()), start=1):
        line = {"id": "a", "prediction": "cat" if right[stage] else "dog", "score": float(right[stage])}
        atomic_write(folder / "predictions" / "scienceqa.jsonl", json.dumps(line) + "\n")
    atomic_json(run / "samples.json", [{"task": "scienceqa", "id": "a", "question": "what?", "answer": "cat"}])
    (shown,) = compared([run]).shown
    assert shown.stages[shown.fates[0].lost_at] == "imagenet"
    assert shown.fates[0].before == "cat"
    text = " ".join(page(tmp_path, run).sections["samples"].split())
    assert "lora ✗ dog lost while learning imagenet; before: cat" in text


def test_a_method_without_stages_can_keep_but_not_lose(tmp_path: Path) -> None:
    paths = [make_run(tmp_path / "lora", "lora", tasks=THREE), make_joint(tmp_path / "joint", 0, THREE)]
    found = compared(paths)
    assert not any(shown.fates[1].lost for shown in found.shown)
    assert any(shown.fates[1].remembered for shown in found.shown)
