"""Sharing results: what is pulled is what was pushed, bit for bit, or nothing is there and one line says why."""

import json
import os
import pickle
import re
import resource
import runpy
import shutil
import sys
import unicodedata
from html import unescape
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from safetensors.torch import load_file, save_file

import dymoe
from dymoe.adapter import tensors_hash
from dymoe.cli import main
from dymoe.errors import DymoeError
from dymoe.files import atomic_dir
from dymoe.learning.groups import load_group
from dymoe.learning.recipe import load_recipe
from dymoe.models import load
from dymoe.share.card import Shared, card, escape
from dymoe.share.locations import location_of
from dymoe.share.manifest import MANIFEST, TEXT_BYTES, Group, file_of, parse
from dymoe.share.paths import base_kind, without_paths
from dymoe.share.push import push
from tests.faults.kill import Killed, run_child
from tests.learning.hub_server import Hub
from tests.learning.tiny import write_recipe

INPUTS = {"input_ids": torch.arange(5, 25).reshape(2, 10), "attention_mask": torch.ones(2, 10, dtype=torch.long)}


@pytest.fixture(scope="module")
def learned(tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("learned")
    training, tasks = {"steps_per_task": 2, "batch_size": 2, "limit": 4}, ["ImageNet", "VQAv2", "OCRVQA"]
    recipe = write_recipe(
        folder / "secret-run.yaml", tiny_folder, tasks=tasks, training=training, evaluation={"limit": 2}
    )
    assert main(["run", str(recipe)]) == 0
    return folder / "secret-run"


@pytest.fixture(scope="module")
def pushed(learned, tmp_path_factory):
    target = tmp_path_factory.mktemp("pushed") / "shared"
    assert main(["push", str(learned), f"file:{target}", "--license", "apache-2.0"]) == 0
    return target


@pytest.fixture
def copy(pushed, tmp_path):
    return Path(shutil.copytree(pushed, tmp_path / "copy"))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(**INPUTS).logits


def base(tiny_folder):
    return load(str(tiny_folder), "float32").model


def of_run(run: Path, tiny_folder, stages) -> torch.Tensor:
    """Logits with the groups of these stages, read from the run folder itself."""
    under, model = base(tiny_folder), None
    for stage in stages:
        folder = next(run.glob(f"stages/{stage:02d}-*"))
        name = json.loads((folder / "done.json").read_text())["group"]
        model = load_group(under, model, name, folder / "adapter")
    return logits(model)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def refused(source: Path, capsys, target: Path | None = None) -> str:
    """The one line that a pull answers with; nothing is left of it."""
    target = target or source.parent / "pulled"
    before = sorted(target.parent.iterdir())
    capsys.readouterr()
    assert main(["pull", str(source), str(target)]) == 2
    told = capsys.readouterr()
    assert told.err.count("\n") == 1
    assert not told.out
    assert sorted(target.parent.iterdir()) == before
    return told.err


def test_a_pulled_stage_answers_as_the_run_did_bit_for_bit(learned, pushed, tiny_folder, tmp_path, capsys):
    pulled = tmp_path / "pulled"
    assert main(["pull", str(pushed), str(pulled)]) == 0
    assert "stages ImageNet, VQAv2, OCRVQA: " in capsys.readouterr().out
    assert tree(pulled) == tree(pushed)
    stages = [of_run(learned, tiny_folder, range(1, stage + 1)) for stage in (1, 2, 3)]
    assert not torch.equal(stages[0], stages[1])
    assert not torch.equal(stages[1], stages[2])
    assert not torch.equal(stages[0], logits(base(tiny_folder)))
    results = json.loads((learned / "results.json").read_text())
    for stage, expected in enumerate(stages, start=1):
        model = dymoe.load_stage(pulled, base(tiny_folder), stage)
        assert torch.equal(logits(model), expected)
        assert list(model.peft_config) == ["ImageNet", "VQAv2", "OCRVQA"][:stage]
        found = {name: dymoe.group_hash(model, name) for name in model.peft_config}
        assert found == results["group_hashes"][stage - 1]["groups"]
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(logits(dymoe.load_stage(str(pulled), base(tiny_folder))), stages[-1])


def test_the_three_lines_of_the_card_load_every_stage(learned, pushed, tiny_folder, monkeypatch):
    block = re.search(r"```python\n(.*?)```", (pushed / "README.md").read_text(), re.DOTALL)[1]
    monkeypatch.chdir(pushed.parent)
    for stage in (1, 3):
        code = block.replace("folder, stage = 'shared', 3", f"folder, stage = 'shared', {stage}")
        code = code.replace("'path of model'", f"{str(tiny_folder)!r}, 'float32'")
        names: dict = {}
        exec(code, names)
        assert torch.equal(logits(names["model"]), of_run(learned, tiny_folder, range(1, stage + 1)))


def test_the_lines_of_the_front_page(learned, pushed, tiny_folder):
    from peft import PeftModel

    model = PeftModel.from_pretrained(
        base(tiny_folder), str(pushed), subfolder="groups/01-ImageNet", adapter_name="ImageNet"
    )
    model.load_adapter(str(pushed), subfolder="groups/02-VQAv2", adapter_name="VQAv2")
    assert torch.equal(logits(model), of_run(learned, tiny_folder, (1, 2)))


def test_the_example_runs(pushed, tiny_folder, monkeypatch, capsys):
    script = Path(__file__).parents[2] / "examples" / "load_stage.py"
    monkeypatch.setattr(sys, "argv", [str(script), str(pushed), "2", str(tiny_folder)])
    names = runpy.run_path(str(script))
    assert list(names["model"].peft_config) == ["ImageNet", "VQAv2"]
    assert re.findall(r"(\w+) \w{16} as it was saved", capsys.readouterr().out) == ["ImageNet", "VQAv2"]


def test_a_group_of_several_stages_has_a_folder_for_each(learned, tiny_folder, tmp_path):
    """A run as `lora` leaves it: both stages trained the group `shared`."""
    run = Path(shutil.copytree(learned, tmp_path / "run"))
    shutil.rmtree(run / "stages" / "03-OCRVQA")
    for stage in run.glob("stages/*"):
        done = json.loads((stage / "done.json").read_text())
        done |= {"group": "shared", "hashes": {"shared": done["hashes"][done["group"]]}}
        (stage / "done.json").write_text(json.dumps(done))
    push(run, tmp_path / "shared")
    groups = [stage["groups"] for stage in json.loads((tmp_path / "shared" / MANIFEST).read_text())["stages"]]
    assert [[(row["name"], row["folder"]) for row in stage] for stage in groups] == [
        [("shared", "groups/01-ImageNet")],
        [("shared", "groups/02-VQAv2")],
    ]
    first, second = (of_run(run, tiny_folder, [stage]) for stage in (1, 2))
    assert not torch.equal(first, second)
    for stage, expected in ((1, first), (2, second)):
        assert torch.equal(logits(dymoe.load_stage(tmp_path / "shared", base(tiny_folder), stage)), expected)


def test_what_is_shared_says_nothing_of_this_machine(learned, pushed, tiny_folder):
    texts = {name: data.decode() for name, data in tree(pushed).items() if not name.endswith(".safetensors")}
    assert sorted(texts) == sorted(
        ["README.md", "manifest.json", "recipe.yaml", "results.json", "run.yaml"]
        + [f"groups/{name}/adapter_config.json" for name in ("01-ImageNet", "02-VQAv2", "03-OCRVQA")]
    )
    for name, text in texts.items():
        for private in (str(learned.parent), str(tiny_folder.parent), str(Path.home()), "secret-run.yaml"):
            assert private not in text, name
    ours = yaml.safe_load((learned / "run.yaml").read_text())["recipe"]
    theirs = yaml.safe_load(texts["recipe.yaml"])
    assert theirs.pop("model") == tiny_folder.name
    assert theirs == {key: value for key, value in ours.items() if key not in ("model", "output")}
    recipe = load_recipe(pushed / "recipe.yaml", ["--model", str(tiny_folder)])
    assert {key: value for key, value in recipe.resolved().items() if key != "output"} == {
        **theirs,
        "model": ours["model"],
    }
    whole, shared = json.loads((learned / "results.json").read_text()), json.loads(texts["results.json"])
    assert shared == {**whole, "base": tiny_folder.name}
    assert main(["show", str(pushed)]) == 0


MATRIX = [[50.0], [40.0, 60.0], [30.0, 20.0, 70.0]]


def numbered(learned: Path, folder: Path) -> Path:
    """The run with accuracies that differ (a tiny model of random weights has none)."""
    run = Path(shutil.copytree(learned, folder / "numbered"))
    results = json.loads((run / "results.json").read_text())
    lenient = [[50.0], [45.0, 60.0], [45.0, 30.0, 70.0]]
    (run / "results.json").write_text(json.dumps({**results, "matrix": MATRIX, "lenient_matrix": lenient}))
    return run


def test_the_first_stages_alone_are_what_the_run_was_then(learned, tiny_folder, tmp_path):
    assert main(["push", str(numbered(learned, tmp_path)), str(tmp_path / "two"), "--stage", "2"]) == 0
    results = json.loads((tmp_path / "two" / "results.json").read_text())
    whole = json.loads((learned / "results.json").read_text())
    assert results["matrix"] == [[50.0], [40.0, 60.0]]
    assert results["lenient_matrix"] == [[50.0], [45.0, 60.0]]
    assert (results["metrics"]["MFT"], results["metrics"]["MFN"], results["metrics"]["BWT"]) == (55.0, 50.0, -5.0)
    assert results["forgetting"] == {"ImageNet": 10.0, "VQAv2": 0.0}
    assert results["format_drift"] == {"ImageNet": 5.0, "VQAv2": 0.0}
    assert results["tasks"] == whole["tasks"]
    assert results["answers"] == {
        task: {"questions": whole["answers"][task]["questions"], "scores": whole["answers"][task]["scores"][:stages]}
        for task, stages in (("ImageNet", 2), ("VQAv2", 1))
    }
    assert results["group_hashes"] == whole["group_hashes"][:2]
    assert results["drift"] == {"ImageNet": whole["drift"]["ImageNet"][:2], "VQAv2": whole["drift"]["VQAv2"][:1]}
    assert [len(row) for row in results["seconds"].values()] == [2] * len(results["seconds"])
    assert not (tmp_path / "two" / "groups" / "03-OCRVQA").exists()
    model = dymoe.load_stage(tmp_path / "two", base(tiny_folder))
    assert torch.equal(logits(model), of_run(learned, tiny_folder, (1, 2)))


def test_every_changed_byte_is_noticed(copy, capsys):
    for name in sorted(tree(copy)):
        file = copy / name
        data = file.read_bytes()
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        told = refused(copy, capsys)
        assert (MANIFEST if name == MANIFEST else f"{name}: its SHA-256") in told
        file.write_bytes(data)
        if name != MANIFEST:
            file.unlink()
            assert f"{name}: is missing" in refused(copy, capsys)
            file.write_bytes(data[:-1])
            assert f"has {len(data) - 1} bytes, manifest.json says {len(data)}" in refused(copy, capsys)
            file.write_bytes(data)
    assert main(["pull", str(copy), str(copy.parent / "pulled")]) == 0


def edit(folder: Path, change) -> None:
    values = json.loads((folder / MANIFEST).read_text())
    change(values)
    (folder / MANIFEST).write_text(json.dumps(values))


def relist(folder: Path, name: str) -> None:
    file = file_of(folder / name)
    edit(folder, lambda values: values["files"].update({name: {"bytes": file.size, "sha256": file.sha256}}))


def test_weights_that_fit_the_manifest_but_not_the_group_hash(copy, capsys, tiny_folder):
    name = "groups/02-VQAv2/adapter_model.safetensors"
    data = bytearray((copy / name).read_bytes())
    data[-1] ^= 1
    (copy / name).write_bytes(data)
    relist(copy, name)
    assert "expert group 'VQAv2' is not the one saved (hash differs)" in refused(copy, capsys)
    with pytest.raises(DymoeError, match="hash differs"):
        dymoe.load_stage(copy, base(tiny_folder), 2)
    assert list(dymoe.load_stage(copy, base(tiny_folder), 1).peft_config) == ["ImageNet"]  # reads that stage alone
    (copy / name).write_bytes(pickle.dumps({"weights": [1.0]}))
    relist(copy, name)
    assert "cannot be read as safetensors" in refused(copy, capsys)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"peft_type": "LORA"}, "is not the config of an expert group (peft_type DYMOE)"),
        ({"auto_mapping": {"parent_library": "antigravity"}}, "auto_mapping names 'antigravity'"),
    ],
)
def test_a_config_that_would_load_something_else(copy, capsys, change, message):
    name = "groups/01-ImageNet/adapter_config.json"
    values = json.loads((copy / name).read_text())
    (copy / name).write_text(json.dumps({**values, **change}))
    relist(copy, name)
    assert message in refused(copy, capsys)


