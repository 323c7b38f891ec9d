"""The typed errors of the package: each message says what was given, what was expected and what to do."""

from __future__ import annotations

from typing import Any


class CertKVError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(CertKVError, ValueError):
    """A setting is outside what it may be."""


class UnsupportedModelError(CertKVError, ValueError):
    """The model or its cache layout cannot be served; raised at construction, never later."""


class InputError(CertKVError, ValueError):
    """Keys, values, queries or indices do not fit what the cache holds."""


class HostMemoryError(CertKVError, MemoryError):
    """The host refused memory for the originals; the cache is as it was before the step."""


class CorruptedPageError(CertKVError, RuntimeError):
    """A page of originals no longer has the checksum it was written with; nothing was returned from it."""


class FaultyMemoryError(CertKVError, RuntimeError):
    """A quantised block was damaged, and what was written to repair it did not stay as written."""


class PeerFailedError(CertKVError, RuntimeError):
    """Another rank of a tensor-parallel model failed in this step, or cannot be reached; this rank has undone the step too."""


class StaleHandleError(CertKVError, RuntimeError):
    """Keys or values returned by `update` were used after the cache was cropped, reordered or reset."""


class CacheStateError(CertKVError, RuntimeError):
    """The layers do not hold the same tokens, or two threads use one cache; the message says what to call."""


class CachePicklingError(CertKVError, TypeError):
    """The cache was pickled; it holds live device buffers and host pages, so it is copied with `copy.deepcopy` only."""


class GradientError(CertKVError, RuntimeError):
    """Keys or values require gradients; a quantised cache cannot be differentiated through."""


class MissingDependencyError(CertKVError, ImportError):
    """An optional package is needed and not installed; the message names the extra that brings it."""


class CertificateViolation(CertKVError, AssertionError):
    """Audit found a true error above the returned bound: a bug in this package.

    `evidence` holds what is needed to reproduce it: layer, step, row and head, bound, true error, query, the attention
    mask and the exact keys and values.
    """

    def __init__(self, message: str, evidence: dict[str, Any]):
        super().__init__(message)
        self.evidence = evidence
