"""Figures as a reader sees them: shares in percent, signed differences with as many digits as their interval deserves."""

from __future__ import annotations

import json
import math
from decimal import ROUND_CEILING, Context
from typing import Any

from ..report import human_bytes

NONE = DASH = "\u2013"  # where there is no figure; and from one figure to another
MINUS = "\u2212"
MOST_DECIMALS = 8


def short(value: float | None, digits: int = 3) -> str:
    """Three digits, without an exponent where it can be avoided."""
    if value is None:
        return NONE
    if math.isinf(value):
        return "∞" if value > 0 else f"{MINUS}∞"
    if value == 0:
        return "0"
    if abs(value) >= 10**digits:
        return minus(f"{value:,.0f}") if abs(value) < 1e12 else minus(f"{value:.2e}")
    place = digits - 1 - math.floor(math.log10(abs(value)))
    return minus(f"{value:.{place}f}") if place <= MOST_DECIMALS else minus(f"{value:.{digits - 1}e}")


def percent(share: float | None, digits: int = 3) -> str:
    """A share in percent, three digits: bounds and errors."""
    return NONE if share is None else short(100 * share, digits) + (" %" if math.isfinite(share) else "")


def upward(share: float | None, digits: int = 3) -> str:
    """A share in percent with so many digits, rounded up: a bound must not look smaller than it is."""
    if share is None or not math.isfinite(share):
        return percent(share, digits)
    return percent(float(Context(prec=digits, rounding=ROUND_CEILING).create_decimal_from_float(share)), digits)


def part_of(part: float, whole: float) -> str:
    """A share of counts in percent; what is neither none nor all never shows as that."""
    if whole <= 0:
        return NONE
    text = f"{100 * part / whole:.1f}"
    if text == "0.0" and part > 0:
        return "< 0.1 %"
    if text == "100.0" and part < whole:
        return "> 99.9 %"
    return text + " %"


def tolerance_text(rtol: float) -> str:
    """A tolerance in percent as it was set: all its digits, no others."""
    return f"{100 * rtol:.6g} %"


def minus(text: str) -> str:
    """With a minus sign that is as wide as a plus."""
    return text.replace("-", MINUS)


def signed(value: float, decimals: int) -> str:
    """With its sign, also of what rounds to 0; a plain 0 for exactly none."""
    return "0" if value == 0 else minus(f"{value:+,.{decimals}f}")


def decimals_for(interval: dict[str, Any]) -> int:
    """Decimals that show two digits of an interval's width, or of the mean where there is none."""
    low, high = interval.get("low"), interval.get("high")
    width = abs(interval["mean"]) if low is None or high is None else high - low
    if width <= 0:
        width = abs(interval["mean"])
    return 3 if width <= 0 else min(MOST_DECIMALS, max(0, 1 - math.floor(math.log10(width))))


def difference(interval: dict[str, Any] | None, scale: float = 1.0) -> tuple[str, str]:
    """A mean difference, and its interval as text; the second is empty where there is none."""
    if interval is None:
        return NONE, ""
    scaled = {
        key: None if value is None else scale * value for key, value in interval.items() if key in ("mean", "low", "high")
    }
    places = decimals_for(scaled)
    low, high = scaled.get("low"), scaled.get("high")
    ends = "" if low is None or high is None else f"{signed(low, places)} to {signed(high, places)}"
    return signed(scale * interval["mean"], places), ends


def p_value(p: float | None) -> str:
    """A probability, never shown as 0."""
    if p is None:
        return NONE
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def tokens(count: int) -> str:
    """A context: powers of two as multiples of 1024."""
    if count >= 1024 and count % 1024 == 0:
        return f"{count // 1024 // 1024}M" if count % 2**20 == 0 else f"{count // 1024}K"
    return f"{count:,}"


def size(count: float | None) -> str:
    """Bytes with a binary unit."""
    return NONE if count is None else human_bytes(count)


def seconds(count: float | None) -> str:
    """A time, in the unit that suits it."""
    if count is None:
        return NONE
    if count < 120:
        return f"{count:.0f} s"
    return f"{count / 60:.0f} min" if count < 7200 else f"{count / 3600:.1f} h"


def plain(value: Any) -> str:
    """A setting or a version as it is written in JSON; strings without quotes, lists without brackets, null as a dash."""
    if value is None:
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and abs(value) >= 10_000:
        return minus(f"{value:,}") if abs(value) < 10**18 else short(float(value))
    if isinstance(value, float) and math.isinf(value):
        return short(value)
    if isinstance(value, list):
        return ", ".join(plain(part) for part in value) or NONE
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
