"""Numbers as people read them: bytes, durations, counts, rates. The one place, so that all output speaks alike.

Bytes are in binary units (1 MiB = 2**20 bytes), as memory is sold.
"""

import math

_MINUTE, _HOUR, _DAY = 60, 3600, 86400


def _three_digits(value: float) -> str:
    """Return a number of 0 to 9999 with three significant digits at least, and no exponent."""
    for digits, below in ((2, 9.995), (1, 99.95)):
        if value < below:
            return f"{value:.{digits}f}"
    return f"{value:.0f}"


def format_bytes(size: int) -> str:
    """Return `size` bytes as text, e.g. "37.2 MiB"."""
    if size < 1024:
        return f"{size} B"
    value = float(size)
    units = ("KiB", "MiB", "GiB", "TiB", "PiB")
    for unit in units:
        value /= 1024
        if value < 1023.5 or unit == units[-1]:  # 1023.5 would be printed as 1024
            return f"{_three_digits(value)} {unit}"
    raise AssertionError("unreachable: the last unit takes any size")


def format_count(count: int) -> str:
    """Return how many, e.g. "134.5 M"."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return str(count)


def format_duration(seconds: float) -> str:
    """Return a time span, e.g. "2 min 05 s"; "?" where it is not known (NaN or infinite)."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < _MINUTE:
        return f"{whole} s"
    if whole < _HOUR:
        return f"{whole // _MINUTE} min {whole % _MINUTE:02d} s"
    if whole < _DAY:
        return f"{whole // _HOUR} h {whole % _HOUR // _MINUTE:02d} min"
    return f"{whole // _DAY} d {whole % _DAY // _HOUR:02d} h"


def format_rate(tokens_per_second: float) -> str:
    """Return a speed, e.g. "71 tokens/s" or "4,210 tokens/s"."""
    digits = 1 if tokens_per_second < 9.95 else 0
    return f"{tokens_per_second:,.{digits}f} tokens/s"
