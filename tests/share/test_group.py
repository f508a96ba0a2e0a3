"""What is taken of a shared group: the tensors of that group and a plain config; all else is one line, nothing changed.

The sender is one who makes every hash anew, so that only the content tells.
"""

import hashlib
import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

import dymoe
from dymoe.adapter import DyMoEConfig, DyMoELayer, group_hash, tensors_hash
from dymoe.adapter.selectors import SELECTORS
from dymoe.cli import main
from dymoe.errors import DymoeError
from dymoe.learning.groups import add_group, save_group, train_group
from dymoe.share.group import layers_of, plain_config, read_group
from dymoe.share.loading import load_stage
from dymoe.share.manifest import MANIFEST, TEXTS, Group, Manifest, file_of
from dymoe.share.pull import pull
from tests.adapter.conftest import tiny_llama

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NAMES = ("birds", "signs")
LAYER = "base_model.model.model.layers.0.self_attn.q_proj"


def model_of(**settings):
    """Two groups on a tiny model, with tensors that are not 0."""
    config = {"num_experts": 2, "r": 2, "top_k": 2, **settings}
    model = None
    for number, name in enumerate(NAMES):
        model = train_group(tiny_llama() if model is None else model, model, name, DyMoEConfig(**config))
        torch.manual_seed(number)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter.data)
    return model


def share(model, folder: Path) -> Path:
    """The folder that a push of these groups writes, with texts that say nothing."""
    layers = set()
    for number, name in enumerate(NAMES, start=1):
        save_group(model, name, folder / "groups" / f"{number:02d}-{name}")
        layers |= layers_of(load_file(folder / f"groups/{number:02d}-{name}" / WEIGHTS))
    for file in folder.rglob(CONFIG):
        file.write_text(json.dumps(plain_config(json.loads(file.read_text()), layers, None, file)))
    for name in TEXTS:
        (folder / name).write_text("")
    return seal(folder)


def seal(folder: Path) -> Path:
    """Write a manifest of what lies there, every hash made anew."""
    groups = []
    for number, name in enumerate(NAMES, start=1):
        place = f"groups/{number:02d}-{name}"
        try:
            made = tensors_hash(sorted(load_file(folder / place / WEIGHTS).items()))
        except Exception:
            made = "0" * 64
        groups.append(Group(name, place, made))
    files = {name: file_of(folder / name) for name in TEXTS}
    files |= {
        f"{one.folder}/{part}": file_of(folder / one.folder / part) for one in groups for part in (CONFIG, WEIGHTS)
    }
    stages = tuple((name, tuple(groups[:number])) for number, name in enumerate(NAMES, start=1))
    (folder / MANIFEST).write_text(json.dumps(Manifest("", stages, files).to_json()))
    return folder


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return share(model_of(), tmp_path_factory.mktemp("shared"))


@pytest.fixture
def copy(shared, tmp_path):
    return Path(shutil.copytree(shared, tmp_path / "copy"))


