"""What is said of samples: median and quartiles, ratios, and how something grows with the context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def summary(samples: Sequence[float]) -> dict[str, Any]:
    """Median, quartiles, extremes and number of samples, in the samples' unit.

    Raises: ValueError: there are none.
    """
    if not samples:
        raise ValueError("expected at least one sample, got none.")
    values = np.asarray(samples, dtype=np.float64)
    q1, median, q3 = (float(value) for value in np.quantile(values, (0.25, 0.5, 0.75)))
    return {"median": median, "q1": q1, "q3": q3, "min": float(values.min()), "max": float(values.max()), "n": len(values)}


def ratio(samples: Sequence[float], reference: Sequence[float]) -> dict[str, float]:
    """The ratio of the medians, and the quartiles of the ratios round by round (both are of the same rounds)."""
    rounds = np.asarray(samples, dtype=np.float64) / np.asarray(reference, dtype=np.float64)
    q1, q3 = (float(value) for value in np.quantile(rounds, (0.25, 0.75)))
    return {"median": float(np.median(samples) / np.median(reference)), "q1": q1, "q3": q3}


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float | None:
    """The exponent `p` of `value = c * size ** p`, least squares in log-log; None with fewer than two different sizes."""
    if len(set(sizes)) < 2 or min(values) <= 0:
        return None
    slope, _ = np.polyfit(np.log(np.asarray(sizes, dtype=np.float64)), np.log(np.asarray(values, dtype=np.float64)), 1)
    return float(slope)
