"""What `dymoe doctor` found: single findings, and all of them with what each task takes and which recipes fit."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Level = Literal["wrong", "note", "fine"]


@dataclass(frozen=True)
class Finding:
    """One thing that was checked.

    Attributes:
        level: ``wrong`` (the run would fail or mislead), ``note`` or ``fine``.
        what: what was checked.
        where: task, file or recipe.
        result: what the check gave.
        mend: what to do about it.
    """

    level: Level
    what: str
    where: str
    result: str
    mend: str = ""


@dataclass
class Checkup:
    """All findings, what each task takes, which recipes fit.

    Attributes:
        findings: in the order of the checks.
        tasks: task, training records, tokens of a sample (mean, longest), estimated hours.
        fits: recipe, bytes at its peak, whether this machine holds them.
        machine: device, its bytes, versions.
        unusable: every sample that cannot be used: task, split, position, id, file, record, kind, error.
    """

    findings: list[Finding] = field(default_factory=list)
    tasks: list[dict[str, Any]] = field(default_factory=list)
    fits: list[dict[str, Any]] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=dict)
    unusable: list[dict[str, Any]] = field(default_factory=list)

    @property
    def wrong(self) -> int:
        """How many findings are wrong."""
        return sum(finding.level == "wrong" for finding in self.findings)

    def add(self, level: Level, what: str, where: str, result: str, mend: str = "") -> None:
        """One more finding."""
        self.findings.append(Finding(level, what, where, result, mend))

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON can hold it, with how many findings are wrong."""
        return {**asdict(self), "wrong": self.wrong}
