"""A run that is killed and goes on ends with the same adapters, bit for bit."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

from dymoe.cli import main
from tests.learning.tiny import write_recipe

COMMAND = [sys.executable, "-c", "import sys; from dymoe.cli import main; sys.exit(main(sys.argv[1:]))"]


def events(run: Path) -> list[dict]:
    file = run / "events.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def at_least(run: Path, stage: int, step: int) -> bool:
    return any(e["stage"] == stage and e.get("step", 0) >= step for e in events(run))


def outcome(run: Path) -> dict:
    """Everything that must not depend on where a run was interrupted."""
    files = [*run.glob("stages/*/adapter/*"), *run.glob("stages/*/predictions/*"), *run.glob("stages/*/routing.json")]
    kept = {str(file.relative_to(run)): file.read_bytes() for file in files}
    results = json.loads((run / "results.json").read_text())
    kept["matrix"], kept["hashes"] = results["matrix"], results["group_hashes"]
    steps = [
        {key: value for key, value in event.items() if key != "time"}
        for event in events(run)
        if event["event"] == "step"
    ]
    return {**kept, "steps": steps}


def ended_by(sent: signal.Signals, words: list[str], run: Path, stage: int, step: int) -> tuple[int, str]:
    """Exit code and words of a run in a process of its own that gets a signal when it has come so far."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([*COMMAND, "run", *words], stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            deadline = time.monotonic() + 240
            while not at_least(run, stage, step):
                assert process.poll() is None, "the run ended before its signal was sent"
                assert time.monotonic() < deadline
                time.sleep(0.005)
            process.send_signal(sent)
            _, told = process.communicate(timeout=60)
        finally:
            process.kill()
    return process.returncode, told


def test_killed_and_interrupted_mid_task_it_ends_bit_for_bit_the_same(whole, tiny_folder, tmp_path, capsys):
    recipe, run = write_recipe(tmp_path / "run.yaml", tiny_folder), tmp_path / "run"
    code, _ = ended_by(signal.SIGKILL, [str(recipe), "--resume"], run, stage=1, step=5)
    assert code == -signal.SIGKILL
    code, told = ended_by(signal.SIGINT, [str(recipe), "--resume", "--seed", "0"], run, stage=2, step=4)
    assert code == 130
    assert "Traceback" not in told
    assert told.strip().splitlines()[-1] == f"dymoe: interrupted; go on with: dymoe run {recipe} --seed 0 --resume"
    assert not (run / "stages" / "02-VQAv2" / "done.json").exists()
    capsys.readouterr()
    assert main(["run", str(recipe), "--resume"]) == 0
    resumed = json.loads((run / "stages" / "02-VQAv2" / "done.json").read_text())["resumed_at"]
    assert resumed >= 3
    told = capsys.readouterr().err
    assert f"{run}: goes on; 1 of 2 tasks are done" in told
    assert f"VQAv2: goes on after step {resumed} of" in told
    assert main(["run", str(recipe), "--resume"]) == 0
    assert f"{run}: finished before, kept as it is" in capsys.readouterr().err
    assert outcome(run) == outcome(whole)
    assert not list(run.glob("stages/*/trainer"))


def test_killed_between_training_and_done_asks_only_what_is_missing(whole, tiny_folder, tmp_path):
    recipe, run = write_recipe(tmp_path / "run.yaml", tiny_folder), tmp_path / "run"
    subprocess.run(["cp", "-r", str(whole), str(run)], check=True)
    before = outcome(run)
    stage = run / "stages" / "02-VQAv2"
    (stage / "done.json").unlink()
    scores = json.loads((stage / "scores.json").read_text())
    del scores["VQAv2"]
    (stage / "scores.json").write_text(json.dumps(scores))
    (stage / "predictions" / "VQAv2.jsonl").unlink()
    kept = (stage / "predictions" / "ImageNet.jsonl").stat().st_mtime_ns
    (stage / ".dymoe-tmp-abc").write_text("{")
    assert main(["run", str(recipe), "--resume"]) == 0
    assert outcome(run) == before
    assert (stage / "predictions" / "ImageNet.jsonl").stat().st_mtime_ns == kept
    assert not (stage / ".dymoe-tmp-abc").exists()


def test_a_full_disk_is_one_line_and_the_run_goes_on_later(tiny_folder, tmp_path, capsys):
    recipe = write_recipe(tmp_path / "run.yaml", tiny_folder, tasks=["ImageNet"], training={"steps_per_task": 4})
    run = tmp_path / "run"
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limit[1]))
    try:
        assert main(["run", str(recipe)]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    told = capsys.readouterr().err
    assert "Traceback" not in told
    last = told.strip().splitlines()[-1]
    assert "cannot be written" in last
    assert str(run) in last
    assert not (run / "stages" / "01-ImageNet" / "adapter").exists()
    assert main(["run", str(recipe), "--resume"]) == 0
    assert (run / "results.json").exists()


def test_refusals_name_what_differs(whole, tiny_folder, tmp_path, capsys):
    recipe = whole.with_suffix(".yaml")
    assert main(["run", str(recipe)]) == 2
    assert "give --resume to go on" in capsys.readouterr().err
    assert main(["run", str(recipe), "--resume", "--seed", "3", "--settings.tau", "0.5"]) == 2
    told = capsys.readouterr().err
    assert "seed is 0 there, 3 here" in told
    assert "settings.tau is 0.2 there, 0.5 here" in told
    assert main(["run", str(recipe), "--resume", "--training.threads", "2"]) == 0
    capsys.readouterr()
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("mine")
    assert main(["run", str(recipe), "--output", str(other)]) == 2
    assert "holds no run" in capsys.readouterr().err
    assert [file.name for file in other.iterdir()] == ["thesis.tex"]


def test_a_changed_adapter_is_noticed(whole, tiny_folder, tmp_path, capsys):
    recipe, run = write_recipe(tmp_path / "run.yaml", tiny_folder), tmp_path / "run"
    subprocess.run(["cp", "-r", str(whole), str(run)], check=True)
    (run / "stages" / "02-VQAv2" / "done.json").unlink()
    weights = run / "stages" / "01-ImageNet" / "adapter" / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert main(["run", str(recipe), "--resume"]) == 2
    assert "hash differs" in capsys.readouterr().err
