"""Numbers as text: the borders between units, where rounding could print 1024 KiB or 60 s."""

import math

import pytest

from research.units import format_bytes, format_count, format_duration, format_rate


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (10 * 1024 - 1, "10.0 KiB"),
        (1024**2 - 1, "1.00 MiB"),
        (538_060_032, "513 MiB"),
        (8 * 1024**3, "8.00 GiB"),
        (5000 * 1024**5, "5000 PiB"),
    ],
)
def test_bytes(size: int, text: str) -> None:
    assert format_bytes(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.96, "10 s"),
        (59.6, "1 min 00 s"),
        (125, "2 min 05 s"),
        (3599.7, "1 h 00 min"),
        (90_000, "1 d 01 h"),
        (math.nan, "?"),
        (math.inf, "?"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_counts_and_rates() -> None:
    assert [format_count(count) for count in (999, 1500, 134_515_008, 3_000_000_000)] == [
        "999",
        "1.5 k",
        "134.5 M",
        "3.0 G",
    ]
    assert [format_rate(rate) for rate in (0.26, 71.3, 4210)] == ["0.3 tokens/s", "71 tokens/s", "4,210 tokens/s"]
