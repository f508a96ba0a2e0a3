"""What tells one state of a base model from another: a commit of the Hub, or a digest of its files."""

import hashlib
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dymoe.errors import DymoeError
from dymoe.files import expand, sha256_of
from dymoe.images import cores
from dymoe.models.assembled import assembled

# What transformers reads of a folder: weights, configs, tokenizer and templates.
READ = (".safetensors", ".json", ".jinja", ".model", ".txt", ".tiktoken")
COMMIT = re.compile(r"[0-9a-f]{40}")


def identity(name: str, cache_dir: Path | None = None, revision: str | None = None) -> dict[str, str]:
    """The state of the base model `name` that a run would load now.

    Args:
        name: as `dymoe.models.load` takes it.
        cache_dir: where the pocket model's parts, or the Hub's files, are cached.
        revision: the commit of a Hub model to ask for; what the Hub calls its newest when None.

    Returns:
        ``{"commit": ...}`` of a Hub model, 40 hexadecimal digits; of a folder and the pocket model ``{"sha256": ...}``
        over the names and contents of the files that are read. Hashing takes as long as reading them once.

    Raises:
        DymoeError: there is no such folder or Hub model, or a file cannot be read.
    """
    if (parts := assembled(name)) is not None:
        return {"sha256": _digest(parts.digests(cache_dir))}
    folder = expand(name)
    if not folder.is_dir():
        return {"commit": commit(name, cache_dir, revision)}
    try:
        files = sorted(file for file in folder.iterdir() if file.suffix in READ and file.is_file())
        with ThreadPoolExecutor(cores()) as pool:
            return {"sha256": _digest(zip([file.name for file in files], pool.map(sha256_of, files), strict=True))}
    except OSError as error:
        raise DymoeError(f"model {name!r}: {error.filename or folder}: cannot be read ({error.strerror})") from error


def commit(name: str, cache_dir: Path | None = None, revision: str | None = None) -> str:
    """The commit of a Hub model at `revision`: of the Hub where that is reached, else of what is cached.

    Raises:
        DymoeError: there is no such model.
    """
    from huggingface_hub import hf_hub_download

    try:
        # The client keeps a file of a commit in a folder of the commit's name.
        sha = Path(hf_hub_download(name, "config.json", revision=revision, cache_dir=cache_dir)).parent.name
    except (OSError, ValueError, RuntimeError) as error:  # the client's errors are of these kinds
        at = f" at {revision}" if revision else ""
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DymoeError(
            f"model {name!r}{at}: cannot be fetched from the Hub ({first}); give 'pocket', a folder or a Hub id"
        ) from error
    if not COMMIT.fullmatch(sha):
        raise DymoeError(f"model {name!r}: the Hub names no commit of it ({sha!r})")
    return sha


def _digest(files: "zip[tuple[str, str]] | list[tuple[str, str]]") -> str:
    return hashlib.sha256("".join(f"{name}\0{digest}\n" for name, digest in files).encode()).hexdigest()
