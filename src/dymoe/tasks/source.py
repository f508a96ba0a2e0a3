"""Where a stream's files are and how they are read: the key ``data`` of a recipe."""

from dataclasses import dataclass
from typing import Literal

from dymoe.schema import LesserShare, check_fields


@dataclass(frozen=True)
class Source:
    """What a stream that lives in files needs to know; the pocket stream ignores it.

    Attributes:
        root: the folder that holds the instruction folders and, mostly, the image tree.
        images: the image root, found below `root` when none (``cl_dataset``).
        instructions_folder: the folder with one folder per task, found when none.
        variant: whose tree it is; ``auto`` takes any.
        train_file: name of the training files (``train_x20`` in SEFE's tree), found when none.
        templates: where the text of the instruction type asked for is not there, replace the sentence in the
            original text by the type's template.
        on_bad: whether a record that cannot be used ends the run or is left out, counted and listed.
        scoring: CoIN's rules, flaw for flaw, or the corrected ones.
        generation: longest answers: ``short`` as much as the task's answers need, ``coin`` as CoIN generates.
        validation_share: share of the training records held out for validation, at most 1000 of a task.
        outside_links: allow images behind symbolic links that leave the image root.
    """

    root: str | None = None
    images: str | None = None
    instructions_folder: str | None = None
    variant: Literal["auto", "coin", "fork", "sefe"] = "auto"
    train_file: str | None = None
    templates: bool = False
    on_bad: Literal["error", "skip"] = "error"
    scoring: Literal["coin", "corrected"] = "corrected"
    generation: Literal["short", "coin"] = "short"
    validation_share: LesserShare = 0.02
    outside_links: bool = False

    def __post_init__(self) -> None:
        """Refuse a share that leaves nothing to train on."""
        check_fields(self)
