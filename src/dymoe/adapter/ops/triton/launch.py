"""Where the Triton kernels can run, and what every launch shares."""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from dymoe.errors import DymoeError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def interpreted() -> bool:
    """Whether Triton's interpreter is asked for (TRITON_INTERPRET=1): kernels then run on the CPU, slowly."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


def missing(device: torch.device) -> str | None:
    """Return why the kernels cannot run on tensors of this device, or None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed (pip install triton; Linux only)"
    if device.type == "cpu" and not interpreted():
        return "the tensors are on the CPU and Triton needs a GPU (TRITON_INTERPRET=1 runs the kernels slowly without)"
    if device.type not in ("cpu", "cuda"):
        return f"the kernels do not run on {device.type}"
    if device.type == "cuda" and torch.version.hip is not None:
        return "the kernels are for NVIDIA GPUs, this torch is built for AMD's"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return (
            f"the kernels need compute capability 8.0 (Ampere) or newer, {torch.cuda.get_device_name(device)} has less"
        )
    return None


def require(device: torch.device) -> None:
    """Check that the kernels can run on this device.

    Raises:
        DymoeError: they cannot; the message says why and what to use instead.
    """
    reason = missing(device)
    if reason is not None:
        raise DymoeError(f'compute="triton": {reason}; use compute="stacked"')


@contextmanager
def plain(x: Tensor) -> Iterator[None]:
    """Run on the GPU of `x` and without autocast: dtypes here are chosen by hand."""
    guard = torch.cuda.device(x.device) if x.is_cuda else nullcontext()
    with guard, torch.autocast(x.device.type, enabled=False):
        yield


def power_of_two(number: int, least: int = 1) -> int:
    """The smallest power of two that is at least `number` and `least`."""
    return max(least, 1 << (max(number, 1) - 1).bit_length())


def wide_product(x: Tensor, rows: Tensor, into: torch.dtype = torch.float32) -> Tensor:
    """x @ rows^T with its sums kept in float32, for 16-bit operands too.

    Args:
        x: (tokens, features).
        rows: (rows, features), same dtype.
        into: dtype of the result.

    Returns:
        (tokens, rows).
    """
    if x.dtype == into:
        return torch.mm(x, rows.t())
    if x.is_cuda and x.numel() and rows.numel():
        return torch.mm(x, rows.t(), out_dtype=into)
    return torch.mm(x.to(into), rows.t().to(into))  # elsewhere there is no product into a wider dtype