def test_links_are_refused(copy, capsys):
    strange = copy / "notes.txt"
    strange.symlink_to("/etc/hostname")
    assert "notes.txt: is a link" in refused(copy, capsys)
    strange.unlink()
    weights = copy / "groups" / "02-VQAv2" / "adapter_model.safetensors"
    weights.rename(copy.parent / "elsewhere")
    weights.symlink_to(copy.parent / "elsewhere")
    assert "adapter_model.safetensors: is a link" in refused(copy, capsys)
    weights.unlink()
    (copy.parent / "elsewhere").rename(weights)
    (copy / "groups" / "02-VQAv2").rename(copy.parent / "outside")
    (copy / "groups" / "02-VQAv2").symlink_to(copy.parent / "outside")
    assert "groups/02-VQAv2: is a link" in refused(copy, capsys)


def test_what_does_not_belong_to_the_result_is_left_behind_and_told(copy, capsys):
    (copy / "LICENSE").write_text("mine")
    (copy / "groups/01-ImageNet/adapter_model.bin").write_bytes(pickle.dumps({"a": 1}))
    (copy / ".gitattributes").write_text("")
    (copy / ".git").mkdir()
    (copy / ".git" / "pack").write_bytes(b"a" * 2**21)
    assert main(["pull", str(copy), str(copy.parent / "pulled")]) == 0
    left = "LICENSE, groups/01-ImageNet/adapter_model.bin"
    assert f"left behind, not in manifest.json: {left}\n" in capsys.readouterr().out
    strange = {*left.split(", "), ".gitattributes", ".git/pack"}
    assert set(tree(copy.parent / "pulled")) == set(tree(copy)) - strange


