"""hf_certkv: a quantised KV cache for Hugging Face transformers that proves, at every step, how exact it is.

Importing it has one side effect: the attention implementation `"certkv"` becomes known to transformers, so that
`from_pretrained(..., attn_implementation="certkv")` works.
"""

from .attention import register
from .cache import CertifiedQuantizedCache
from .config import CertKVConfig
from .errors import (
    CachePicklingError,
    CacheStateError,
    CertificateViolation,
    CertKVError,
    ConfigError,
    CorruptedPageError,
    FaultyMemoryError,
    GradientError,
    HostMemoryError,
    InputError,
    MissingDependencyError,
    PeerFailedError,
    StaleHandleError,
    UnsupportedModelError,
)
from .hooks import attach, detach
from .parallel import gather_report
from .report import CertificateReport, MemoryReport

__version__ = "0.1.0"

__all__ = [
    "CachePicklingError",
    "CacheStateError",
    "CertKVConfig",
    "CertKVError",
    "CertificateReport",
    "CertificateViolation",
    "CertifiedQuantizedCache",
    "ConfigError",
    "CorruptedPageError",
    "FaultyMemoryError",
    "GradientError",
    "HostMemoryError",
    "InputError",
    "MemoryReport",
    "MissingDependencyError",
    "PeerFailedError",
    "StaleHandleError",
    "UnsupportedModelError",
    "attach",
    "detach",
    "gather_report",
    "register",
]

register()
