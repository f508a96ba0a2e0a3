"""The README's Python example runs as it stands (with fewer steps), from an empty folder."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_the_python_example_runs(tmp_path):
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert "max_steps=20" in block
    script = tmp_path / "example.py"
    shortened = block.replace("max_steps=20", "max_steps=1, per_device_train_batch_size=2, use_cpu=True")
    script.write_text(f"import torch\ntorch.set_num_threads(2)\n{shortened}")
    done = subprocess.run([sys.executable, script.name], cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith(("ScienceQA {", "ImageNet {"))]
    first, second = (re.findall(r"'ScienceQA': '(\w+)'", line) for line in lines)
    assert first == second, "the old group must not change"
    assert (tmp_path / "runs" / "example" / "groups" / "ImageNet" / "adapter_model.safetensors").is_file()


def test_the_links_lead_somewhere():
    text = (ROOT / "README.md").read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target