def test_paths_that_lead_out_are_refused(copy, capsys):
    original = (copy / MANIFEST).read_text()
    (copy.parent / "victim").write_text("{}")
    entry = {"bytes": 2, "sha256": "0" * 64}
    for name, message in (
        ("../victim", "does not belong"),
        ("groups/../../victim", "does not belong"),
        (str(copy.parent / "victim"), "does not belong"),
        ("C:/victim", "does not belong"),
        ("groups\\victim", "does not belong"),
        ("groups//victim", "does not belong"),
        ("groups/01-ImageNet/adapter_model.bin", "does not belong to a shared result"),
    ):
        edit(copy, lambda values, name=name: values["files"].update({name: entry}))
        assert message in refused(copy, capsys)
        (copy / MANIFEST).write_text(original)
    for folder, message in (
        ("../outside", "expected groups/NN-STAGE"),
        ("/outside", "expected groups/NN-STAGE"),
        ("elsewhere/01-ImageNet", "expected groups/NN-STAGE"),
        ("groups/09-other", "expected groups/NN-STAGE"),
    ):
        edit(copy, lambda values, folder=folder: values["stages"][0]["groups"][0].update(folder=folder))
        assert message in refused(copy, capsys)
        (copy / MANIFEST).write_text(original)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=30)
