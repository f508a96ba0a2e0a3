"""Published checkpoints as a map of tensors: names and shapes first, one tensor at a time afterwards.

safetensors and torch's .bin shards (weights-only loading, so nothing pickled runs). A file is opened when one of its
tensors is wanted and let go when another file's turn comes; both formats are mapped into memory, so that reading the
names of a 26 GB model costs no memory to speak of.
"""

import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dymoe.errors import DymoeError
from dymoe.files import expand, not_itself, read_json

if TYPE_CHECKING:
    import torch

# In the order of preference: the first that a folder has is read.
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLE = ("model.safetensors", "pytorch_model.bin")


def fetch(name: str, option: str, extra: Sequence[str] = ()) -> Path:
    """The folder of a model given as a folder or a Hub id; from the Hub only weights and settings are taken.

    Args:
        name: folder or Hub id.
        option: what it was given for, for messages.
        extra: further file patterns to take from the Hub.

    Raises:
        DymoeError: no such folder, or the Hub does not give it.
    """
    folder = expand(name)
    if folder.is_dir():
        return folder
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise DymoeError(f"{option} {name}: no such folder; give a folder or a Hub id (owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    settings = ["*.json", *extra]
    try:
        snapshot = Path(snapshot_download(name, allow_patterns=[*settings, "*.safetensors"]))
        if not any((snapshot / file).exists() for file in (INDEXES[0], SINGLE[0])):
            snapshot = Path(snapshot_download(name, allow_patterns=[*settings, "pytorch_model*.bin"]))
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DymoeError(f"{option} {name}: no such folder, and the Hub does not give it ({reason})") from error
    return snapshot


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The files that hold a folder's weights, an index file not among them.

    Raises:
        DymoeError: there are none, an index is no index, or it names a file that is missing or lies elsewhere.
    """
    for index, single in zip(INDEXES, SINGLE, strict=True):
        if (folder / index).exists():
            return _indexed(folder / index)
        if (folder / single).exists():
            return (folder / single,)
    raise DymoeError(f"{folder}: no weights here; expected one of {', '.join((*INDEXES, *SINGLE))}")


def _indexed(index: Path) -> tuple[Path, ...]:
    content = read_json(index)
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise DymoeError(f"{index}: expected a `weight_map` from tensors to files")
    files = sorted(set(names.values()))
    for file in files:
        if Path(file).name != file:
            raise DymoeError(f"{index}: names the file {file!r}; only files in the same folder are read")
        if not (index.parent / file).is_file():
            raise DymoeError(f"{index}: names {file}, which is not there; fetch the missing shard")
    return tuple(index.parent / file for file in files)


class Weights:
    """The tensors of some files by name.

    Args:
        files: safetensors files or torch's weights-only files.

    Attributes:
        files: the files in order.
        shapes: the shape of every tensor by name.

    Raises:
        DymoeError: a file cannot be read, holds something other than tensors, or repeats a name.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = tuple(files)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._where: dict[str, Path] = {}
        self._open: tuple[Path, Any] | None = None
        for file in self.files:
            for name, shape in _headers(file):
                if name in self._where:
                    raise DymoeError(f"{file}: tensor {name} is in {self._where[name].name} too")
                self.shapes[name], self._where[name] = shape, file

    def file_of(self, name: str) -> Path:
        """The file that holds the tensor `name`."""
        return self._where[name]

    def read(self, name: str) -> "torch.Tensor":
        """The tensor `name` on the CPU; it may be mapped from the file, so do not write into it.

        Raises:
            DymoeError: the file cannot be read any more.
        """
        file = self._where[name]
        if self._open is None or self._open[0] != file:
            self._open = None  # let the old file go first
            self._open = (file, _opened(file))
        handle = self._open[1]
        try:
            return handle[name] if isinstance(handle, Mapping) else handle.get_tensor(name)
        except Exception as error:
            raise DymoeError(f"{file}: tensor {name} cannot be read ({error})") from error


def _headers(file: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    handle = _opened(file)
    if isinstance(handle, Mapping):
        yield from ((name, tuple(value.shape)) for name, value in handle.items())
    else:
        yield from ((name, tuple(handle.get_slice(name).get_shape())) for name in handle.keys())  # noqa: SIM118


def _opened(file: Path) -> Any:
    """A safetensors handle, or the mapping in a torch file."""
    from safetensors import SafetensorError, safe_open

    try:
        if file.suffix == ".safetensors":
            return safe_open(file, "pt")
        return _torch_file(file)
    except FileNotFoundError:
        raise DymoeError(f"{file}: no such file") from None
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, SafetensorError, pickle.UnpicklingError) as error:
        if isinstance(error, DymoeError):
            raise
        raise DymoeError(f"{file}: {_reason(file, error)}") from error


def _torch_file(file: Path) -> Mapping[str, "torch.Tensor"]:
    import torch

    state: Any = None
    with suppress(RuntimeError):  # files in torch's old format cannot be mapped
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    if state is None:
        state = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(state, Mapping) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    ):
        raise DymoeError(f"{file}: expected a mapping from names to tensors and nothing else")
    return state


def _reason(file: Path, error: Exception) -> str:
    with suppress(OSError), file.open("rb") as opened:
        if instead := not_itself(opened.read(64), packed=False):
            return instead
    if isinstance(error, pickle.UnpicklingError):
        return "is damaged or holds something other than tensors, which is not loaded (weights only)"
    return f"cannot be read as weights ({str(error).strip().splitlines()[0] if str(error).strip() else 'empty'})"
