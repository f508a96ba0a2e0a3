"""Settings of the whole suite: one thread a process (two when it is alone), no network, no progress bars."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
# Threads that spin while they wait cost a shared machine more than they gain.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import functools
import gc
import signal
from pathlib import Path

import pytest
import torch

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

# A shell that starts the suite in the background lets it ignore SIGINT, and so would the runs that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# What takes long begins first: the workers share the suite by its modules, in this order, and end together.
LONG = (
    *("methods/test_matrix.py", "test_coin_recipes.py", "sweep/test_sweep.py", "learning/test_distributed.py"),
    *("learning/test_resume.py", "test_notebook.py", "test_readme.py", "models/test_families.py"),
    *("report/test_browser.py", "learning/test_trainer.py", "share/test_share.py", "evaluation/test_generate.py"),
)


def pytest_collection_modifyitems(items):
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path, len(LONG)))


def pytest_collection_finish():
    """Every stage of a run collects garbage; what the imports left is none, and going through it would take longer."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A tiny FastVLM with random weights, saved as a folder that a recipe's `model` can name."""
    from tests.learning.tiny import save_tiny

    folder = save_tiny(tmp_path_factory.mktemp("tiny") / "model")
    gc.collect()  # and what a run imports is no garbage either
    gc.freeze()
    return folder


@pytest.fixture(scope="session", autouse=True)
def tasks_read_once():
    """The shipped tasks are read and checked once a process, as they are: a third of a tiny run would go there."""
    from dymoe.tasks.pocket import stream

    read, shipped = stream.load_task, functools.cache(stream.load_task)

    def load_task(name, instructions="original", seed=0, folder=stream.DATA):
        return shipped(name, instructions, seed) if folder == stream.DATA else read(name, instructions, seed, folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "load_task", load_task)
        yield
