"""How the time of training is counted, so that it can be compared between runs."""

import time


def clock() -> str:
    """Return "wall" where an accelerator works, else "cpu"."""
    import torch

    return "wall" if torch.accelerator.is_available() else "cpu"


def seconds() -> float:
    """Seconds since some moment.

    Without an accelerator these are CPU seconds of this process over its threads: what the work takes on free cores,
    whatever else the machine does.
    """
    import torch

    return time.perf_counter() if clock() == "wall" else time.process_time() / torch.get_num_threads()
