"""One run under one process and several: the same losses, groups and answers; a death is told and mended."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import BatchSampler, RandomSampler

from dymoe import methods
from dymoe.adapter import group_hash
from dymoe.cli import main
from dymoe.errors import DymoeError
from dymoe.evaluation.generate import evaluate
from dymoe.learning import sharded
from dymoe.learning.distributed import ALONE, Processes, first, join, together
from dymoe.learning.groups import train_group
from dymoe.learning.progress import Display, silent
from dymoe.learning.recipe import load_recipe
from dymoe.learning.run import run
from dymoe.learning.sampler import Loader, Order
from dymoe.learning.trainer import StageTrainer
from dymoe.methods.lora import LoRA
from dymoe.models import Collator, load
from dymoe.tasks import load_stream
from tests.learning.many import CONFIGS, ROOT, forked, launch, process_of, wait_until
from tests.learning.tiny import write_recipe

STEPS = 5
needs_fork = pytest.mark.skipif(torch.cuda.is_available(), reason="a process that may use CUDA must not be forked")


def deepspeed_or_skip(config: str) -> None:
    if config.startswith("zero") and find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed: pip install 'dymoe[deepspeed]'")


# ---- the order of the samples ----------------------------------------------------------------------------------------


@given(
    count=st.integers(1, 40),
    size=st.integers(1, 5),
    seed=st.integers(0, 2**32),
    epoch=st.integers(0, 3),
    processes=st.integers(1, 5),
)
@settings(deadline=None)
def test_processes_take_turns_at_the_micro_batches_of_one(count, size, seed, epoch, processes):
    generator = torch.Generator().manual_seed(seed + epoch)
    one = list(BatchSampler(RandomSampler(range(count), generator=generator), size, drop_last=False))
    shares = []
    for rank in range(processes):
        order = Order(count, size, seed, rank, processes)
        order.set_epoch(epoch)
        shares.append(list(order))
        assert len(order) == len(shares[-1]) == -(-len(one) // processes)
    turns = [batch for together in zip(*shares, strict=True) for batch in together]
    assert turns[: len(one)] == one
    assert turns[len(one) :] == [[]] * (len(turns) - len(one))


def test_a_process_without_a_sample_learns_nothing_in_the_step():
    def collate(samples):
        return {"input_ids": torch.tensor(samples)[:, None], "labels": torch.tensor(samples)[:, None]}

    batches = [list(Loader([10, 11, 12], collate, Order(3, 1, 0, rank, 2))) for rank in (0, 1)]
    assert [len(share) for share in batches] == [2, 2]
    learned = [batch["labels"].item() for share in batches for batch in share]
    assert sorted(learned) == [-100, 10, 11, 12]
    assert batches[1][1]["labels"].item() == -100
    assert batches[1][1]["input_ids"].item() == 10


# ---- what processes tell each other ----------------------------------------------------------------------------------


def talk():
    processes = join()
    rank = processes.rank
    told = {
        "who": (processes.rank, processes.count, processes.strategy, processes.main, first()),
        "gather": processes.gather(rank * 10),
        "main": processes.from_main(lambda: f"from {rank}"),
        "mean": processes.mean({"loss": float(rank), "two": 2.0}),
    }
    processes.same("the seed", "7")
    try:
        processes.same("the seed", str(rank // 2))
    except DymoeError as error:
        told["other"] = str(error)
    return told


@needs_fork
def test_processes_meet_and_agree():
    for rank, told in enumerate(forked(3, talk)):
        assert told["who"] == (rank, 3, "ddp", rank == 0, rank == 0)
        assert told["gather"] == [0, 10, 20]
        assert told["main"] == "from 0"
        assert told["mean"] == {"loss": 1.0, "two": 2.0}
        assert told["other"].startswith("the seed is not the same in all processes: [2] differ from process 0;")


def test_alone_nothing_is_asked_of_others(monkeypatch):
    monkeypatch.setenv("RANK", "3")  # a cluster's own variable, without a launcher
    assert join() == ALONE == Processes()
    assert first()
    assert ALONE.gather(5) == [5]
    assert ALONE.from_main(lambda: 6) == 6
    assert ALONE.mean({"loss": 2.0}) == {"loss": 2.0}
    ALONE.same("anything", "7")


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "fsdp_version: 2"),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"},
            "fsdp_cpu_ram_efficient_loading",
        ),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "mixed_precision is 'bf16'"),
    ],
)
def test_a_launcher_that_asks_for_something_else_is_refused(monkeypatch, told, message):
    for name, value in {"LOCAL_RANK": "0", **told}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(DymoeError, match=message):
        join()


# ---- whole tensors out of parts --------------------------------------------------------------------------------------


def toy() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 7), nn.Linear(7, 1))
    model[2].requires_grad_(False)
    return model


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, seeds) -> None:
    for seed in seeds:
        inputs = torch.randn(4, 5, generator=torch.Generator().manual_seed(seed))
        model(inputs).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=0.1)


def sharded_steps(kept):
    """Go on with `kept` for two steps in parts; parameters and optimizer, whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    processes = join()
    model = toy()
    if kept:
        model.load_state_dict(kept["parameters"])
    mesh = init_device_mesh("cpu", (processes.count,))
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    optimizer = adamw(model)
    if kept:
        sharded.load_optimizer_state(model, optimizer, kept["optimizer"])
    steps(model, optimizer, (2, 3) if kept else (0, 1))
    names, keep = [name for name, _ in model.named_parameters()], processes.main
    parameters = sharded.parameters(model, names, keep)
    return {"parameters": parameters, "optimizer": sharded.optimizer_state(model, optimizer, keep)}


