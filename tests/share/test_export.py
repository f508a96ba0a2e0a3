"""Results leave the house: logits of what was exported, in plain PEFT and plain transformers, are the run's own."""

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

import dymoe
from dymoe.adapter import DyMoEConfig
from dymoe.adapter.gates import GATES, Uniform
from dymoe.cli import main
from dymoe.errors import DymoeError
from dymoe.learning.groups import read_saved, save_group
from dymoe.models import load
from dymoe.models.llava import image_backend
from dymoe.share import export as module
from dymoe.share.export import export, merge, write_lora
from dymoe.share.stages import SavedGroup, SavedStage
from tests.adapter.conftest import padded_batch, randomise, tiny_llama
from tests.learning.tiny import write_recipe
from tests.models.families import FAMILIES

ROOT = Path(__file__).resolve().parents[2]
FILES = {"adapter_config.json", "adapter_model.safetensors"}
# One picture of 64 x 64 pixels, 4 image tokens (id 3) before the words.
PICTURE = torch.linspace(-1, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)
INPUTS = {"input_ids": torch.tensor([[3] * 4 + list(range(5, 15))]), "pixel_values": PICTURE}
TOLERANCE = {"atol": 2e-5, "rtol": 1e-5}  # sums of float32 in another order
TRAINING = {"steps_per_task": 2, "batch_size": 2, "limit": 4, "lr": 0.02, "warmup": 0.0}
SETTINGS = {
    "lora": {"rank": 4},
    "inclora": {"rank": 4},
    "olora": {"rank": 4},
    "ewc": {"rank": 4, "samples": 2},
    "lwf": {"rank": 4},
    "sefe": {"rank": 4},
    "proglora": {"rank": 4},
    "dymoe": {"num_experts": 4, "rank": 2, "top_k": 4},
}


@pytest.fixture(scope="module")
def learned(tiny_folder, tmp_path_factory):
    """Runs of two tasks by method, each learned once."""
    runs: dict = {}

    def get(method: str, *plugins: str) -> Path:
        if (method, *plugins) not in runs:
            path = tmp_path_factory.mktemp(method) / "run"
            changes = {"method": method, "with": list(plugins), "training": TRAINING, "evaluation": {"limit": 2}}
            recipe = write_recipe(path.with_suffix(".yaml"), tiny_folder, **changes)
            values = yaml.safe_load(recipe.read_text())
            recipe.write_text(yaml.safe_dump({**values, "settings": {"lora_dropout": 0.0, **SETTINGS[method]}}))
            assert main(["run", str(recipe)]) == 0
            runs[method, *plugins] = path
        return runs[method, *plugins]

    return get


def logits(model, inputs=INPUTS) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**inputs).logits


def base(tiny_folder):
    return load(str(tiny_folder), "float32").model


def ours(run, tiny_folder, stage) -> torch.Tensor:
    return logits(dymoe.load_stage(run, base(tiny_folder), stage))


@pytest.mark.parametrize("method", ["lora", "inclora", "olora", "ewc", "lwf", "sefe"])
def test_plain_peft_gives_the_logits_of_the_run(learned, tiny_folder, tmp_path, method):
    run = learned(method)
    for stage in (1, 2):
        target = tmp_path / str(stage)
        assert main(["export", str(run), "--stage", str(stage), "--as", "lora", "--output", str(target)]) == 0
        assert {file.name for file in target.iterdir()} == FILES
        assert {oct(file.stat().st_mode)[-3:] for file in target.iterdir()} == {"644"}
        plain = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(tiny_folder), str(target))
        assert plain.peft_config["default"].peft_type == "LORA"
        expected = ours(run, tiny_folder, stage)
        torch.testing.assert_close(logits(plain), expected, **TOLERANCE)
        assert (expected - logits(base(tiny_folder))).abs().max() > 100 * TOLERANCE["atol"]


def test_the_command_says_where_it_wrote_and_keeps_the_run_whole(learned, tiny_folder, capsys):
    run = learned("inclora")
    capsys.readouterr()
    assert main(["export", str(run), "--stage", "1"]) == 0
    assert f"stage 01-ImageNet: {run / 'exports' / '01-ImageNet-lora'}" in capsys.readouterr().out
    assert main(["run", str(run.with_suffix(".yaml")), "--resume"]) == 0
    assert main(["export", str(run), "--stage", "1"]) == 2
    assert "is there already" in capsys.readouterr().err


def test_a_shared_result_is_exported_as_the_run_is(learned, tiny_folder, tmp_path, capsys):
    run, shared = learned("inclora"), tmp_path / "shared"
    assert main(["push", str(run), f"file:{shared}"]) == 0
    export(run, output=tmp_path / "one")
    export(shared, output=tmp_path / "other")
    for name in FILES:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()
    assert main(["export", str(shared)]) == 2
    assert "--output is missing" in capsys.readouterr().err
    with pytest.raises(DymoeError, match=r"its base model 'model' was a folder elsewhere; give --model"):
        export(shared, "merged", output=tmp_path / "merged")
    export(shared, "merged", 2, tmp_path / "merged", model=str(tiny_folder))
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(model), ours(run, tiny_folder, 2), **TOLERANCE)


