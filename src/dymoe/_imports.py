"""Import hooks, standard library only: work that must happen when another package is imported, and not before.

Two are in use. `import dymoe` must register its method with PEFT without loading PEFT (a command line's `--help` should
not wait for torch). And torchvision must be importable beside a torch that its compiled operators were not built for:
transformers, peft and timm import it, of which only parts in plain Python are used here. The torchvision of PyPI is
built for the CUDA torch of PyPI; beside a CPU torch its library does not load, which it tolerates everywhere but in one
place, where it registers fake (shape-only) versions of its operators without asking whether they exist.

`tools/install.py` also copies this file into the virtual environment, where torchvision then works in any order of
imports.
"""

import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


class Around:
    """A meta-path finder that runs the import of one top-level module through a function.

    Args:
        name: the module's name.
        run: called with a function that executes the module.
    """

    def __init__(self, name: str, run: Callable[[Callable[[], None]], None]) -> None:
        self.name = name
        self.run = run

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the module's own spec with its execution wrapped; None for every other module."""
        if name != self.name:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module
        spec.loader.exec_module = lambda module: self.run(lambda: execute(module))  # type: ignore[method-assign]
        return spec


def around_import(name: str, run: Callable[[Callable[[], None]], None]) -> None:
    """Run the coming import of a top-level module through `run`; the first such wish for a module counts."""
    if not any(getattr(finder, "name", None) == name for finder in sys.meta_path):
        sys.meta_path.insert(0, Around(name, run))  # type: ignore[arg-type]


def after_import(name: str, action: Callable[[], None]) -> None:
    """Run the action after a top-level module was imported; at once if it is imported already."""

    def run(execute: Callable[[], None]) -> None:
        execute()
        action()

    if name in sys.modules:
        action()
    else:
        around_import(name, run)


def tolerate_torchvision() -> None:
    """Let torchvision leave out the fakes of its operators that torch does not know; nothing where all are known."""
    around_import("torchvision", _without_missing_fakes)


def _without_missing_fakes(execute: Callable[[], None]) -> None:
    import torch.library

    original = torch.library.register_fake

    def register_fake(op: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(op, str) and op.startswith("torchvision::") and not hasattr(torch.ops.torchvision, op[13:]):
            return lambda function: function
        return original(op, *args, **kwargs)

    torch.library.register_fake = register_fake
    try:
        execute()
    finally:
        torch.library.register_fake = original