@needs_fork
def test_parts_become_whole_and_other_parts_again():
    model = toy()
    optimizer = adamw(model)
    half = None
    for count, seeds in ((2, (0, 1)), (3, (2, 3))):
        steps(model, optimizer, seeds)
        half, *others = forked(count, sharded_steps, half)
        assert all(found == {"parameters": {}, "optimizer": {}} for found in others)
        for name, value in model.named_parameters():
            torch.testing.assert_close(half["parameters"][name], value.detach(), rtol=1e-5, atol=1e-6)
            if value.requires_grad:
                expected = optimizer.state[value]
                assert half["optimizer"][name].keys() == expected.keys()
                for key, one in expected.items():
                    torch.testing.assert_close(half["optimizer"][name][key], one, rtol=1e-5, atol=1e-6)
        assert set(half["optimizer"]) == {"0.weight", "0.bias", "3.weight", "3.bias"}
    plain = toy()  # and on in one process
    plain.load_state_dict(half["parameters"])
    other = adamw(plain)
    sharded.load_optimizer_state(plain, other, half["optimizer"])
    for one, two in ((model, optimizer), (plain, other)):
        steps(one, two, (4,))
    for name, value in model.named_parameters():
        torch.testing.assert_close(plain.get_parameter(name), value, rtol=1e-5, atol=1e-6)


# ---- evaluation ------------------------------------------------------------------------------------------------------


@needs_fork
def test_answers_and_scores_do_not_depend_on_the_number_of_processes(tiny_folder):
    task = load_stream("pocket-coin", tasks=["VQAv2"]).tasks[0]
    lvlm = load(str(tiny_folder), "float32")
    for name, value in lvlm.model.named_parameters():
        if "_proj.weight" in name:
            value.mul_(20)  # so that an answer depends on more than the last token
    torch.manual_seed(0)
    model = train_group(lvlm.model, None, "VQAv2", methods.create("dymoe", num_experts=2, rank=2).config(None))
    collator = Collator(lvlm)

    def ask():
        processes = join()
        asked = []
        answer = lvlm.model.generate
        lvlm.model.generate = lambda **batch: asked.append(len(batch["input_ids"])) or answer(**batch)
        result = evaluate(
            lvlm,
            collator,
            task,
            peft_model=model,
            limit=7,
            batch_size=2,
            dtype="float32",
            part=(processes.rank, processes.count),
            gather=processes.gather,
        )
        return asked, result

    (everything, expected), *_ = forked(1, ask)
    assert everything == [2, 2, 2, 1]
    assert len({record["prediction"] for record in expected.records()}) > 1
    assert [record["id"] for record in expected.records()] == [sample.id for sample in task.test[:7]]
    for count in (2, 3):
        found = forked(count, ask)
        assert [asked for asked, _ in found] == [everything[rank::count] for rank in range(count)]
        for _, result in found:
            assert result.records() == expected.records()
            assert (result.strict, result.lenient) == (expected.strict, expected.lenient)
            assert result.groups == expected.groups
            assert result.weight == pytest.approx(expected.weight, abs=1e-6)


# ---- runs ------------------------------------------------------------------------------------------------------------


