"""The core of dymoe needs few packages; what an extra brings is asked for in one line where it is missing."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from dymoe.cli import main
from dymoe.errors import DymoeError
from dymoe.libraries import EXTRAS, require_extra
from dymoe.models import load

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
OPTIONAL = PROJECT["optional-dependencies"]
WITH_OTHERS = {"tokenizers": "transformers", "packaging": "transformers", "filelock": "huggingface-hub"}
WITH_GRADIO = {"fastapi", "uvicorn"}  # which only the page's own tests have here
WITHOUT_EXTRAS = """
import sys
sys.modules.update(dict.fromkeys(MODULES))
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
import dymoe
from dymoe import routing
model = LlamaForCausalLM(LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
    num_key_value_heads=1, vocab_size=9))
model = get_peft_model(model, dymoe.DyMoEConfig(num_experts=2, r=2, top_k=2), adapter_name="first")
tokens = torch.arange(1, 9).reshape(2, 4)
model(input_ids=tokens, labels=tokens).loss.backward()
print(routing.topk_weights(torch.eye(2), 1, 0.1).tolist())
"""


def names(requirements):
    return {canonicalize_name(Requirement(text).name) for text in requirements}


def distributions():
    """The distributions of every installed top-level module."""
    found = importlib.metadata.packages_distributions()
    return {module: {canonicalize_name(name) for name in names} for module, names in found.items()}


def test_the_core_has_at_most_twelve_dependencies():
    assert len(PROJECT["dependencies"]) <= 12
    extras = {name for extra in EXTRAS for name in names(OPTIONAL[extra])}
    assert not names(PROJECT["dependencies"]) & extras


def test_the_adapter_and_the_routing_need_no_extra():
    modules = {module for modules in EXTRAS.values() for module in modules} | {"torchvision"}
    modules -= {"jinja2", "pandas"}  # torch and datasets bring them
    code = WITHOUT_EXTRAS.replace("MODULES", repr(modules))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[[1.0, 0.0], [0.0, 1.0]]\n"


def test_everything_that_is_imported_is_declared():
    declared = names(PROJECT["dependencies"]) | names(text for extra in OPTIONAL.values() for text in extra)
    declared |= WITH_OTHERS.keys() | WITH_GRADIO
    for module, owner in WITH_OTHERS.items():
        assert module in names(importlib.metadata.requires(owner)), f"{module} no longer comes with {owner}"
    owners = distributions()
    for file in (ROOT / "src/dymoe").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                imported.append(node.module)
            for module in {name.partition(".")[0] for name in imported} - sys.stdlib_module_names - {"dymoe"}:
                known = owners.get(module, {canonicalize_name(module)})
                assert known & declared, f"{file.name}: {module} is in no dependency or extra"


@pytest.mark.parametrize("extra", EXTRAS)
def test_a_missing_extra_is_one_line_with_its_command(extra, monkeypatch):
    owners = distributions()
    for module in EXTRAS[extra]:
        monkeypatch.setitem(sys.modules, module, None)
        known = owners.get(module.partition(".")[0], {canonicalize_name(module)})
        assert known & names(OPTIONAL[extra]), f"{module} is not in the extra {extra}"
    with pytest.raises(DymoeError, match=rf"^a key: needs .*not installed; pip install dymoe\[{extra}\]$"):
        require_extra(extra, "a key")


def test_the_pocket_model_and_the_report_ask_for_their_extra(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(DymoeError, match=re.escape("needs gguf, which is not installed; pip install dymoe[pocket]")):
        load("pocket")
    monkeypatch.setitem(sys.modules, "plotly", None)
    for words in (["report", "x"], ["demo", "--output", str(tmp_path / "demo")], ["analyze", "dilemma", "x.yaml"]):
        assert main(words) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert "; pip install dymoe[" in said
    assert list(tmp_path.iterdir()) == []
