"""Settings of the whole suite: one thread a process (two when it is alone), no network, no progress bars."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
# Threads that spin while they wait cost a shared machine more than they gain.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

if not torch.cuda.is_available():  # before anything imports Triton: its interpreter runs the kernels on the CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A tiny FastVLM with random weights, saved as a folder that a recipe's `model` can name."""
    from tests.learning.tiny import save_tiny

    return save_tiny(tmp_path_factory.mktemp("tiny") / "model")