def recipe_in(folder: Path, model: Path, **changes) -> Path:
    changes = {
        "settings": {"lora_dropout": 0.0},  # dropout is drawn in every process for itself
        "training": {"steps_per_task": STEPS, "batch_size": 2, "samples_per_step": 12, "save_steps": 2, "limit": 21}
        | {"max_grad_norm": 0.05},  # less than the gradients' norm, so that clipping is seen
        "evaluation": {"limit": 5, "batch_size": 2},
        **changes,
    }
    return write_recipe(folder / "run.yaml", model, **changes)


def with_defaults(recipe: Path) -> Path:
    """The recipe without settings, for another method than DyMoE."""
    recipe.write_text(re.sub(r"^settings:\n(  .*\n)*", "", recipe.read_text(), flags=re.M))
    return recipe


@pytest.fixture(scope="module")
def alone(tiny_folder, tmp_path_factory):
    """The run in one process."""
    folder = tmp_path_factory.mktemp("alone")
    assert main(["run", str(recipe_in(folder, tiny_folder))]) == 0
    return folder / "run"


class Stopping(Display):
    """Interrupts the run in its first task."""

    def step(self, step, steps, logs):
        if step == 3:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def begun(tiny_folder, tmp_path_factory):
    """The run in one process, ended in its first task after the checkpoint of step 2."""
    folder = tmp_path_factory.mktemp("begun")
    with pytest.raises(KeyboardInterrupt):
        run(load_recipe(recipe_in(folder, tiny_folder)), display=Stopping("begun", 2, silent()))
    return folder / "run"


def step_events(run: Path) -> list[dict]:
    file = run / "events.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    events = [json.loads(line) for line in lines if line.endswith("\n")]
    return [event for event in events if event["event"] == "step"]


def same_run(found: Path, expected: Path) -> None:
    """Losses to rounding, groups to a tolerance, questions in order, answers and scores."""
    curve, other = step_events(expected), step_events(found)
    assert [(e["stage"], e["step"]) for e in other] == [(s, i) for s in (1, 2) for i in range(1, STEPS + 1)]
    for one, two in zip(curve, other, strict=True):
        for key in ("loss", "next_token", "grad_norm", "learning_rate"):
            assert two[key] == pytest.approx(one[key], rel=2e-5, abs=2e-6), (one["stage"], one["step"], key)
        assert one["grad_norm"] > 0.05
    groups = sorted(expected.glob("stages/*/adapter/adapter_model.safetensors"))
    assert len(groups) == 2
    for file in groups:
        learned, again = load_file(file), load_file(found / file.relative_to(expected))
        assert learned.keys() == again.keys()
        assert any(value.abs().max() > 1e-4 for name, value in learned.items() if "dymoe_B" in name)
        for name, value in learned.items():
            torch.testing.assert_close(
                again[name], value, rtol=1e-3, atol=5e-5, msg=lambda text, name=name: name + text
            )
    answers = sorted(expected.glob("stages/*/predictions/*.jsonl"))
    assert len(answers) == 3
    for file in answers:
        assert (found / file.relative_to(expected)).read_bytes() == file.read_bytes()
    one, two = (json.loads((folder / "results.json").read_text()) for folder in (expected, found))
    for key in ("matrix", "lenient_matrix", "steps", "samples", "trainable_parameters", "stored_parameters"):
        assert one[key] == two[key], key


@needs_fork
def test_a_process_that_dies_is_told_and_one_process_goes_on(alone, tiny_folder, tmp_path, monkeypatch, capfd):
    recipe, folder = recipe_in(tmp_path, tiny_folder), tmp_path / "run"
    plain = StageTrainer.training_step

    def dying(trainer, *given, **options):
        if os.environ.get("RANK") == "1" and trainer.group == "VQAv2" and trainer.state.global_step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(trainer, *given, **options)

    monkeypatch.setattr(StageTrainer, "training_step", dying)
    assert forked(2, main, ["run", str(recipe)]) == [1, -signal.SIGKILL]
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("dymoe: process")]
    assert line.startswith("dymoe: process 0 of 2 lost another one: ")
    assert "Go on, with any number of processes, with: accelerate launch" in line
    assert line.endswith(f"-m dymoe run {recipe} --resume")
    assert not (folder / "stages" / "02-VQAv2" / "done.json").exists()
    assert main(["run", str(recipe), "--resume"]) == 0
    assert json.loads((folder / "results.json").read_text())["resumed_at"][1] >= 2
    same_run(folder, alone)


def told_to_end():
    """Process 0 waits for the other and is ended meanwhile, as the launcher does."""
    with together("dymoe run x.yaml --resume"):
        processes = join()
        waiting, _ = processes.gather(os.getpid())
        if processes.rank == 1:
            time.sleep(1)
            os.kill(waiting, signal.SIGTERM)
            time.sleep(2)
            os._exit(0)
        processes.gather("what never comes")