@given(st.binary(max_size=40) | json_values.map(lambda value: json.dumps(value).encode()))
def test_no_text_but_a_manifest_is_one(text):
    with pytest.raises(DymoeError):
        parse(text, "somewhere")


@settings(max_examples=40)
@given(st.data())
def test_a_manifest_with_a_part_replaced_is_refused_or_read(pushed, data):
    values = json.loads((pushed / MANIFEST).read_text())
    place, key = data.draw(
        st.sampled_from(
            [
                (values, "stages"),
                (values, "files"),
                (values["stages"][0], "groups"),
                (values["stages"][1]["groups"][0], "folder"),
                (values["stages"][2]["groups"][1], "hash"),
                (values["files"]["README.md"], "bytes"),
                (values["files"]["run.yaml"], "sha256"),
            ]
        )
    )
    place[key] = data.draw(json_values)
    fits = key == "bytes" and type(values["files"]["README.md"]["bytes"]) is int and place[key] >= 0
    if fits and place[key] <= TEXT_BYTES:
        assert parse(json.dumps(values).encode(), "somewhere").files["README.md"].size == place[key]
    else:
        with pytest.raises(DymoeError, match=r"^somewhere: manifest\.json: "):
            parse(json.dumps(values).encode(), "somewhere")


def half_write(target: Path) -> None:
    with atomic_dir(target) as new:
        (new / "half").write_text("")
        raise KeyboardInterrupt


