"""Write the lock: the newest versions that pyproject.toml allows, for Python 3.11 and newer on every machine.

`requirements.lock` holds what dymoe, its development tools and torch need, `requirements-play.lock` the same with the
page's Gradio, which wants an older Pillow. torch and torchvision stand in tools/install.py, since their build depends
on the machine. `make lock` runs it in the development environment, which must have the torch for CPUs.
"""

import subprocess
import sys
import tempfile
import tomllib
from importlib.metadata import requires
from pathlib import Path

from install import LOCK, PLAY_LOCK, ROOT, TRITON

HEAD = "# Written by `make lock`; not edited by hand. Constraints of tools/install.py, beside torch and torchvision.\n"


def compile_lock(lock: Path, known: str, *extras: str) -> str:
    """Write the lock for dymoe with these extras; versions in `known` (a lock's text) stay where they can."""
    build = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]["requires"]
    below = [line for line in requires("torch") or () if "extra ==" not in line]
    if any(line.startswith("nvidia") for line in below):
        sys.exit("lock: this torch is the build for NVIDIA GPUs; renew the lock on a machine without one")
    with tempfile.TemporaryDirectory() as folder:
        more, without, output = (Path(folder) / name for name in ("more.in", "without.in", "lock"))
        more.write_text("\n".join([*build, *below, f"triton=={TRITON}; platform_system == 'Linux'"]), encoding="utf-8")
        without.write_text("torch\ntorchvision\n", encoding="utf-8")
        output.write_text(known, encoding="utf-8")
        options = ["--universal", "--python-version", "3.11", "--no-header", "--no-annotate", "--quiet"]
        chosen = [word for extra in extras for word in ("--extra", extra)]
        command = ["uv", "pip", "compile", *options, *chosen, "--excludes", without, "--output-file", output]
        subprocess.run([sys.executable, "-m", *command, ROOT / "pyproject.toml", more], check=True)
        text = output.read_text(encoding="utf-8")
    lock.write_text(HEAD + text, encoding="utf-8")
    return text


if __name__ == "__main__":
    extras = ("pocket", "report", "dev")
    compile_lock(PLAY_LOCK, compile_lock(LOCK, "", *extras), *extras, "play")
