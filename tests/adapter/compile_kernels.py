"""Compile every Triton kernel that the bank and the gate launch, for a GPU that need not be there.

    python -m tests.adapter.compile_kernels CAPABILITY

runs them on CPU tensors with launching replaced by compiling, for NVIDIA GPUs of this compute capability (80: A100,
90: H100, ...), and prints one JSON line per kernel: its name, registers and bytes of local memory (spilled registers)
a thread and of shared memory a program, as cuobjdump reads them off the machine code.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from dymoe.adapter.ops import ExpertBlock
from dymoe.adapter.ops.triton import bank, launch, route


class NoGPU:
    """What compiling asks of a driver."""

    def __init__(self, capability):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def compile_instead(found):
    run = JITFunction.run

    def compiled(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        found[(self.__name__, kernel.hash)] = kernel

    JITFunction.run = compiled


def launch_all(dtype, experts, tokens):
    """One pass of everything, forward and backward: frozen and trained experts, all forms, all options."""
    features, top_k = 256, 16
    x = torch.zeros(tokens, features, dtype=dtype, requires_grad=True)
    rows = [torch.zeros(n, features, requires_grad=True) for n in (experts - 16, 16)]
    for guidance in (None, *(route.Guidance(16, 0.2, mask) for mask in ("exclusive", "protect"))):
        decision = route.route(x, rows, top_k, 0.01, guidance)
    (decision.scores.sum() + decision.weights.sum()).backward()
    scores = decision.scores.detach().requires_grad_()
    old, new, _ = route.group_mass(scores, 16, top_k, 0.1)
    (old.sum() + new.sum() + route.topk_weights(scores, top_k, 0.1).sum()).backward()

    def block(number, trained):
        return ExpertBlock(*(torch.zeros(number * 4, features, dtype=dtype, requires_grad=trained) for _ in "ab"), 4)

    new = ExpertBlock(block(16, True).a, block(16, True).b, 4, 2.0, 0.05)
    weights = torch.zeros(tokens, experts, requires_grad=True)
    bank.triton(x, weights, [block(experts - 16, False), new], top_k).sum().backward()
    with torch.no_grad():
        bank.triton(x[:1], weights[:1], [block(experts - 16, False), block(16, False)])


def usage(kernel):
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    numbers = {key: int(value) for key, value in re.findall(r"(REG|LOCAL|STACK):(\d+)", text)}
    local = numbers["LOCAL"] + numbers["STACK"]
    return {"registers": numbers["REG"], "local": local, "shared": kernel.metadata.shared}


def main(capability):
    driver.set_active(NoGPU(capability))
    launch.missing = lambda device: None
    found = {}
    compile_instead(found)
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        launch_all(dtype, experts=32, tokens=16)
    launch_all(torch.bfloat16, experts=1024, tokens=2048)
    launch_all(torch.float32, experts=128, tokens=64)
    launch_all(torch.bfloat16, experts=32, tokens=8192)
    for (name, _), kernel in found.items():
        print(json.dumps({"kernel": name, "warps": kernel.metadata.num_warps, **usage(kernel)}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
