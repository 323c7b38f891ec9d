"""Where the tests of the Triton kernels run: in the interpreter on the CPU, or on what CERTKV_TEST_DEVICE names.

To be imported before torch, which imports triton: whether it interprets is settled then.
"""

from __future__ import annotations

import os

DEVICE = os.environ.get("CERTKV_TEST_DEVICE", "cpu")
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")
