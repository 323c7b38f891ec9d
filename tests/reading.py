"""What tests read in a text that was made for people."""

from __future__ import annotations

import re


def figure(pattern: str, text: str) -> float:
    """The number that a pattern's group finds."""
    found = re.search(pattern, text)
    assert found is not None, text
    return float(found[1].replace(",", ""))
