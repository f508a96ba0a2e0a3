"""Learned runs to ask: answers that stream in, and the routing of their tokens. Knows nothing of a page."""

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, cast

from dymoe.errors import DymoeError
from dymoe.tasks import Sample
from dymoe.tasks.records import check_image

if TYPE_CHECKING:
    import pandas as pd

    from dymoe.analysis import Learned

LONGEST = 256  # tokens of an answer, at most
EXAMPLES = 2  # of each task
PATIENCE = 60  # seconds that a question waits for the one before it, which may have been given up


@dataclass(frozen=True)
class Exchange:
    """A question that was put to one stage of a run, with its answer.

    Attributes:
        run: name of the run.
        stage: 0 for the base model alone, else counted from 1.
        sample: picture, question and, in `answer`, what the model said.
    """

    run: str
    stage: int
    sample: Sample


class Runs:
    """Runs in memory, each with its model and all its groups.

    Args:
        paths: run folders; at least one.
        tell: called with a line when a run is being loaded.

    Raises:
        DymoeError: no folder, one given twice, or one that cannot be opened (see `dymoe.analysis.open_run`).
    """

    def __init__(self, paths: Sequence[Path], tell: Any = lambda text: None) -> None:
        if not paths:
            raise DymoeError("play: no run folder given; at least one is needed")
        real = [path.resolve() for path in paths]
        for path, target in zip(paths, real, strict=True):
            if real.count(target) > 1:
                raise DymoeError(f"{path}: this run folder is given more than once; give each run once")
        from dymoe.analysis import open_run

        short = [path.name for path in real]
        self._one_at_a_time = Lock()
        self._runs: dict[str, Learned] = {}
        for path, name in zip(real, short, strict=True):
            tell(f"loading {path}")
            self._runs[name if short.count(name) == 1 else str(path)] = open_run(path)

    @property
    def names(self) -> list[str]:
        """The runs' names: their folders' names, or the whole path where two are called the same."""
        return list(self._runs)

    def __getitem__(self, name: str) -> "Learned":
        """A run by name.

        Raises:
            DymoeError: there is none of this name.
        """
        if name not in self._runs:
            raise DymoeError(f"run {name!r}: not loaded; there is {', '.join(self._runs)}")
        return self._runs[name]

    def stages(self, name: str) -> list[tuple[str, int]]:
        """(label, number) of a run's stages, 0 (the base model) first."""
        return [("0: before learning", 0), *((f"{one.index}: {one.name}", one.index) for one in self[name].stages)]

    def routed(self, name: str) -> list[tuple[int, str]]:
        """Decoder layer and projection of every linear of a run that holds experts, in the model's order."""
        from dymoe.adapter.trace import place_of

        return [place_of(layer.name) for layer in cast(Any, self[name].model.base_model).layers()]

    def examples(self, name: str) -> list[Sample]:
        """Questions that the run was asked, those of different tasks in turn."""
        learned = self[name]
        by_task = [learned.samples(task, None)[:EXAMPLES] for task, _ in learned.tasks.values()]
        return [rows[number] for number in range(EXAMPLES) for rows in by_task if number < len(rows)]

    def ask(self, name: str, stage: int, question: str, picture: bytes | None, longest: int) -> Iterator[Exchange]:
        """Put a question to one stage; the answer so far, the whole of it last.

        Args:
            name: of the run.
            stage: 0 for the base model alone, else counted from 1.
            question: with its instruction, as in training.
            picture: an encoded PNG, JPEG or WebP picture, or None.
            longest: tokens of the answer, at most `LONGEST`.

        Raises:
            DymoeError: no such run or stage, no question, a picture or question that cannot be used.
        """
        learned = self[name]
        if not question.strip():
            raise DymoeError("there is no question; write one, for example: What is in the picture?")
        if not 1 <= longest <= LONGEST:
            raise DymoeError(f"longest answer: expected 1 to {LONGEST} tokens, got {longest}")
        check_image(picture)
        from dymoe.evaluation.stream import stream

        sample = Sample("question", picture, question, "", {})
        dtype = learned.recipe.training.dtype
        with (
            self._at(name, stage),
            closing(stream(learned.lvlm, learned.collator, sample, longest, dtype)) as answers,  # type: ignore[type-var]
        ):
            for answer in answers:
                yield Exchange(name, stage, Sample("question", picture, question, answer, {}))

    def route(self, exchange: Exchange, layer: int) -> "pd.DataFrame":
        """Type and serving group of every token of question and answer (see `dymoe.analysis.token_routing`).

        Raises:
            DymoeError: the base model was asked, the run's method routes nothing, or no such layer.
        """
        from dymoe.analysis import token_routing

        learned = self[exchange.run]
        if exchange.stage == 0:
            raise DymoeError("before learning there are no experts, so no token is routed")
        learned.require_routing()
        with self._at(exchange.run, exchange.stage):
            dtype = learned.recipe.training.dtype
            return token_routing(
                learned.lvlm, learned.model, learned.collator, exchange.sample, exchange.sample.answer, layer, dtype
            )

    @contextmanager
    def _at(self, name: str, stage: int) -> Iterator[None]:
        """The run's model as `stage` left it while the block runs, for this block alone."""
        learned = self[name]
        if stage:
            learned.chosen_stages([stage])
        if not self._one_at_a_time.acquire(timeout=PATIENCE):
            raise DymoeError("another question is still being answered; ask again when it is")
        try:
            tuner: Any = learned.model.base_model
            if stage == 0:
                tuner.disable_adapter_layers()
            else:
                tuner.enable_adapter_layers()
                learned.activate(stage)
            yield
        finally:
            self._one_at_a_time.release()
