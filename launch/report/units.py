"""Numbers for people: seconds, bytes, counts and shares as short text with their unit."""

from __future__ import annotations

import math

_MINUS = "−"


def seconds_text(seconds: float) -> str:
    """A duration: "0.42 ms", "38 ms", "2.41 s", "51.3 s", "3 min 07 s", "2 h 05 min"."""
    size = abs(seconds)
    sign = _MINUS if seconds < 0 else ""
    if size == 0:
        return "0 s"
    if size < 0.9995:
        milliseconds = size * 1e3
        return f"{sign}{milliseconds:.{_decimals(milliseconds, 2)}f} ms"
    if size < 99.95:
        return f"{sign}{size:.{_decimals(size, 3)}f} s"
    whole = round(size)
    if whole < 3600:
        return f"{sign}{whole // 60} min {whole % 60:02d} s"
    minutes = round(size / 60)
    return f"{sign}{minutes // 60} h {minutes % 60:02d} min"


def bytes_text(num_bytes: float) -> str:
    """A size in decimal units: "0 B", "312 B", "4.20 MB", "1.05 GB"."""
    size, unit = float(num_bytes), "B"
    for larger in ("kB", "MB", "GB", "TB", "PB"):
        if abs(size) < 999.5:
            break
        size, unit = size / 1000, larger
    return f"{size:.0f} B" if unit == "B" else f"{size:.{_decimals(size, 3)}f} {unit}"


def count_text(count: float) -> str:
    """A whole number with thousands separated: "24,327,632"."""
    return f"{count:,.0f}"


def rate_text(rate: float) -> str:
    """A number with three significant digits: "0.532", "80.1", "1,204"."""
    return f"{rate:,.{_decimals(rate, 3)}f}"


def share_text(share: float) -> str:
    """A share as a percentage with one decimal: "12.3%"; "<0.1%" for what is not zero but would read so."""
    if 0 < share < 0.0005:
        return "<0.1%"
    return f"{share * 100:.1f}%".replace("-", _MINUS)


def short_count(value: float) -> str:
    """An axis label: "0", "250", "1.5k", "40k", "2M"."""
    for scale, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= scale:
            return f"{value / scale:g}{suffix}"
    return f"{value:g}"


def plural(count: int, noun: str) -> str:
    """ "1 rank", "16 ranks"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _decimals(value: float, digits: int) -> int:
    """Decimals that give `digits` significant digits, none for numbers of that many digits and more."""
    if value == 0 or not math.isfinite(value):
        return 0
    rounded = float(f"{abs(value):.{digits - 1}e}")  # 0.9996 has the decimals of 1.00
    return max(0, digits - 1 - math.floor(math.log10(rounded) + 1e-9))