def test_an_interrupted_push_leaves_what_was_there(learned, tmp_path, capsys):
    target = tmp_path / "shared"
    push(learned, target, stage=1)
    before = tree(target)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    for place in (target, tmp_path / "fresh"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, limit[1]))
        try:
            assert main(["push", str(learned), str(place)]) == 2
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        assert f"{place}: cannot be written (File too large)" in capsys.readouterr().err
    assert tree(target) == before
    assert list(tmp_path.iterdir()) == [target]
    with pytest.raises(KeyboardInterrupt):
        half_write(target)
    assert tree(target) == before
    assert list(tmp_path.iterdir()) == [target]
    push(learned, target)
    assert len(json.loads((target / MANIFEST).read_text())["stages"]) == 3


def test_a_push_checks_the_run_first(learned, tmp_path, capsys):
    run = Path(shutil.copytree(learned, tmp_path / "run"))
    weights = run / "stages" / "01-ImageNet" / "adapter" / "adapter_model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("mine")
    (tmp_path / "empty").mkdir()
    for words, message in (
        ([str(run), str(tmp_path / "out")], "'ImageNet' is not the one saved (hash differs)"),
        ([str(run), str(tmp_path / "out"), "--stage", "4"], "--stage 4: stages 1 to 3 are finished"),
        ([str(run), str(tmp_path / "out"), "--stage", "0"], "--stage: expected a whole number of at least 1, got '0'"),
        ([str(run), str(tmp_path / "out"), "--stage", "x"], "--stage: expected a whole number"),
        ([str(run), str(tmp_path / "out"), "--stagee", "1"], "unknown option; did you mean --stage?"),
        ([str(run), str(tmp_path / "out"), "--private"], "--private and --message are for Hub repositories"),
        ([str(run), str(tmp_path / "out"), "--license", "My licence"], "expected an identifier of the Hub"),
        ([str(run), str(mine)], "holds something that dymoe push did not write"),
        ([str(learned), str(run)], "holds something that dymoe push did not write"),
        ([str(tmp_path / "empty"), str(tmp_path / "out")], "no run.yaml here"),
        ([str(run)], "expected RUN and TARGET"),
    ):
        assert main(["push", *words]) == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1
        assert message in told
    for stage in ("01-ImageNet", "02-VQAv2", "03-OCRVQA"):
        (run / "stages" / stage / "done.json").unlink()
    assert main(["push", str(run), str(tmp_path / "out")]) == 2
    assert "no stage is finished" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "mine", "run"]
    assert [file.name for file in mine.iterdir()] == ["thesis.tex"]


