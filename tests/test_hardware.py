"""The table of hardware: known rows by name, and the machine at hand measured."""

import pytest

from research.errors import UserError
from research.plan.hardware import HARDWARE, hardware, measure_cpu


def test_rows_are_complete_and_sourced() -> None:
    for name, row in HARDWARE.items():
        assert hardware(name) is row and row.source and 0 < row.utilisation <= 1
        assert row.multiplies["int8"] > row.multiplies["bfloat16"] > row.multiplies["float32"] > 0
        assert row.memory_bandwidth > row.link_bandwidth > 0 and row.memory_bytes > 10**10
    with pytest.raises(UserError, match=r"hardware 'v6' is not in the table; did you mean 'v6e'"):
        hardware("v6")


def test_simulated_devices_share_the_machine() -> None:
    """Measured twice, so only the memory is exact; a product of 1024³ takes some milliseconds on any machine."""
    one, four = measure_cpu(1), measure_cpu(4)
    assert one.memory_bytes // 4 == four.memory_bytes
    assert 1e9 < one.multiplies["float32"] < 1e14 and 1e8 < one.memory_bandwidth < 1e13
    assert one.seconds_of({"float32": one.multiplies["float32"]}) == 1.0
