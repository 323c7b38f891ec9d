"""What every part of the laboratory is given and gives back: a clock to keep to, and a result."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

MOST_FAILURES = 20  # kept in words; the rest is counted


@dataclass
class Part:
    """The outcome of one part.

    Attributes: name: short and stable, for JSON; claim: what holds if it passed, in one line; unit: what was counted;
        checked: how many of them; failed: how many did not hold; failures: the first of those, in words; figures: plain JSON
        types; seconds: how long it took; skipped: why nothing could be checked here, or empty.
    """

    name: str
    claim: str
    unit: str
    checked: int = 0
    failed: int = 0
    failures: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    skipped: str = ""

    def fail(self, what: str) -> None:
        """Count a failure."""
        self.failed += 1
        if len(self.failures) < MOST_FAILURES:
            self.failures.append(what)

    def headline(self) -> dict[str, str]:
        """Figures that are single numbers or texts, for a table."""
        return {name: _short(figure) for name, figure in self.figures.items() if isinstance(figure, (int, float, str))}

    @property
    def passed(self) -> bool:
        """Something was checked, and nothing failed."""
        return self.checked > 0 and self.failed == 0


def _short(figure: int | float | str) -> str:
    if isinstance(figure, (bool, str)):
        return str(figure)
    return f"{figure:,}" if isinstance(figure, int) else f"{figure:.6g}"


class Clock:
    """A budget in seconds, and where progress is told.

    Args: seconds: the budget; tell: called with the share of the budget or of the work that is done, and a short text.
    """

    def __init__(self, seconds: float, tell: Callable[[float, str], None] | None = None) -> None:
        self.start, self.seconds = time.monotonic(), seconds
        self._tell = tell

    @property
    def spent(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.start

    def over(self) -> bool:
        """Whether the budget is used up. A part does its smallest sensible amount of work even if it is from the start."""
        return self.spent >= self.seconds

    def tell(self, text: str, share: float | None = None) -> None:
        """Say how far things are; `share` where the amount of work is known, else that of the time."""
        if self._tell is not None:
            self._tell(min(1.0, self.spent / max(self.seconds, 1e-9)) if share is None else share, text)
