"""Settings of the whole suite: two threads, no network, no progress bars."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "2")
# Threads that spin while they wait cost a shared machine more than they gain.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

torch.set_num_threads(2)