def test_a_merged_folder_is_a_model_of_transformers(learned, tiny_folder, tmp_path):
    run, target = learned("sefe"), tmp_path / "merged"
    assert main(["export", str(run), "--as", "merged", "--output", str(target)]) == 0
    model, processor = AutoModelForImageTextToText.from_pretrained(target), AutoProcessor.from_pretrained(target)
    torch.testing.assert_close(logits(model), ours(run, tiny_folder, 2), **TOLERANCE)
    assert processor.tokenizer("What is it?") == AutoProcessor.from_pretrained(tiny_folder).tokenizer("What is it?")
    facts = json.loads((target / "manifest.json").read_text())
    assert facts["stage"] == "02-VQAv2"
    assert facts["groups"] == ["ImageNet", "VQAv2"]
    torch.testing.assert_close(logits(load(str(target), "float32").model), logits(model))


def test_merging_rounds_once_from_float32(learned, tiny_folder, tmp_path):
    run = learned("lora")
    for dtype in ("float32", "bfloat16"):
        export(run, "merged", output=tmp_path / dtype, dtype=dtype)
    wide, narrow = (load_file(tmp_path / dtype / "model.safetensors") for dtype in ("float32", "bfloat16"))
    name = next(name for name in wide if name.endswith("q_proj.weight"))
    (lora,) = (group for group in [read_saved("shared", run / "stages" / "02-VQAv2" / "adapter")])
    layer = f"base_model.model.{name.removesuffix('.weight')}"
    delta = lora[0].scaling * lora[1][f"{layer}.dymoe_B"][0].T @ lora[1][f"{layer}.dymoe_A"][0]
    before = load_file(tiny_folder / "model.safetensors")[name]
    torch.testing.assert_close(wide[name], before + delta)
    torch.testing.assert_close(narrow[name], (before.bfloat16() + delta).bfloat16(), atol=0, rtol=2**-8)


@pytest.mark.parametrize("family", ["llava", "llava-phi3"])
def test_other_models_are_merged_and_scale_pictures_as_they_did(tmp_path, monkeypatch, family):
    folder = tmp_path / "base"
    next(one for one in FAMILIES if one.name == family).save(folder)
    (folder / "manifest.json").write_text(json.dumps({"image_backend": "pil"}))  # as dymoe assemble writes
    config = DyMoEConfig(num_experts=2, r=3, lora_alpha=9.0, gate="uniform", lora_dropout=0.0)
    model = get_peft_model(load(str(folder), "float32").model, config, adapter_name="birds")
    randomise(model)
    save_group(model, "birds", tmp_path / "birds")
    group = SavedGroup("birds", "here", *read_saved("birds", tmp_path / "birds"))
    saved = SavedStage("here", "01-birds", (group,), {"model": str(folder), "training": {"dtype": "float32"}}, None)
    monkeypatch.setattr(module, "read_stage", lambda source, stage: saved)
    export("here", "merged", output=tmp_path / "merged", model=str(folder))
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    assert type(merged).__name__ == "LlavaForConditionalGeneration"
    image = merged.config.image_token_id
    inputs = {"input_ids": torch.tensor([[image] * 4 + [50, 51, 52]]), "pixel_values": PICTURE[..., :28, :28]}
    torch.testing.assert_close(logits(merged, inputs), logits(model, inputs), **TOLERANCE)
    assert (logits(model, inputs) - logits(load(str(folder), "float32").model, inputs)).abs().max() > 1e-2
    assert image_backend(tmp_path / "merged") == "pil"


# ---- any bank of weight 1 ---------------------------------------------------------------------------------------

BANKS = {
    "equal": [{"num_experts": 1, "r": 3, "lora_alpha": 6.0}] * 2,
    "ranks, scales and numbers of experts": [
        {"num_experts": 3, "r": 2, "lora_alpha": 5.0},
        {"num_experts": 1, "r": 4, "lora_alpha": 9.0},
        {"num_experts": 2, "r": 1, "lora_alpha": 0.5},
    ],
    "layers apart": [
        {"num_experts": 2, "r": 2, "expert_pattern": {"q_proj": 5, "k_proj": 0}},
        {"num_experts": 3, "r": 1, "target_modules": ["q_proj", "v_proj"]},
    ],
}


