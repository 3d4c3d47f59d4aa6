"""The table of hardware: known rows by name, and the machine at hand measured."""

import pytest

from research.errors import UserError
from research.plan.cards import CARDS
from research.plan.hardware import HARDWARE, hardware, measure_cpu


def test_rows_are_complete_and_sourced() -> None:
    for name, row in HARDWARE.items():
        assert hardware(name).source == row.source and row.source and 0 < row.utilisation <= 1
        assert row.multiplies["int8"] > row.multiplies["bfloat16"] > row.multiplies["float32"] > 0
        assert row.memory_bandwidth > row.link_bandwidth > 0 and row.memory_bytes > 10**10
        assert (row.link_bandwidth > row.network_bandwidth > 0) == (name in CARDS)
    with pytest.raises(UserError, match=r"hardware 'v6' is not in the table; did you mean 'v6e'"):
        hardware("v6")


@pytest.mark.parametrize(("name", "given", "share"), (("", "", 0.75), ("", "0.9", 0.9), ("PYTHON_", "0.5", 0.5)))
def test_programs_get_the_share_of_a_gpu_that_jax_takes(
    monkeypatch: pytest.MonkeyPatch, name: str, given: str, share: float
) -> None:
    for variable in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv(f"XLA_{name}CLIENT_MEM_FRACTION", given)
    assert hardware("h100").memory_bytes == int(share * CARDS["h100"].memory_bytes)
    assert hardware("h100").memory_note.startswith(f"{100 * share:.0f} % of the GPU")
    assert hardware("v5p") is HARDWARE["v5p"]


@pytest.mark.parametrize("given", ("most", "0", "1.5"))
def test_a_share_that_is_none_is_a_mistake(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", given)
    with pytest.raises(UserError, match=f"XLA_CLIENT_MEM_FRACTION='{given}': give the share"):
        hardware("h100")


def test_simulated_devices_share_the_machine() -> None:
    """Measured twice, so only the memory is exact; a product of 1024³ takes some milliseconds on any machine."""
    one, four = measure_cpu(1), measure_cpu(4)
    assert one.memory_bytes // 4 == four.memory_bytes
    assert 1e9 < one.multiplies["float32"] < 1e14 and 1e8 < one.memory_bandwidth < 1e13
    assert one.seconds_of({"float32": one.multiplies["float32"]}) == 1.0