@needs_fork
def test_a_process_that_waits_for_another_ends_when_it_is_told_to(capfd):
    assert forked(2, told_to_end) == [128 + signal.SIGTERM, 0]
    told = capfd.readouterr().err
    assert "dymoe: process 0 of 2 was told to end, since another one did: " in told
    assert "with: dymoe run x.yaml --resume" in told


@pytest.mark.slow
def test_launched_a_process_that_dies_ends_the_run_and_one_process_goes_on(alone, tiny_folder, tmp_path):
    recipe, folder = recipe_in(tmp_path, tiny_folder), tmp_path / "run"
    launcher = launch("ddp", "run", str(recipe))
    wait_until(lambda: any(e["stage"] == 2 and e["step"] >= 3 for e in step_events(folder)), launcher)
    process_of(launcher, 1).send_signal(signal.SIGKILL)
    told, _ = launcher.communicate(timeout=120)
    assert launcher.returncode != 0
    lines = [line for line in told.splitlines() if line.startswith("dymoe: process 0 of 2")]
    assert len(lines) == 1
    assert "Go on, with any number of processes, with: accelerate launch" in lines[0]
    assert lines[0].endswith(f"-m dymoe run {recipe} --resume")
    assert not (folder / "stages" / "02-VQAv2" / "done.json").exists()
    assert main(["run", str(recipe), "--resume"]) == 0
    assert json.loads((folder / "results.json").read_text())["resumed_at"][1] >= 2
    same_run(folder, alone)


@needs_fork
@pytest.mark.parametrize(
    "config", ["fsdp2", pytest.param("zero2", marks=pytest.mark.slow), pytest.param("zero3", marks=pytest.mark.slow)]
)
def test_two_processes_learn_what_one_learns(config, alone, tiny_folder, tmp_path):
    deepspeed_or_skip(config)
    recipe = recipe_in(tmp_path, tiny_folder)
    assert forked(2, main, ["run", str(recipe)], config=config) == [0, 0]
    same_run(tmp_path / "run", alone)


@needs_fork
@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp", "fsdp2", "zero2", "zero3"])
def test_three_processes_go_on_where_one_ended(config, begun, alone, tiny_folder, tmp_path):
    deepspeed_or_skip(config)
    recipe, folder = recipe_in(tmp_path, tiny_folder), tmp_path / "run"
    shutil.copytree(begun, folder)
    assert forked(3, main, ["run", str(recipe), "--resume"], config=config) == [0, 0, 0]
    assert json.loads((folder / "results.json").read_text())["resumed_at"] == [2, 0]
    same_run(folder, alone)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp", "fsdp2", "zero2", "zero3"])
def test_launched_it_goes_on_from_one_process_dies_and_goes_on_in_one(config, begun, alone, tiny_folder, tmp_path):
    deepspeed_or_skip(config)
    recipe, folder = recipe_in(tmp_path, tiny_folder), tmp_path / "run"
    shutil.copytree(begun, folder)
    launcher = launch(config, "run", str(recipe), "--resume")
    wait_until(lambda: any(e["stage"] == 2 and e["step"] >= 3 for e in step_events(folder)), launcher)
    first_stage = json.loads((folder / "stages" / "01-ImageNet" / "done.json").read_text())
    assert first_stage["resumed_at"] == 2
    process_of(launcher, 0).send_signal(signal.SIGKILL)
    told, _ = launcher.communicate(timeout=120)
    assert launcher.returncode != 0
    assert re.search(r"dymoe: process 1 of 2 .*--resume", told)
    assert main(["run", str(recipe), "--resume"]) == 0
    assert json.loads((folder / "results.json").read_text())["resumed_at"][1] >= 2
    same_run(folder, alone)


@pytest.mark.slow
def test_three_processes_go_on_where_two_died(alone, tiny_folder, tmp_path):
    recipe, folder = recipe_in(tmp_path, tiny_folder), tmp_path / "run"
    launcher = launch("fsdp2", "run", str(recipe))
    wait_until(lambda: any(e["stage"] == 2 and e["step"] >= 3 for e in step_events(folder)), launcher)
    process_of(launcher, 1).send_signal(signal.SIGKILL)
    launcher.communicate(timeout=120)
    again = launch("ddp", "run", str(recipe), "--resume", count=3)
    told, _ = again.communicate(timeout=300)
    assert again.returncode == 0, told
    assert json.loads((folder / "results.json").read_text())["resumed_at"][1] >= 2
    same_run(folder, alone)