def test_refusals_of_pull_and_load_stage(pushed, tiny_folder, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    for words, message in (
        ([str(pushed), str(tmp_path / "full")], "full: is there already"),
        ([str(tmp_path / "nowhere"), str(tmp_path / "out")], "nowhere: no such folder"),
        ([str(tmp_path / "full"), str(tmp_path / "out")], "no manifest.json here"),
        ([str(pushed), str(tmp_path / "out"), "--force"], "pull: --force: unknown option"),
        ([str(pushed)], "expected SOURCE and FOLDER"),
        (["hub:nothing", str(tmp_path / "out")], "expected hub:owner/name"),
    ):
        assert main(["pull", *words]) == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1
        assert message in told
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    for stage in (0, 4, -1, True):
        with pytest.raises(DymoeError, match="there are stages 1 to 3"):
            dymoe.load_stage(pushed, base(tiny_folder), stage)
    model = dymoe.load_stage(pushed, base(tiny_folder), 1)
    for wrapped in (model, model.base_model.model):
        with pytest.raises(DymoeError, match="has adapters already"):
            dymoe.load_stage(pushed, wrapped)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The real client talks to a server in this process; its cache is a folder of the test."""
    import huggingface_hub
    from huggingface_hub import constants

    server = Hub()
    changes = {
        "ENDPOINT": server.url,
        "HF_HUB_OFFLINE": False,
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HUGGINGFACE_CO_URL_TEMPLATE": f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
    }
    for name, value in changes.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    huggingface_hub.utils.close_session()
    yield server
    huggingface_hub.utils.close_session()
    server.close()


def test_to_the_hub_and_back_in_one_commit(hub, learned, pushed, tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["push", str(learned), "me/shared", "--private", "--message", "three tasks"]) == 0
    repository = hub.repositories["me/shared"]
    assert repository["private"]
    assert repository["commits"] == ["three tasks"]
    sent = {name: data for name, data in repository["files"].items() if name != ".gitattributes"}
    assert {name: data for name, data in sent.items() if name.startswith(("groups/", "re"))} == {
        name: data for name, data in tree(pushed).items() if name.startswith(("groups/", "re"))
    }
    assert main(["pull", "me/shared", "pulled"]) == 0
    assert tree(tmp_path / "pulled") == sent
    model = dymoe.load_stage("me/shared", base(tiny_folder), 2)
    assert torch.equal(logits(model), of_run(learned, tiny_folder, (1, 2)))
    assert main(["push", str(learned), "hub:me/shared", "--stage", "1"]) == 0
    assert repository["commits"] == ["three tasks", "secret-run after stage 1"]
    assert {name.split("/")[1] for name in repository["files"] if name.startswith("groups/")} == {"01-ImageNet"}
    repository["files"]["training_args.bin"] = b"x"
    capsys.readouterr()
    assert main(["pull", "me/shared", "one"]) == 0
    assert "left behind, not in manifest.json: training_args.bin" in capsys.readouterr().out
    assert not (tmp_path / "one" / "training_args.bin").exists()
    repository["private"] = False
    assert main(["push", str(learned), "me/shared", "--private"]) == 2
    assert "is there already and public; nothing was sent" in capsys.readouterr().err
    hub.repositories["me/other"] = {"private": False, "files": {"model.safetensors": b"x"}, "commits": []}
    assert main(["push", str(learned), "me/other"]) == 2
    assert "me/other: holds something that dymoe push did not write" in capsys.readouterr().err
    assert main(["pull", "me/nowhere", "again"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("dymoe: me/nowhere: the Hub: ")
    assert told.count("\n") == 1
    assert not (tmp_path / "again").exists()


def test_a_word_is_a_folder_where_it_could_be_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for text in ("runs/shared", "./me/shared", "shared", "a/b/c", "file:me/shared", "file:///tmp/x", "~/x"):
        assert isinstance(location_of(text), Path), text
    assert location_of("file:me/shared") == Path("me/shared")
    assert location_of("file:///tmp/x") == Path("/tmp/x")
    assert location_of("me/shared") == "me/shared" == location_of("hub:me/shared")
    assert location_of("hub:runs/shared") == "runs/shared"
    for text in ("", "file:", "hub:", "hub:a/b/c", "hub:../x"):
        with pytest.raises(DymoeError):
            location_of(text)


@pytest.mark.parametrize(
    "text, left",
    [
        ("/home/ann/my models/llava", "llava"),
        ("~/models/llava/", "llava"),
        ("../models/llava", "llava"),
        ("C:\\Users\\ann\\llava", "llava"),
        ("file:///home/ann/llava", "llava"),
        ("read /home/ann/x.json, then ~/y/z.json", "read x.json, then z.json"),
        ("liuhaotian/llava-v1.5-7b", "liuhaotian/llava-v1.5-7b"),
        ("coin/grounding", "coin/grounding"),
        ("https://huggingface.co/a/b", "https://huggingface.co/a/b"),
        (r".*language_model\..*\.(q_proj|k_proj)", r".*language_model\..*\.(q_proj|k_proj)"),
        (r"\w+\.layers", r"\w+\.layers"),
        ("/", "path"),
    ],
)
def test_paths_are_cut_to_their_last_part(text, left):
    assert without_paths(text) == left
    assert without_paths({"a": [text, 1, None]}) == {"a": [left, 1, None]}


@given(st.lists(st.text("abcXYZ019_", min_size=1), min_size=2), st.sampled_from(["", "at ", "(", "'"]))
def test_no_absolute_path_survives(parts, before):
    path = "/" + "/".join(parts)
    assert path not in without_paths(f"{before}{path}")
    assert without_paths(f"{before}{path}").endswith(parts[-1])


def test_what_a_base_model_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "llava").mkdir(parents=True)
    kinds = {name: base_kind(name) for name in ("pocket", "a/b", "models/llava", "/models/llava", "~/llava", "./a/b")}
    assert kinds == {
        "pocket": "assembled", "a/b": "hub", "models/llava": "folder", "/models/llava": "folder", "~/llava": "folder",
        "./a/b": "folder",
    }  # fmt: skip


@given(st.text(max_size=60))
def test_escaped_text_renders_as_itself(text):
    """Rendered by a Markdown parser with tables and links on, a cell shows the text and has no markup of its own."""
    rendered = MarkdownIt("commonmark", {"html": True}).enable("table").render(f"| a |\n| --- |\n| x{escape(text)}x |")
    cells = re.findall(r"<td>(.*?)</td>", rendered, re.DOTALL)
    assert len(cells) == 1
    assert "<" not in cells[0]
    shown = "".join(" " if unicodedata.category(char)[0] in "CZ" else char for char in text)
    assert unescape(cells[0]) == f"x{' '.join(shown.split())}x"


def test_a_card_is_data_not_markup():
    evil = "<script>alert(1)</script> | [x](javascript:1) `![]()` \n# head www.evil.com"
    results = {
        "method": evil, "stream": evil, "tasks": [evil], "seed": 0, "base": evil, "matrix": [[50.0]],
        "metrics": {evil: 50.0}, "forgetting": {evil: 0.0}, "versions": {evil: evil}, "samples": {evil: 3},
    }  # fmt: skip
    groups = (Group(evil, "groups/01-x", "0" * 64),)
    text = card(Shared(results, {"method": evil, "settings": {evil: evil}}, [(evil, groups)], evil, None, evil))
    head, _, body = text.removeprefix("---\n").partition("\n---\n")
    assert yaml.safe_load(head)["license"] == "other"
    parser = MarkdownIt("commonmark", {"html": True}).enable("table")
    kinds = {token.type for token in parser.parse(body)}
    inner = [child for token in parser.parse(body) for child in token.children or ()]
    assert "html_block" not in kinds
    assert not {"html_inline", "image"} & {child.type for child in inner}
    assert "link_open" not in {child.type for child in inner}
    assert "www.evil" not in "".join(child.content for child in inner if child.type != "text")
    assert body.count("\n# ") == 1


def test_a_card_of_all_tasks_at_once_speaks_of_no_order():
    results = {"method": "joint", "stream": "s", "tasks": ["A", "B"], "seed": 0, "base": "b", "matrix": []}
    groups = (Group("all", "groups/01-all", "0" * 64),)
    told = {
        joint: card(Shared({**results, "joint": joint}, {}, [("A", groups)], "b", None, "x"))
        for joint in (None, (1.0, 2.0))
    }
    assert "learned task after task with" in told[None]
    assert "learned from all tasks at once with" in told[(1.0, 2.0)]
    assert "task after task" not in told[(1.0, 2.0)]


def test_the_card_states_the_numbers(learned, tmp_path):
    target = tmp_path / "shared"
    push(numbered(learned, tmp_path), target, stage=2, licence="apache-2.0")
    text = (target / "README.md").read_text()
    head = yaml.safe_load(text.split("---\n")[1])
    assert (head["license"], head["library_name"]) == ("apache-2.0", "peft")
    assert "base_model" not in head
    tables = re.findall(r"<table>.*?</table>", MarkdownIt("commonmark").enable("table").render(text), re.DOTALL)
    cells = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for table in tables for row in table.split("</tr>")]
    rows = [[unescape(cell) for cell in row] for row in cells]
    hashes = json.loads((learned / "results.json").read_text())["group_hashes"][-1]["groups"]
    for row in (
        ["after", "ImageNet", "VQAv2", "OCRVQA"],
        ["1 ImageNet", "50.00", "", ""],
        ["2 VQAv2", "40.00", "60.00", ""],
        ["BWT", "-5.00"],
        ["BWT_T-1", "-10.00"],
        ["ImageNet", "10.00", "5.00"],
        ["2", "VQAv2", "VQAv2", "groups/02-VQAv2", hashes["VQAv2"][:16], "2"],
        ["settings.num_experts", "4"],
        ["these groups", "apache-2.0"],
    ):
        assert row in rows
    assert "2 of 3 tasks" in text


def test_push_and_pull_do_not_load_torch_to_say_what_is_wrong():
    import subprocess

    code = (
        "import sys; from dymoe.cli import main; main(['push', 'nowhere', 'out']); main(['pull', 'nowhere', 'out']);"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env=dict(os.environ))


def test_push_shares_no_number_that_is_not_finite(learned, tmp_path, capsys):
    def told(name: str, change) -> str:
        run = Path(shutil.copytree(learned, tmp_path / name))
        change(run)
        assert main(["push", str(run), str(tmp_path / "out")]) == 2
        assert not (tmp_path / "out").exists()
        line = capsys.readouterr().err
        assert line.count("\n") == 1
        return line

    def weights(value):
        def change(run):
            file = run / "stages/02-VQAv2/adapter/adapter_model.safetensors"
            tensors = load_file(file)
            next(iter(tensors.values())).view(-1)[3] = value
            save_file(tensors, file)
            done = json.loads((run / "stages/02-VQAv2/done.json").read_text())
            done["hashes"]["VQAv2"] = tensors_hash(sorted(tensors.items()))
            (run / "stages/02-VQAv2/done.json").write_text(json.dumps(done))

        return change

    def text(name, before, after):
        return lambda run: (run / name).write_text(re.sub(before, after, (run / name).read_text(), count=1))

    for number, value in enumerate((float("nan"), float("inf"), float("-inf"))):
        assert "not finite" in told(f"weights-{number}", weights(value))
    for number, word in enumerate(("NaN", "Infinity", "-Infinity", "1e999")):
        told_of = told(f"results-{number}", text("results.json", r"\d+\.\d+", word))
        assert "results.json: not usable JSON" in told_of
    for number, word in enumerate((".nan", ".inf", "-.inf")):
        told_of = told(f"run-{number}", text("run.yaml", r"batch_size: \d+", f"batch_size: {word}"))
        assert "run.yaml: cannot be written: recipe.training.batch_size is not a finite number" in told_of


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills need a forked child")
@pytest.mark.parametrize("every", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_push_that_is_killed_leaves_the_old_result_or_the_new_one(learned, tmp_path, every):
    old, target = tmp_path / "old" / "shared", tmp_path / "place" / "shared"
    push(learned, old, stage=1)
    changes = run_child(lambda: push(learned, target), tmp_path / "place")
    assert changes > 20  # or the hook does not see what it should
    whole = {"old": tree(old), "new": tree(target)}
    assert whole["old"] != whole["new"]
    outcomes = set()
    # The last changes put the folder in its place and clear up; before them nothing of the target is touched.
    for place in range(1, changes + 60) if every else [1, changes // 2, changes - 1, changes, changes + 2]:
        shutil.rmtree(tmp_path / "place")
        shutil.copytree(old, target)
        try:
            run_child(lambda: push(learned, target), tmp_path / "place", place)
            break
        except Killed:
            outcomes.add(next((kind for kind, files in whole.items() if tree(target) == files), "neither"))
    assert outcomes == {"old", "new"}
    push(learned, target)  # and what is left of it is in nobody's way
    assert tree(target) == whole["new"]