def saved_bank(folder, settings, gate="uniform"):
    """A tiny language model with these groups, no weight by the token, and the groups as they lie on disk."""
    model, groups = None, []
    for number, values in enumerate(settings):
        config = DyMoEConfig(**{"target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"], **values}, gate=gate)
        name = f"group{number}"
        if model is None:
            model = get_peft_model(tiny_llama(), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    randomise(model)
    model.base_model.set_training_group(None)
    for number in range(len(settings)):
        save_group(model, f"group{number}", folder / f"group{number}")
        groups.append(SavedGroup(f"group{number}", "here", *read_saved(f"group{number}", folder / f"group{number}")))
    return model, groups


@pytest.mark.parametrize("case", BANKS)
def test_experts_of_all_kinds_lie_side_by_side(tmp_path, case):
    model, groups = saved_bank(tmp_path, BANKS[case])
    (tmp_path / "lora").mkdir()
    write_lora(tmp_path / "lora", groups, "owner/name")
    plain = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "lora"))
    expected, batch = logits(model, padded_batch()), padded_batch()
    torch.testing.assert_close(logits(plain, batch), expected, **TOLERANCE)
    assert (expected - logits(tiny_llama(), batch)).abs().max() > 100 * TOLERANCE["atol"]
    merged = tiny_llama()
    merge(merged, module.factors(groups), "here")
    torch.testing.assert_close(logits(merged, batch), expected, **TOLERANCE)
    config = PeftConfig.from_pretrained(str(tmp_path / "lora"))
    assert isinstance(config, LoraConfig)
    assert config.base_model_name_or_path == "owner/name"
    ranks = {
        layer.name: sum(layer.experts_of(g) * c.r for g, c in layer.group_configs.items())
        for layer in model.base_model.layers()
    }
    stated = {layer: config.rank_pattern.get(layer, config.r) for layer in config.target_modules}
    assert stated == {layer: rank for layer, rank in ranks.items() if rank}
    assert bool(config.rank_pattern) == (case == "layers apart")
    text = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert text["target_modules"] == sorted(text["target_modules"])  # not a set's order, another one each time


def test_a_gate_from_outside_that_routes_nothing_gives_its_own_weights(tmp_path):
    class Mean(Uniform):
        """Every expert counts as one of all."""

        name = "mean"

        def decide(self, x, old, new, setting):
            decision = super().decide(x, old, new, setting)
            return decision._replace(weights=tuple(side / sum(setting.sizes) for side in decision.weights))

    try:
        model, groups = saved_bank(tmp_path, BANKS["ranks, scales and numbers of experts"], gate="mean")
        merged = tiny_llama()
        merge(merged, module.factors(groups), "here")
        torch.testing.assert_close(logits(merged, padded_batch()), logits(model, padded_batch()), **TOLERANCE)
    finally:
        GATES.pop("mean")


# ---- groups weighed for a sample --------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [("proglora",), ("inclora", "task-router"), ("sefe", "task-router")])
def test_the_reference_script_answers_as_the_run(learned, tiny_folder, tmp_path, case):
    run, target = learned(*case), tmp_path / "groups"
    assert main(["export", str(run), "--as", "groups", "--output", str(target)]) == 0
    names = {"groups.json", "selector.safetensors", "01-ImageNet", "02-VQAv2"}
    assert {file.name for file in target.iterdir()} == names
    script = runpy.run_path(str(ROOT / "examples" / "groups.py"))
    groups = script["Groups"](target, AutoModelForImageTextToText.from_pretrained(tiny_folder))
    model = dymoe.load_stage(run, base(tiny_folder))
    chosen = set()
    for shift in range(6):
        inputs = {"input_ids": INPUTS["input_ids"].clone(), "pixel_values": PICTURE * (1 - shift / 3)}
        inputs["input_ids"][:, 4:] += 7 * shift
        expected = logits(model, inputs)
        _, weights = model.base_model.trace.context.selection
        assert groups.weights(inputs) == pytest.approx(weights[0].tolist(), abs=1e-5)
        groups.activate(groups.weights(inputs))
        chosen.add(tuple(weights[0].tolist()))
        torch.testing.assert_close(logits(groups.model, inputs), expected, **TOLERANCE)
    assert len(chosen) > 1, "prompts that are weighed alike show nothing"


def test_the_reference_script_prints_an_answer(learned, tiny_folder, tmp_path):
    target = tmp_path / "groups"
    export(learned("proglora"), "groups", output=target)
    script = [sys.executable, str(ROOT / "examples" / "groups.py"), str(target), str(tiny_folder), "What is it?"]
    done = subprocess.run(script, capture_output=True, text=True, check=True)
    assert [line.split()[0] for line in done.stderr.splitlines() if line[:2].isdigit()] == ["01-ImageNet", "02-VQAv2"]
    assert done.stdout.count("\n") == 1


