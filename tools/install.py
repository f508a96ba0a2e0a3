"""Set up the virtual environment that runs this file: torch for this machine, then dymoe and what it needs.

A machine without an NVIDIA GPU gets the CPU build of torch (a few hundred MB instead of several GB): first as pip is
configured, then from PyTorch's own index of CPU builds. Everything lands in the environment alone. Runs again only what
is missing; `make` calls it. With `--on-top FOLDER EXTRA` it installs what an extra of dymoe needs into the environment
in FOLDER, on top of this one.
"""

import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

TORCH, TORCHVISION = "2.13.0", "0.28.0"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
ROOT = Path(__file__).resolve().parent.parent


def pip(*arguments: str, check: bool = True) -> bool:
    """Run pip in this environment; with `check` a failure ends the program with pip's own message."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-qq", *arguments]
    done = subprocess.run(command, capture_output=not check, text=True)
    if check and done.returncode:
        sys.exit(f"install: {' '.join(command[2:])} failed (exit code {done.returncode}); see above")
    return done.returncode == 0


def install_torch() -> None:
    """Install torch and torchvision in the builds that fit this machine."""
    if importlib.util.find_spec("torch") is None:
        if shutil.which("nvidia-smi"):
            pip(f"torch=={TORCH}", f"torchvision=={TORCHVISION}")
        elif not pip(f"torch=={TORCH}+cpu", check=False):
            pip(f"torch=={TORCH}+cpu", f"torchvision=={TORCHVISION}+cpu", "--index-url", CPU_INDEX)
    if importlib.util.find_spec("torchvision") is None:
        pip(f"torchvision=={TORCHVISION}")


def make_torchvision_importable() -> None:
    """Where torchvision was built for another torch, let it be imported without its compiled operators.

    Copies `dymoe/_imports.py` beside the packages and starts it with the interpreter, so that transformers and peft
    work in any order of imports; where torchvision imports as it is, nothing is done.
    """
    site = Path(sysconfig.get_path("purelib"))
    if subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True).returncode == 0:
        return
    shutil.copyfile(ROOT / "src" / "dymoe" / "_imports.py", site / "dymoe_imports.py")
    (site / "dymoe_imports.pth").write_text("import dymoe_imports; dymoe_imports.tolerate_torchvision()\n")
    again = subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True, text=True)
    if again.returncode:
        sys.exit(f"install: torchvision does not work beside this torch:\n{again.stderr.strip().splitlines()[-1]}")


def on_top(folder: Path, extra: str) -> None:
    """Let the environment in `folder` see this one's packages, and install what one of dymoe's extras needs into it."""
    import tomllib  # here, since an older Python must come as far as being told so

    python = folder / "bin" / "python"
    command = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    below = sysconfig.get_path("purelib")
    (site / "below.pth").write_text(f"import site; site.addsitedir({below!r})\n")  # with what is installed editable
    needs = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"][extra]
    command = [python, "-m", "pip", "--disable-pip-version-check", "install", "-qq", *needs]
    if subprocess.run(command).returncode:
        sys.exit(f"install: {' '.join(needs)} could not be installed into {folder}; see above")


def main() -> None:
    """Install everything, then say what is there."""
    if sys.version_info < (3, 11):  # noqa: UP036 - this runs before anything is checked
        sys.exit(f"install: dymoe needs Python 3.11 or newer, this is {sys.version.split()[0]}")
    if sys.prefix == sys.base_prefix:
        sys.exit("install: run this in a virtual environment (make does)")
    if "--on-top" in sys.argv[1:]:
        folder, extra = sys.argv[sys.argv.index("--on-top") + 1 :]
        on_top(Path(folder), extra)
        return
    extras = "[dev]" if "--dev" in sys.argv[1:] else ""
    install_torch()
    pip("--editable", f"{ROOT}{extras}")
    make_torchvision_importable()
    import torch

    print(f"dymoe is installed in {sys.prefix} (torch {torch.__version__})")


if __name__ == "__main__":
    main()