def state(model) -> tuple:
    """All that a caller could notice of a model: weights, layers, what trains, modes, hooks."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
    modules = [
        (name, type(module), module.training, list(module._forward_hooks), list(module._forward_pre_hooks))
        for name, module in model.named_modules()
    ]
    return digest.hexdigest(), modules, [parameter.requires_grad for parameter in model.parameters()]


def refused(folder: Path, capsys, message: str) -> None:
    """Neither pulled nor loaded; one line says why, and the model is as it was."""
    seal(folder)
    before = sorted(folder.parent.rglob("*"))
    capsys.readouterr()
    assert main(["pull", str(folder), str(folder.parent / "pulled")]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert len(told) < 1000
    assert message in told
    base = tiny_llama()
    was = state(base)
    with pytest.raises(DymoeError) as error:
        load_stage(folder, base)
    assert message in str(error.value)
    assert len(str(error.value)) < 1000
    assert state(base) == was
    assert sorted(folder.parent.rglob("*")) == before


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gate": "linear", "guidance": "none"},
        {"gate": "uniform", "guidance": "none", "num_experts": 1},
        {"target_modules": r".*\.1\.(.*)_proj", "exclude_modules": r".*o_proj", "expert_pattern": {r".*q_proj": 0}},
        {"target_modules": ["q_proj", "up_proj"], "expert_pattern": {"model.layers.1.self_attn.q_proj": 3}},
        *({"gate": "uniform", "guidance": "none", "selector": selector} for selector in SELECTORS),
        {"selector": "vae", "selector_options": {"hidden": 5, "latent": 3}},
    ],
)  # fmt: skip
def test_every_kind_of_group_is_taken_as_it_was(settings, tmp_path):
    model = model_of(**settings)
    folder = share(model, tmp_path / "shared")
    pull(folder, tmp_path / "pulled")
    base = tiny_llama()
    loaded = load_stage(tmp_path / "pulled", base)
    assert {name: group_hash(loaded, name) for name in NAMES} == {name: group_hash(model, name) for name in NAMES}
    tokens = torch.arange(5, 25).reshape(2, 10)
    if settings.get("selector") not in ("vae", "prototypes"):  # these choose only after a fit
        with torch.no_grad():
            assert torch.equal(loaded(tokens).logits, model.eval()(tokens).logits)
    for file in (tmp_path / "pulled").rglob(CONFIG):
        values = json.loads(file.read_text())
        assert all(name.replace("_", "").replace(".", "").isalnum() for name in values["target_modules"])


def other_tensors(change):
    def edit(folder):
        file = folder / "groups/02-signs" / WEIGHTS
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)

    return edit


NAN = torch.tensor([[[1.0] * 32, [float("nan")] * 32]] * 2)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.update({"base_model.model.model.embed_tokens.weight": torch.zeros(60, 32)}), "embed_tokens.we"),
        (lambda t: t.update({"base_model.model.lm_head.weight": torch.zeros(60, 32)}), "no part of an expert group"),
        (lambda t: t.update({f"{LAYER}.base_layer.weight": torch.zeros(32, 32)}), "no part of an expert group"),
        (lambda t: t.update({f"{LAYER}.lora_A": torch.zeros(2, 2, 32)}), "no part of an expert group"),
        (lambda t: t.update({f"{LAYER}.dymoe_A.birds": torch.zeros(2, 2, 32)}), "no part of an expert group"),
        (lambda t: t.update({"weight": torch.zeros(1)}), "no part of an expert group"),
        (lambda t: t.update({"\x1b[31m" + "x" * 10_000: torch.zeros(1)}), "no part of an expert group"),
        (lambda t: t.update({f"{LAYER}{'.x' * 10_000}.dymoe_A": torch.zeros(2, 2, 32)}), "no place for"),
        (lambda t: t.update({"base_model.model.lm_head.dymoe_A": torch.zeros(2, 2, 32)}), "lm_head.dymoe_A"),
        (lambda t: t.update({"base_model.model.dymoe_selector.dymoe_key": torch.zeros(32)}), "dymoe_selector"),
        (lambda t: t.pop(f"{LAYER}.dymoe_A"), f"lacks 1 of 42 tensors: {LAYER}.dymoe_A"),
        (lambda t: t.pop(f"{LAYER}.dymoe_router"), "lacks 1 of 42 tensors"),
        (lambda t: t.clear(), "lacks 42 of 42 tensors"),
        (lambda t: t.update({f"{LAYER}.dymoe_A": torch.zeros(2, 32, 2)}), "of shape (2, 32, 2)"),
        (lambda t: t.update({f"{LAYER}.dymoe_A": torch.zeros(4, 2, 32)}), "of shape (4, 2, 32)"),
        (lambda t: t.update({f"{LAYER}.dymoe_A": torch.zeros(2, 2, 0)}), "of shape (2, 2, 0)"),
        (lambda t: t.update({f"{LAYER}.dymoe_A": torch.zeros(())}), "of shape ()"),
        (lambda t: t.update({f"{LAYER}.dymoe_router": torch.zeros(2, 31)}), "of shape (2, 31)"),
        (lambda t: t.update({f"{LAYER}.dymoe_router": torch.zeros(3, 32)}), "of shape (3, 32)"),
        (lambda t: t.update({f"{LAYER}.dymoe_A": NAN.clone()}), "not finite"),
        (lambda t: t[f"{LAYER}.dymoe_B"].view(-1)[:1].fill_(float("inf")), "not finite"),
        *(
            (lambda t, kind=kind: t.update({f"{LAYER}.dymoe_A": torch.ones(2, 2, 32).to(kind)}), f"as {kind}")
            for kind in (torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool, torch.float8_e4m3fn)
        ),
    ],
)  # fmt: skip
def test_other_tensors_than_the_group_s_are_refused(copy, capsys, change, message):
    other_tensors(change)(copy)
    refused(copy, capsys, message)


@pytest.mark.parametrize(
    "change, message",
    [
        *(({key: value}, key) for key, values in {
            "num_experts": (10**6, 1025, 0, -1, 10**40, 2.0, "2", True, None, [2]),
            "r": (10**9, 0, "4", 1.5),
            "top_k": (0, 10**12, "all"),
            "lora_alpha": (0, -1, 1e300, 10**400, "128", None),
            "temperature": (0, 1e-320, "0.01"),
            "lora_dropout": (1, 2, -0.1),
            "gate": ("softmax", None, ["cosine"]),
            "guidance": ("x" * 10_000,),
            "compute": ("cuda", 1),
            "selector": ("evil", None, ["none"]),
            "target_modules": (r"(a+)+b", r"(.*)*(.*)*x", ".*", None, [], ["q_proj", "(a+)+$"], ["q_proj", 1],
                               ["q_proj"] * 2, ["a" * 10_000], ["." * 50], "all-linear", {"q_proj": 1}, ["x\x1b[31m"]),
            "exclude_modules": (r"(a+)+b", ["q_proj"]),
            "expert_pattern": ({r"(a+)+b": 1}, {"q_proj": 1}, {"q_proj": 10**9}, [1], None),
            "revision": ("main", 1),
            "task_type": ("CAUSAL_LM", "evil", 1),
            "inference_mode": ("yes", None, 1),
            "peft_version": (["1"], 1),
            "base_model_name_or_path": ("/etc/passwd", "../x", "a/b/c", "~", "", 1, "x" * 300 + "/y"),
            "auto_mapping": (["transformers.x"], {"parent_library": "os"}, {"parent_library": "transformers.x/../y"},
                             {"parent_library": ["transformers.x"]}, {"parent_library": "transformersx.y"},
                             "transformers.x"),
        }.items() for value in values),
        ({"peft_type": "LORA"}, "peft_type DYMOE"),
        ({"peft_type": ["DYMOE"]}, "peft_type DYMOE"),
        *(({key: value}, f"{key!r} is no key") for key, value in {
            "modules_to_save": ["embed_tokens"], "runtime_config": {}, "layers_to_transform": [0],
            "trainable_token_indices": [1], "custom_modules": {}, "_private": 1, "target_parameters": ["x"],
        }.items()),
        ({"num_experts": 1024, "r": 1024}, "at most 8192 ranks"),
        ({"num_experts": 3}, "of shape"),
        ({"r": 3}, "of shape"),
        ({"gate": "uniform", "guidance": "none"}, "no place for"),
        ({"selector": "keys"}, "lacks 5 of"),
        ({"selector": "keys", "selector_options": {"hidden": 10**12}}, "lacks 5 of"),
        ({"selector": "keys", "selector_options": {"hidden": 10**30}}, "selector_options"),
        ({"selector": "keys", "selector_options": {"hidden": "many"}}, "selector_options"),
        ({"selector": "vae", "selector_options": {"hidden": [1]}}, "selector_options"),
        ({"selector": "prototypes", "selector_options": {"shrinkage": "a"}}, "selector_options"),
        ({"selector": "prototypes", "selector_options": {"tasks": 7}}, "selector_options"),
    ],
)  # fmt: skip
def test_a_config_of_others_is_plain_and_bounded(copy, capsys, change, message):
    file = copy / "groups/02-signs" / CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    refused(copy, capsys, message)


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"peft_type": "DYMOE", "peft_type": "DYMOE"}', "is there twice"),
        ('{"peft_type": "DYMOE", "tau": NaN}', "is no number of JSON"),
        ('{"peft_type": "DYMOE", "lora_alpha": 1e999}', "is no number of JSON"),
        ('{"peft_type": "DYMOE", "selector_options": ' + "[" * 5000 + "]" * 5000 + "}", "nested"),
        ('{"peft_type": "DYMOE", "selector_options": {"a": ' + "[" * 60 + "]" * 60 + "}}", "nested"),
        ('["DYMOE"]', "peft_type DYMOE"),
        ("", "is empty"),
        ("{", "not valid JSON"),
        (" " * (2**20 + 1), "1048577 bytes"),
        ('{"peft_type": "DYMOE"}', "target_modules"),
        ('{"peft_type": "DYMOE", "\x1b[31m": 1}', "not valid JSON"),
        ('{"peft_type": "DYMOE", "\\u001b[31m": 1}', r"'\x1b[31m' is no key"),
    ],
)
def test_a_config_that_is_no_plain_json(copy, capsys, text, message):
    (copy / "groups/02-signs" / CONFIG).write_text(text)
    refused(copy, capsys, message)


@pytest.mark.parametrize(
    "name", ["training", "0", "a.b", "keys", "../x", "x" * 300, "\x1b[31mred", "a\u202eb", "model", ""]
)
def test_names_of_groups_and_stages_are_safe(copy, capsys, name):
    values = json.loads((copy / MANIFEST).read_text())
    for place in (values["stages"][1], values["stages"][1]["groups"][1]):
        before, place["name"] = place["name"], name
        (copy / MANIFEST).write_text(json.dumps(values))
        assert main(["pull", str(copy), str(copy.parent / "pulled")]) == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1
        assert told.isprintable() or told[:-1].isprintable()
        with pytest.raises(DymoeError):
            load_stage(copy, tiny_llama())
        place["name"] = before


def test_two_groups_of_names_that_are_one_file(copy, capsys):
    values = json.loads((copy / MANIFEST).read_text())
    values["stages"][1]["groups"][1]["name"] = "BIRDS"
    (copy / MANIFEST).write_text(json.dumps(values))
    assert main(["pull", str(copy), str(copy.parent / "pulled")]) == 2
    assert "differs from 'birds' by case" in capsys.readouterr().err


@pytest.mark.parametrize(
    "size, value, message",
    [
        ("hidden_size", 64, r"expected \(2, 2, 64\)"),
        ("intermediate_size", 64, r"expected \(2, 2, 64\)"),
        ("num_hidden_layers", 1, "no place for"),
    ],
)
def test_a_model_that_the_groups_do_not_fit_is_left_as_it_was(shared, size, value, message):
    config = tiny_llama().config
    setattr(config, size, value)
    model = LlamaForCausalLM(config)
    model.train()
    model.model.norm.weight.requires_grad_(False)
    was = state(model)
    with pytest.raises(DymoeError, match=message):
        load_stage(shared, model)
    assert state(model) == was


def test_a_second_group_that_does_not_fit_leaves_no_first_one(copy):
    """The first group is right, the second in itself: a linear gate's router that knows other older experts."""
    model = model_of(gate="linear", guidance="none")
    shutil.rmtree(copy / "groups")
    share(model, copy)
    other_tensors(lambda tensors: tensors.update({f"{LAYER}.dymoe_router": torch.zeros(7, 32)}))(copy)
    seal(copy)
    pull(copy, copy.parent / "pulled")
    base = tiny_llama()
    was = state(base)
    with pytest.raises(DymoeError, match=r"dymoe_router of shape \(7, 32\), expected \(4, 32\)"):
        load_stage(copy, base)
    assert state(base) == was
    assert list(load_stage(copy, base, 1).peft_config) == ["birds"]


