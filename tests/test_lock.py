"""The lock of tested versions agrees with the ranges of pyproject.toml, for every Python and machine promised."""

import itertools
import re
import runpy
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
INSTALL = runpy.run_path(str(ROOT / "tools" / "install.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS = ("pocket", "report", "dev")
LOCKS = {"requirements.lock": EXTRAS, "requirements-play.lock": (*EXTRAS, "play")}
MACHINES = [
    {"python_version": python, "python_full_version": f"{python}.0", "platform_machine": machine}
    | {"sys_platform": "linux", "platform_system": "Linux", "implementation_name": "cpython", "os_name": "posix"}
    | {"platform_python_implementation": "CPython", "implementation_version": f"{python}.0"}
    for python, machine in itertools.product(("3.11", "3.12", "3.13"), ("x86_64", "aarch64"))
]


def lines(lock):
    text = (ROOT / lock).read_text(encoding="utf-8")
    return [line for line in text.splitlines() if not line.startswith("#")]


def pins(lock, machine):
    """The locked version of every package on a machine; torch and torchvision are those of tools/install.py."""
    found = {"torch": INSTALL["TORCH"], "torchvision": INSTALL["TORCHVISION"]}
    for pin in map(Requirement, lines(lock)):
        if pin.marker is None or pin.marker.evaluate(machine):
            assert pin.name not in found, f"{pin.name} is locked twice"
            found[canonicalize_name(pin.name)] = next(iter(pin.specifier)).version
    return found


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_has_exact_versions_and_nothing_else(lock):
    """No option, address or path: where packages come from is the user's own setting."""
    pin = re.compile(r"[a-z0-9][a-z0-9.-]*==[a-z0-9.]+( ; [a-z_]+ (<|>=|==|!=) '[\w.]+'( (and|or) [a-z_]+ .*)?)?")
    assert [line for line in lines(lock) if not pin.fullmatch(line) or "/" in line or "@" in line] == []


@pytest.mark.parametrize(
    "machine", MACHINES, ids=lambda values: f"{values['python_version']}-{values['platform_machine']}"
)
@pytest.mark.parametrize("lock", LOCKS)
def test_every_dependency_is_locked_within_its_range(lock, machine):
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = [*PROJECT["project"]["dependencies"], *PROJECT["build-system"]["requires"]]
    wanted += [line for extra in LOCKS[lock] for line in extras[extra]]
    found = pins(lock, machine)
    for need in map(Requirement, wanted):
        if need.marker is None or need.marker.evaluate(machine):
            assert found.get(canonicalize_name(need.name)) in need.specifier, f"{need}: run `make lock`"
    assert found["triton"] == INSTALL["TRITON"], "the triton that torch's build for GPUs requires"
