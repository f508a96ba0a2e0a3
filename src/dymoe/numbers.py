"""Numbers as they are shown, and which of them can be computed with."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

SMALLEST, LARGEST = 1e-30, 1e30
WORKABLE = f"0 or a number between {SMALLEST:g} and {LARGEST:g} in size"


def workable(value: float) -> bool:
    """Whether a number, and its inverse, are far from where single precision ends; infinity and nan are not.

    >>> workable(0.01), workable(1e-320), workable(float("inf"))
    (True, False, False)
    """
    return value == 0 or SMALLEST <= abs(value) <= LARGEST


def number(value: "float | Stat | None", digits: int = 1, sign: bool = False) -> str:
    """A number as the page shows it, with a real minus sign; an en dash where there is none (None, NaN)."""
    if value is None or value != value:
        return "–"
    if isinstance(value, Stat):
        return value.text(digits, sign)
    rounded = round(value, digits) + 0.0  # -0.0 becomes 0.0
    return f"{rounded:+.{digits}f}".replace("-", "−") if sign else f"{rounded:.{digits}f}".replace("-", "−")


@dataclass(frozen=True)
class Stat:
    """A mean over the seeds of a method and the sample standard deviation (None for a single seed)."""

    mean: float
    spread: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Stat":
        """Mean and spread of at least one value."""
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)

    def text(self, digits: int = 1, sign: bool = False) -> str:
        """As in "61.2 ± 0.4"."""
        spread = "" if self.spread is None else f" ± {number(self.spread, digits)}"
        return number(self.mean, digits, sign) + spread
