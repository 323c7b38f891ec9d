"""What is said of paired scores: bootstrap intervals of differences, discordant pairs, and the exact McNemar test."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95


def mean_difference(
    scores: Sequence[float], dense: Sequence[float], seed: int, weights: Sequence[float] | None = None
) -> dict[str, float | None]:
    """The mean of `scores - dense`, item by item, with its percentile-bootstrap interval.

    Args: weights: of the items (tokens scored, for instance); None: all alike.
    Returns: mean, low, high; the ends are None with fewer than two items.
    """
    differences = np.asarray(scores, dtype=np.float64) - np.asarray(dense, dtype=np.float64)
    return _interval((differences, _weights(weights, len(differences))), _mean, seed)


def perplexity_difference(
    scores: Sequence[float], dense: Sequence[float], seed: int, weights: Sequence[float] | None = None
) -> dict[str, float | None]:
    """The difference of perplexities, of mean negative log likelihoods in nats by window: mean, low, high as above."""

    def statistic(ours: np.ndarray, theirs: np.ndarray, counts: np.ndarray, axis: int = -1) -> np.ndarray:
        found: np.ndarray = np.exp(_mean(ours, counts, axis)) - np.exp(_mean(theirs, counts, axis))
        return found

    samples = (np.asarray(scores, dtype=np.float64), np.asarray(dense, dtype=np.float64), _weights(weights, len(scores)))
    return _interval(samples, statistic, seed)


def discordant(right: Sequence[bool], dense_right: Sequence[bool]) -> dict[str, float | int]:
    """Pairs that only one of both got right, and McNemar's exact p: a two-sided binomial test on them.

    Returns: better: right where dense was wrong; worse: the reverse; p: 1 where no pair is discordant.
    """
    from scipy.stats import binomtest

    pairs = list(zip(right, dense_right, strict=True))
    better = sum(ours and not theirs for ours, theirs in pairs)
    worse = sum(theirs and not ours for ours, theirs in pairs)
    p = float(binomtest(better, better + worse, 0.5).pvalue) if better + worse else 1.0
    return {"better": better, "worse": worse, "p": p}


def _weights(weights: Sequence[float] | None, count: int) -> np.ndarray:
    return np.ones(count) if weights is None else np.asarray(weights, dtype=np.float64)


def _mean(values: np.ndarray, weights: np.ndarray, axis: int = -1) -> np.ndarray:
    found: np.ndarray = (values * weights).sum(axis=axis) / weights.sum(axis=axis)
    return found


def _interval(samples: tuple[np.ndarray, ...], statistic: Any, seed: int) -> dict[str, float | None]:
    """A statistic of paired samples and its interval; resampling picks whole pairs."""
    from scipy.stats import bootstrap

    value = float(statistic(*samples))
    if len(samples[0]) < 2:
        return {"mean": value, "low": None, "high": None}
    found = bootstrap(
        samples, statistic, n_resamples=RESAMPLES, confidence_level=LEVEL, method="percentile", paired=True,
        vectorized=True, batch=1000, rng=np.random.default_rng(seed),
    )  # fmt: skip
    return {"mean": value, "low": float(found.confidence_interval.low), "high": float(found.confidence_interval.high)}
