"""How routing changes while a stage trains: a line of JSON for every logged step, in the stage's dynamics.jsonl.

A line holds `step`, `values` (names) and `layers`: the wrapped layer's name -> its values in that order. It is on the
disk before the checkpoint of its step is, so a run that goes on loses none; those after the checkpoint are done again.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypedDict

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dymoe.adapter import RoutingTrace
from dymoe.adapter.trace import STATISTICS, TERMS
from dymoe.errors import DymoeError
from dymoe.files import atomic_write, parse_json, read_bytes
from dymoe.learning.distributed import Processes
from dymoe.schema import Count

VALUES = (*STATISTICS, *TERMS)


class Dynamics(TrainerCallback):
    """Appends what the trace knows of the step just done, for every layer; nothing under a gate without scores.

    With gradient accumulation the values are those of the step's last forward pass, with several processes the mean
    over theirs; process 0 writes.

    Args:
        file: where to.
        every: optimizer steps between two lines; the first and the last step have one too. 0 for none.
        trace: of the model that trains.
        processes: who takes part.
    """

    def __init__(self, file: Path, every: int, trace: RoutingTrace, processes: Processes) -> None:
        self.file = file
        self.every = every
        self.trace = trace
        self.processes = processes

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the step's line if it is due.

        Raises:
            DymoeError: the file cannot be written.
        """
        step = state.global_step
        if not self.every or (step % self.every and step not in (1, state.max_steps)):
            return
        rows = self.trace.by_layer()
        values = {f"{layer} {name}": row[name] for layer, row in rows.items() for name in VALUES}
        means = self.processes.mean(values)
        if not values or not self.processes.main:
            return
        layers = {layer: [round(means[f"{layer} {name}"], 6) for name in VALUES] for layer in rows}
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "values": VALUES, "layers": layers}) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise DymoeError(f"{self.file}: cannot be written ({error.strerror or error})") from error


class Line(TypedDict):
    """A line of dynamics.jsonl."""

    step: Count
    values: list[str]
    layers: dict[str, list[float]]


def lines(file: Path) -> Iterator[Line]:
    """The lines of a stage's dynamics.jsonl, without a last one that a kill cut short; none if there is no file.

    Raises:
        DymoeError: a line is not as it should be; the message names it.
    """
    rows = read_bytes(file).split(b"\n")[:-1] if file.is_file() else ()
    for number, text in enumerate(rows, start=1):
        line = parse_json(text, f"{file}: line {number}", Line)
        if any(len(row) != len(line["values"]) for row in line["layers"].values()):
            raise DymoeError(f"{file}: line {number}: expected {len(line['values'])} values for every layer")
        yield line


def rewind(file: Path, step: int) -> None:
    """Drop the lines after `step`, and one that a kill cut short: a run that goes on does these steps again."""
    if file.is_file():
        rest = [line for line in lines(file) if line["step"] <= step]
        atomic_write(file, "".join(json.dumps(line) + "\n" for line in rest))
