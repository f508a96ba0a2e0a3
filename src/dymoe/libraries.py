"""What dymoe needs of other libraries: of its extras that they are there, of all what they do not promise, and quiet.

Both are looked for where they are used, an error where missing. Each need of a name has one place, which names it to a
function of this module; tests/test_libraries.py holds all of them against the installed versions.
"""

import inspect
import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from dymoe.errors import DymoeError

EXTRAS = {
    "pocket": ("timm", "gguf", "sentencepiece", "google.protobuf"),  # the pocket model, and a tokenizer.model
    "report": ("pandas", "plotly", "jinja2"),
    "play": ("gradio", "plotly"),
    "quantization": ("bitsandbytes",),
    "deepspeed": ("deepspeed",),
}


def require_extra(extra: str, use: str) -> None:
    """Refuse to go on without the modules of one of dymoe's extras.

    Args:
        extra: its name in `EXTRAS`.
        use: what needs it, for the message: a command, a file or a recipe's key.

    Raises:
        DymoeError: one is not installed; the message has the command that installs the extra.
    """
    missing = [name for name in EXTRAS[extra] if not _installed(name)]
    if missing:
        raise DymoeError(
            f"{use}: needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed; "
            f"pip install dymoe[{extra}]"
        )


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the package above it
        return False


def require_names(owner: type, *names: str) -> None:
    """Refuse a class that has not all of these names, which dymoe calls, sets or overrides.

    Raises:
        DymoeError: one is missing.
    """
    _refuse(owner, [name for name in names if not hasattr(owner, name)], "has no")


def require_arguments(owner: type, method: str, *names: str) -> None:
    """Refuse a class whose method does not name all of these arguments.

    Raises:
        DymoeError: one is missing.
    """
    require_names(owner, method)
    known = inspect.signature(getattr(owner, method)).parameters
    _refuse(owner, [name for name in names if name not in known], f"takes in {method} no")


def _refuse(owner: type, missing: Iterable[str], word: str) -> None:
    if missing := list(missing):
        raise untested(owner, f"{word} {', '.join(missing)}")


def untested(owner: Any, what: str) -> DymoeError:
    """The error that a class of another library (or an object of it) is not as dymoe needs it; `what` it does."""
    kind = owner if isinstance(owner, type) else type(owner)
    library = kind.__module__.partition(".")[0]
    version = getattr(import_module(library), "__version__", "")
    return DymoeError(
        f"{kind.__name__} of {f'{library} {version}'.strip()} {what}, which dymoe relies on; install the versions that "
        "it was tested with (requirements.lock in its repository)"
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the progress bars and notes of the libraries below in a block; what goes wrong comes as an exception."""
    from transformers.utils import logging as transformers_logging

    accelerate = logging.getLogger("accelerate")
    level, verbosity = accelerate.level, transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    with warnings.catch_warnings():
        # PEFT still asks transformers for names that version 6 will drop, DDP and DeepSpeed use older names of options.
        for module in ("transformers", "accelerate", "torch.distributed"):
            warnings.filterwarnings("ignore", category=FutureWarning, module=module)
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        accelerate.setLevel(logging.ERROR)
        try:
            yield
        finally:
            accelerate.setLevel(level)
            transformers_logging.set_verbosity(verbosity)
            if bars:
                transformers_logging.enable_progress_bar()