def test_no_memory_in_the_midst_leaves_the_model_as_it_was(shared, monkeypatch):
    from dymoe.learning import groups

    def fails(base, model, name, *rest):
        if next(base.parameters()).device.type == "cpu" and name == "signs":
            raise MemoryError
        return add_group(base, model, name, *rest)

    monkeypatch.setattr(groups, "add_group", fails)
    base = tiny_llama()
    was = state(base)
    with pytest.raises(MemoryError):
        load_stage(shared, base)
    assert state(base) == was
    assert not [module for module in base.modules() if isinstance(module, DyMoELayer)]


def test_a_large_model_is_not_copied_to_be_checked(shared):
    """Its weights stay where they are."""
    base = tiny_llama()
    storages = {parameter.data_ptr() for parameter in base.parameters()}
    loaded = load_stage(shared, base)
    assert storages < {parameter.data_ptr() for parameter in loaded.parameters()}


def test_read_group_names_what_is_no_safetensors(copy):
    (copy / "groups/01-birds" / WEIGHTS).write_bytes(b"\x80\x04pickle")
    with pytest.raises(DymoeError, match=r"^here: groups/01-birds/adapter_model.safetensors: cannot be read as safet"):
        read_group(copy / "groups/01-birds", Group("birds", "groups/01-birds", "0" * 64), "here")