# ---- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case, form, message",
    [
        (("dymoe",), "lora", r"--as lora: every token has weights of its own .*\(gate cosine\).*examples/serve\.py"),
        (("dymoe",), "merged", r"every token has weights of its own"),
        (("dymoe",), "groups", r"every token has weights of its own"),
        (("proglora",), "lora", r"the selector keys weighs the groups for each sample.*--as groups"),
        (("sefe", "task-router"), "merged", r"the selector prototypes weighs the groups for each sample"),
        (("inclora",), "groups", r"nothing weighs them; give --as lora"),
        (("inclora",), "onnx", r"--as: expected one of lora, merged, groups, got 'onnx'"),
    ],
)
def test_a_form_that_would_say_something_else_is_refused(learned, tmp_path, capsys, case, form, message):
    run, target = learned(*case), tmp_path / "out"
    with pytest.raises(DymoeError, match=message):
        export(run, form, output=target)
    capsys.readouterr()
    assert main(["export", str(run), "--as", form, "--output", str(target)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_merging_in_place_says_which_way_leads_out():
    ways = {
        "token": (DyMoEConfig(num_experts=2, r=2, top_k=2), r"depend on the token.*examples/serve\.py"),
        "nothing": (DyMoEConfig(num_experts=1, r=2, gate="uniform"), r"dymoe export RUN --as merged"),
        "sample": (DyMoEConfig(num_experts=1, r=2, gate="uniform", selector="keys"), r"dymoe export RUN --as groups"),
    }
    for depends, (config, message) in ways.items():
        assert config.weights_depend_on == depends
        model = get_peft_model(tiny_llama(), config, adapter_name="a")
        for call in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(NotImplementedError, match=message):
                call()


def test_what_is_not_there_or_was_changed_is_refused(learned, tiny_folder, tmp_path):
    run = Path(shutil.copytree(learned("inclora"), tmp_path / "run"))
    with pytest.raises(DymoeError, match="--stage 3: stages 1 to 2 are finished"):
        export(run, stage=3, output=tmp_path / "out")
    with pytest.raises(DymoeError, match="is not what the run learned on"):
        export(run, "merged", output=tmp_path / "out", model=str(other_model(tiny_folder, tmp_path / "other")))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(DymoeError, match="is there already; give --output"):
        export(run, output=tmp_path / "full")
    weights = run / "stages" / "01-ImageNet" / "adapter" / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, weights, metadata={"format": "pt"})
    with pytest.raises(DymoeError, match="'ImageNet' is not the one saved"):
        export(run, output=tmp_path / "out")
    (run / "manifest.json").write_text("{}")  # what has one is a shared result, whatever else lies there
    with pytest.raises(DymoeError, match=r"manifest\.json: format: is missing"):
        export(run, output=tmp_path / "out")
    with pytest.raises(DymoeError, match=r"no such folder|no manifest\.json"):
        export(tmp_path / "nowhere", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def other_model(tiny_folder, folder):
    """The tiny model with one weight changed."""
    shutil.copytree(tiny_folder, folder)
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("q_proj.weight"))
    save_file({**tensors, name: tensors[name] + 1}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_layers_that_a_base_lacks_or_shares_are_refused(tmp_path):
    _, groups = saved_bank(tmp_path, BANKS["equal"])
    pairs = module.factors(groups)
    layer, pair = next(iter(pairs.items()))
    with pytest.raises(DymoeError, match=r"here: the base model has no linear model\.layers\.9"):
        merge(tiny_llama(), {"model.layers.9.q_proj": pair}, "here")
    with pytest.raises(DymoeError, match=r"no linear .* of 47 to 32 features"):
        merge(tiny_llama(), {layer: pair._replace(a=pair.a[:, 1:])}, "here")
    tied = tiny_llama(tie_word_embeddings=True)
    head = pair._replace(a=torch.ones(1, 32), b=torch.ones(60, 1))
    with pytest.raises(DymoeError, match="lm_head shares its weight with the embedding"):
        merge(tied, {"lm_head": head}, "here")
    with pytest.raises(DymoeError, match=r"is not finite in torch\.float16"):
        merge(tiny_llama().half(), {layer: pair._replace(b=pair.b + 1e6, a=pair.a + 1.0)}, "here")


def test_nothing_half_written_stays(learned, tmp_path, monkeypatch):
    target = tmp_path / "out"
    write = module.save_file

    def full_disk(tensors, file, **options):
        write(tensors, file, **options)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_file", full_disk)
    for case, form in ((("inclora",), "lora"), (("proglora",), "groups")):
        with pytest.raises(DymoeError, match=r"out: cannot be written \(No space left on device\)"):
            export(learned(*case), form, output=target)
    monkeypatch.setattr(
        module,
        "save_file",
        lambda tensors, file, **options: write({name: tensor * 2 for name, tensor in tensors.items()}, file, **options),
    )
    with pytest.raises(DymoeError, match="is not as it was written"):
        export(learned("inclora"), output=target)
    assert list(tmp_path.iterdir()) == []
