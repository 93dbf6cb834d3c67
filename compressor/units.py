"""Numbers as people read them: three digits and a unit."""

from __future__ import annotations

import math

DASH = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"


def count(value: float) -> str:
    """A number of things: `512`, `3.21 M`, `12.4 G`."""
    return _scaled(value, ("", "k", "M", "G", "T", "P"))


def size(value: float) -> str:
    """A number of bytes, in powers of 1000: `512 B`, `1.4 GB`."""
    return _scaled(value, ("B", "kB", "MB", "GB", "TB"))


def several(number: int, thing: str) -> str:
    """`1 prompt`, `2 prompts`."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def duration(seconds: float) -> str:
    """A time: `340 ms`, `12.3 s`, `3 min 20 s`, `2 h 05 min`."""
    if seconds < 0.0005:
        return "0 s" if seconds == 0 else "< 1 ms"
    if seconds < 0.9995:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min"


def percent(share: float) -> str:
    """A share of 1, to a tenth of a percent; never rounded to 0 or 100 unless it is exactly that."""
    shown = f"{100 * share:.1f}"
    if shown == "0.0" and share > 0:
        return "< 0.1 %"
    if shown == "100.0" and share < 1:
        return "> 99.9 %"
    return f"{shown} %"


def change(before: float, after: float) -> str:
    """How much smaller or larger, in percent of what was before."""
    if before == after:
        return "same"
    if before == 0:
        return DASH
    relative = 100 * (after - before) / before
    if abs(relative) < 0.05:
        return "about the same"
    sign = "+" if relative > 0 else MINUS
    return f"{sign}{abs(relative):.1f} %"


def number(value: float, digits: int = 3) -> str:
    """Any number to so many significant digits, in powers of ten where plain digits would be long."""
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(float(f"{abs(value):.{digits - 1}e}")))
    if exponent < -3 or exponent > 5:
        mantissa, _, power = f"{value:.{digits - 1}e}".partition("e")
        return f"{mantissa}e{int(power)}"
    return f"{value:.{max(digits - 1 - exponent, 0)}f}"


def measured(value: float, error: float | None, unit: str = "", scale: float = 1.0) -> str:
    """A figure with its standard error, cut where the error's second digit lies: `31.2 ± 1.4 dB`."""
    value *= scale
    tail = f" {unit}" if unit else ""
    if error is None or not math.isfinite(value):
        return number(value) + tail
    error *= scale
    if not math.isfinite(error) or error == 0:
        return f"{number(value)} ± {number(error, 2)}{tail}"
    decimals = 1 - math.floor(math.log10(float(f"{error:.1e}")))
    if decimals > 6:
        return f"{number(value)} ± {number(error, 2)}{tail}"
    decimals = max(decimals, 0)
    return f"{value:.{decimals}f} ± {error:.{decimals}f}{tail}"


def _scaled(value: float, units: tuple[str, ...]) -> str:
    power = 0
    while abs(value) >= 999.5 and power < len(units) - 1:
        value, power = value / 1000, power + 1
    digits = f"{value:.0f}" if power == 0 else number(value)
    return f"{digits} {units[power]}".rstrip()