def test_plain_peft_after_a_pull(shared, tmp_path):
    from peft import PeftModel

    pull(shared, tmp_path / "pulled")
    model = PeftModel.from_pretrained(
        tiny_llama(), str(tmp_path / "pulled"), subfolder="groups/01-birds", adapter_name="birds"
    )
    model.load_adapter(str(tmp_path / "pulled"), subfolder="groups/02-signs", adapter_name="signs")
    ours = dymoe.load_stage(shared, tiny_llama())
    assert {name: group_hash(model, name) for name in NAMES} == {name: group_hash(ours, name) for name in NAMES}


def test_much_of_everything_is_no_long_wait(copy, capsys):
    """As many layers, stages and groups as are read at all: seconds at most, not a product of their numbers."""
    layers = [f"layers.{number}.q_proj" for number in range(4096)]
    config = {"peft_type": "DYMOE", "num_experts": 2, "r": 1, "gate": "uniform", "guidance": "none"}
    config |= {"target_modules": layers, "expert_pattern": dict.fromkeys(layers, 1)}
    (copy / "groups/02-signs" / CONFIG).write_text(json.dumps(config))
    one = torch.zeros(1, 1, 1)
    tensors = {f"base_model.model.{layer}.dymoe_{kind}": one.clone() for layer in layers for kind in "AB"}
    save_file(tensors, copy / "groups/02-signs" / WEIGHTS)
    seal(copy)
    begun = time.process_time()
    pull(copy, copy.parent / "pulled")
    shutil.rmtree(copy.parent / "pulled")
    config["target_modules"] = [*layers, "one.more"]
    (copy / "groups/02-signs" / CONFIG).write_text(json.dumps({**config, "expert_pattern": {}}))
    refused(copy, capsys, "expected 1 to 4096 different names")
    values = json.loads((copy / MANIFEST).read_text())
    for count, groups in ((257, 1), (256, 256), (20_000, 1), (1, 20_000)):
        rows = [{"name": f"g{n}", "folder": f"groups/{n + 1:02d}-s{n}", "hash": "0" * 64} for n in range(groups)]
        stages = [{"name": f"s{number}", "groups": rows if count < 256 else rows[:1]} for number in range(count)]
        (copy / MANIFEST).write_text(json.dumps({**values, "stages": stages})[: 2**22])
        with pytest.raises(DymoeError):
            load_stage(copy, tiny_llama())
    assert time.process_time() - begun < 20  # one of them alone would take minutes


def test_a_long_name_of_a_file_is_cut_in_the_message(copy):
    values = json.loads((copy / MANIFEST).read_text())
    values["files"]["x" * 10**6] = values["files"]["README.md"]
    (copy / MANIFEST).write_text(json.dumps(values))
    with pytest.raises(DymoeError) as error:
        load_stage(copy, tiny_llama())
    assert len(str(error.value)) < 1000
