"""Runs `dymoe` where accelerate's FSDP and DeepSpeed work on a CPU: `accelerate launch ... on_cpu.py run RECIPE`.

accelerate shards on accelerators alone: with `cpu=True` it ignores both. What it does after that question works on a
CPU as well (gloo), so here it takes this machine's CPU for an accelerator. Nothing else is changed.
"""

import os
import sys

os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
os.environ["DS_ACCELERATOR"] = "cpu"

from accelerate.state import PartialState
from accelerate.utils import DistributedType

_init = PartialState.__init__


def _prepare_backend(self, cpu=False, sagemaker_dp=False, backend=None):
    return "gloo", DistributedType.MULTI_GPU


def _init_on_cpu(self, cpu=False, **kwargs):
    _init(self, cpu=False, **kwargs)


PartialState._prepare_backend = _prepare_backend
PartialState.__init__ = _init_on_cpu

if __name__ == "__main__":
    from dymoe.cli import main

    sys.exit(main(sys.argv[1:]))
