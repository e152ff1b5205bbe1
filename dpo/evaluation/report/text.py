"""How numbers and foreign text are written for people."""

import json
import math
import re
from collections.abc import Iterable
from typing import Any

from dpo.estimates import Estimate

MINUS = "−"
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
_MOST_DECIMALS = 8


def clean(text: str) -> str:
    """Replace what neither UTF-8 nor HTML nor XML can hold: control characters and lone surrogates."""
    return _FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", text)


def shorten(text: str, length: int) -> str:
    """Return it on one line of at most `length` characters, an ellipsis at the end where some are left out."""
    line = " ".join(text[: 4 * length].split())
    return line if len(line) <= length and len(text) <= 4 * length else line[: length - 1].rstrip() + "…"


def has_interval(estimate: Estimate) -> bool:
    """Tell whether there is an interval to show: one unit has none."""
    return estimate.n > 1 and math.isfinite(estimate.low) and math.isfinite(estimate.high)


def decimals(estimates: Iterable[Estimate]) -> int:
    """Return the decimals that show the narrowest interval's half-width to one digit, for a whole column.

    To two digits where the first is a 1, as rounding to one could change it by half; numbers without an interval get
    three digits.
    """
    known = [one for one in estimates if math.isfinite(one.value)]
    halves = [one.half_width for one in known if has_interval(one) and one.half_width > 0]
    if halves:
        size = math.floor(math.log10(min(halves)))
        return _clipped(-size + (min(halves) < 2 * 10.0**size))
    largest = max((abs(one.value) for one in known), default=0.0)
    return _clipped(2 - math.floor(math.log10(largest))) if largest > 0 else 0


def number(value: float, places: int, signed: bool = False) -> str:
    """Return it with so many decimals, thousands apart, and a true minus sign."""
    if not math.isfinite(value):
        return "not finite"
    text = f"{value:{'+' if signed else ''},.{places}f}"
    if not text.strip("+-0.,"):  # no sign on what rounds to 0
        text = text.lstrip("+-")
    return text.replace("-", MINUS)


def chance(p: float) -> str:
    """Return a p-value to two digits."""
    if not math.isfinite(p):
        return "not finite"
    if p < 0.001:
        return "< 0.001"
    return f"{p:.2f}" if p >= 0.0995 else f"{p:.3f}"


def duration(seconds: float) -> str:
    """Return it in the two largest of its units."""
    if not math.isfinite(seconds):
        return "not finite"
    if seconds < 99.5:
        return f"{seconds:.0f} s" if seconds >= 9.95 else f"{seconds:.1f} s"
    if seconds < 3599.5:
        return f"{int(seconds + 0.5) // 60} min {int(seconds + 0.5) % 60:02} s"
    minutes = int(seconds / 60 + 0.5)
    return f"{minutes // 60} h {minutes % 60:02} min"


def memory(count: float) -> str:
    """Return bytes in GiB, or MiB where that is less than one."""
    if not math.isfinite(count):
        return "not finite"
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def setting(value: Any) -> str:
    """Return a setting's value as a run file would show it."""
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False, default=str)


def _clipped(places: int) -> int:
    return min(max(places, 0), _MOST_DECIMALS)
