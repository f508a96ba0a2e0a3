"""The stream "coin": the CoIN benchmark's own files, in any of the layouts in which they are published."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Longest answers in tokens, the end token included: what the task's answers need, and CoIN's own."""

    short: int
    coin: int


# The short ones: a letter; words; a label of up to eight words; a box of four numbers, two tokens a digit at most;
# names of several authors.
TASKS = {
    "ScienceQA": Limits(16, 1024),
    "TextVQA": Limits(32, 128),
    "ImageNet": Limits(32, 1024),
    "GQA": Limits(16, 128),
    "VizWiz": Limits(32, 128),
    "Grounding": Limits(48, 1024),
    "VQAv2": Limits(16, 1024),
    "OCRVQA": Limits(64, 128),
}
