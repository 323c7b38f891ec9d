"""Text of a run file in a model card: it is shown as it is, and means nothing to Markdown, HTML or YAML."""

from __future__ import annotations

import re

LONGEST = 160  # characters of a name that are shown
_MARKDOWN = re.compile(r"([\\`*_\[\]|~$#])")
_HTML = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "@": "&#64;", "://": "&#58;//", "www.": "www&#46;"}  # no links, no mentions


def one_line(text: str, longest: int | None = None) -> str:
    """The text without line ends, controls and marks that turn its direction; at most `longest` characters."""
    clean = "".join(sign if sign.isprintable() else " " for sign in text).strip()
    return clean if longest is None or len(clean) <= longest else clean[: longest - 3] + "..."


def escaped(text: str, longest: int = LONGEST) -> str:
    """The text for a sentence or a table's cell in Markdown."""
    clean = _MARKDOWN.sub(r"\\\1", one_line(text, longest))
    for sign, entity in _HTML.items():
        clean = clean.replace(sign, entity)
    return clean


def fenced(lines: list[str], language: str = "") -> str:
    """Lines of code, whatever they hold: the fence is longer than any in them, and no comment begins or ends there."""
    text = "\n".join(one_line(line).replace("<!--", "<! --").replace("-->", "-- >") for line in lines)
    longest = max((len(found) for found in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"
