"""Set up the virtual environment that runs this file: torch for this machine, then dymoe and what it needs.

All versions are those of `requirements.lock`, with which the tests pass, and of torch and torchvision below. A machine
without an NVIDIA GPU gets the CPU build of torch (a few hundred MB instead of several GB): first as pip is configured,
then from PyTorch's own index of CPU builds. Everything lands in the environment alone. Runs again only what is missing;
`make` calls it.

dymoe comes with what its pocket model and its report need (the extras `pocket` and `report`).

    --dev                   with the development tools
    --wheel FILE            this build of dymoe in place of the checkout
    --newest                with them, and the newest versions that pyproject.toml allows; says which differ
    --on-top FOLDER EXTRA   what an extra of dymoe needs, into the environment in FOLDER, on top of this one
"""

import importlib.metadata
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

TORCH, TORCHVISION, TRITON = "2.13.0", "0.28.0", "3.7.1"  # the triton that this torch's build for GPUs requires
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
ROOT = Path(__file__).resolve().parent.parent
LOCK, PLAY_LOCK = ROOT / "requirements.lock", ROOT / "requirements-play.lock"


def pip(*arguments: str, python: str | Path = sys.executable, check: bool = True) -> bool:
    """Run pip in an environment (this one); with `check` a failure ends the program with pip's own message."""
    command = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "-qq", *arguments]
    done = subprocess.run(command, capture_output=not check, text=True)
    if check and done.returncode:
        sys.exit(f"install: {' '.join(command[2:])} failed (exit code {done.returncode}); see above")
    return done.returncode == 0


def version(name: str) -> str | None:
    """The version of an installed package without its build (`+cpu`), or None."""
    try:
        return importlib.metadata.version(name).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return None


def install_torch(*lock: str) -> None:
    """Install torch and torchvision in the builds that fit this machine; `lock` holds pip's options for the others."""
    if version("torch") != TORCH:
        if shutil.which("nvidia-smi"):
            pip(f"torch=={TORCH}", f"torchvision=={TORCHVISION}", *lock)
        elif not pip(f"torch=={TORCH}+cpu", *lock, check=False):
            pip(f"torch=={TORCH}+cpu", f"torchvision=={TORCHVISION}+cpu", *lock, "--index-url", CPU_INDEX)
    if version("torchvision") != TORCHVISION:
        pip(f"torchvision=={TORCHVISION}", *lock)


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
    pip(*needs, "--constraint", str(PLAY_LOCK), python=python)


def beside_lock() -> list[str]:
    """Packages here whose version is not the lock's, one line each."""
    from packaging.requirements import Requirement

    lines = LOCK.read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    here = [(pin, version(pin.name)) for pin in pins if pin.marker is None or pin.marker.evaluate()]
    return [
        f"{pin.name} {found}, locked {pin.specifier}" for pin, found in here if found and found not in pin.specifier
    ]


def install(*what: str, newest: bool) -> None:
    """Install torch, then dymoe (`what` pip is to install of it), as locked or as new as its ranges allow."""
    lock = () if newest else ("--constraint", str(LOCK))
    importlib.invalidate_caches()
    install_torch(*lock)
    pip("setuptools", "--upgrade", *lock)  # builds dymoe; a build of its own environment would take the newest
    pip("--no-build-isolation", *what, *lock)
    make_torchvision_importable()
    other = beside_lock()
    if newest:
        print("\n".join(other or ["Nothing newer than the lock."]))
    elif other:
        sys.exit(f"install: not as locked, remove {sys.prefix} and run this again: {'; '.join(other)}")


def main() -> None:
    """Install everything, then say what is there."""
    if sys.version_info < (3, 11):  # noqa: UP036 - this runs before anything is checked
        sys.exit(f"install: dymoe needs Python 3.11 or newer, this is {sys.version.split()[0]}")
    if sys.prefix == sys.base_prefix:
        sys.exit("install: run this in a virtual environment (make does)")
    words = sys.argv[1:]
    if "--on-top" in words:
        folder, extra = words[words.index("--on-top") + 1 :]
        on_top(Path(folder), extra)
        return
    newest = "--newest" in words
    if "--wheel" in words:
        install(words[words.index("--wheel") + 1], newest=newest)
    else:
        install("--editable", f"{ROOT}[pocket,report{',dev' if newest or '--dev' in words else ''}]", newest=newest)
    print(f"dymoe is installed in {sys.prefix} (torch {importlib.metadata.version('torch')})")


if __name__ == "__main__":
    main()