@pytest.mark.slow
def test_the_slurm_job_starts_one_launcher_a_node(alone, tiny_folder, tmp_path):
    """The job's script with two nodes that are this machine."""
    recipe, tools = recipe_in(tmp_path, tiny_folder), tmp_path / "bin"
    tools.mkdir()
    srun = """#!/bin/bash
[ "$1" = --kill-on-bad-exit=1 ] || exit 9
shift
SLURM_NODEID=1 "$@" & other=$!
SLURM_NODEID=0 "$@" || exit 1
wait $other"""
    for name, text in {"srun": srun, "scontrol": "#!/bin/bash\nprintf '127.0.0.1\\nsecond\\n'"}.items():
        (tools / name).write_text(text + "\n")
        (tools / name).chmod(0o755)
    told = {"SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "1", "SLURM_JOB_NODELIST": "here,there"}
    job = subprocess.run(
        ["bash", str(CONFIGS / "several-nodes.sbatch"), str(CONFIGS / "ddp.yaml"), str(recipe), "--seed", "0"],
        env={
            **os.environ,
            **told,
            "SLURM_JOB_ID": str(os.getpid()),
            "PATH": os.pathsep.join([str(tools), str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]),
            "CUDA_VISIBLE_DEVICES": "",
        },
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert job.returncode == 0, job.stderr
    assert "2 processes, ddp" in job.stderr
    same_run(tmp_path / "run", alone)


@needs_fork
@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp", "fsdp2", "zero2", "zero3"])
def test_bfloat16_and_recomputed_activations(config, tiny_folder, tmp_path):
    deepspeed_or_skip(config)
    changes = {"dtype": "bfloat16", "gradient_checkpointing": True}
    folders = [tmp_path / name for name in ("one", "many")]
    recipes = []
    for folder in folders:
        folder.mkdir()
        path = recipe_in(folder, tiny_folder)
        words = [f"--training.{key}={value}" for key, value in changes.items()]
        recipes.append(["run", str(path), *words])
    assert main(recipes[0]) == 0
    assert forked(2, main, recipes[1], config=config) == [0, 0]
    curves = [step_events(folder / "run") for folder in folders]
    for one, two in zip(*curves, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=2e-3)
    for file in folders[1].glob("run/stages/*/adapter/*.safetensors"):
        assert {value.dtype for value in load_file(file).values()} == {torch.float32}


@dataclass
class Uneven(LoRA):
    """Begins otherwise in every process, as a method would that draws from another seed in each."""

    name: ClassVar[str] = "uneven"

    def before_task(self, model, stage, data):
        with torch.no_grad():
            model.base_model.layers()[0].dymoe_A[self.group(stage)] += 0.01 * join().rank


@needs_fork
def test_a_group_that_begins_otherwise_in_a_process_is_noticed(tiny_folder, tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(methods._METHODS, "uneven", Uneven)
    recipe = with_defaults(recipe_in(tmp_path, tiny_folder, method="uneven"))
    assert forked(2, main, ["run", str(recipe)]) == [2, 2]
    told = capfd.readouterr().err
    group = "the beginning of expert group 'shared' is not the same in all processes: [1] differ from process 0"
    for rank in (0, 1):
        assert f"dymoe: process {rank} of 2: {group}" in told
    assert not step_events(tmp_path / "run")


def test_groups_of_one_seed_begin_alike(tiny_folder):
    def begin(seed):
        torch.manual_seed(seed)
        config = methods.create("dymoe", num_experts=2, rank=2).config(None)
        return group_hash(train_group(load(str(tiny_folder), "float32").model, None, "new", config), "new")

    assert begin(11) == begin(11) != begin(12)


@needs_fork
@pytest.mark.parametrize(
    ("config", "method", "message"),
    [
        ("fsdp2", "olora", "its loss reads whole parameters, which FSDP2 cuts into parts"),
        pytest.param("zero3", "ewc", "its loss reads whole parameters, which DeepSpeed", marks=pytest.mark.slow),
        pytest.param("zero2", "same", "it changes gradients before a step", marks=pytest.mark.slow),
    ],
)
def test_what_does_not_go_with_parts_is_refused(config, method, message, tiny_folder, tmp_path, capfd):
    deepspeed_or_skip(config)
    recipe = with_defaults(recipe_in(tmp_path, tiny_folder, method=method))
    assert forked(2, main, ["run", str(recipe)], config=config) == [2, 2]
    assert f"method {method}: {message}" in capfd.readouterr().err
