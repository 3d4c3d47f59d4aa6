"""What every test stands on: eight simulated CPU devices, strict promotion of dtypes and ranks, repeatable examples."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import jax
import pytest
from compiled_programs import OPTIONS, QUICK
from jax.sharding import AxisType, Mesh

from research.config import MeshConfig
from research.mesh import make_mesh

DEVICES = 8

# Before the first computation, and whatever the environment says: the suite states figures of simulated CPU devices.
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", DEVICES)
# Mixing int8, bfloat16 and float32 by accident is the mistake that quantization code is prone to.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

for name, value in OPTIONS.items():
    jax.config.update(name, value)

# Examples from a fixed seed: a failure in one run is a failure in the next. No deadline: the first call compiles.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, database=None, max_examples=50)
hypothesis.settings.load_profile("repeatable")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --optimized."""
    parser.addoption("--optimized", action="store_true", help="compile all that is asked for as users do")


def pytest_configure(config: pytest.Config) -> None:
    """Compile quickly, but for tests with the marker `optimized` where .ci/run asks for these.

    Nearly all of the suite's time is compilation. Layouts, traffic and what is close say the same at every level of
    the compiler; two programs may keep a promise of the same bits at one level only, and memory depends on it.
    """
    asked = config.getoption("markexpr")
    if ("not slow" in asked or "not optimized" in asked) and not config.getoption("--optimized"):
        os.environ["XLA_FLAGS"] = QUICK  # read at the first compilation, here and in the scripts that tests start


# Long files first: one that begins last would run alone, on one of the cores.
LONG_FILES = ("test_scripts.py", "test_step.py", "test_optimizer_exam.py", "test_transformer.py", "test_state.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of `LONG_FILES` in front; the order within a file stays."""
    items.sort(key=lambda item: LONG_FILES.index(item.path.name) if item.path.name in LONG_FILES else len(LONG_FILES))


@pytest.fixture(autouse=True, scope="session")
def simulated_devices() -> None:
    """Fail at once, with the reason, where the devices are not those that the tests are written for."""
    found = jax.devices()
    assert len(found) == DEVICES and found[0].platform == "cpu", f"need {DEVICES} simulated CPU devices, have {found}"


_MAPPINGS, _LIMIT = Path("/proc/self/maps"), Path("/proc/sys/vm/max_map_count")
_compiled = 0


def _count_compilation(event: str, duration_secs: float, **_: object) -> None:
    global _compiled
    _compiled += event.endswith("backend_compile_duration")


jax.monitoring.register_event_duration_secs_listener(_count_compilation)


@pytest.fixture(autouse=True)
def room_for_programs() -> Iterator[None]:
    """Drop compiled programs before they fill up the process's table of mappings.

    Each program of eight CPU devices takes some 200 of the 65,530 mappings that Linux grants a process. Without this a
    worker that has run some thirty training steps on different meshes crashes inside the compiler.
    """
    global _compiled
    yield
    if _compiled >= 40 and _MAPPINGS.exists():  # looking takes a few milliseconds
        _compiled = 0
        if len(_MAPPINGS.read_bytes().splitlines()) > int(_LIMIT.read_text()) // 2:
            jax.clear_caches()


@pytest.fixture(scope="session")
def mesh_of() -> Callable[..., Mesh]:
    """Return `mesh_of(data=1, fsdp=1, tensor=1, axis_type=Auto)`: a mesh over the first of the simulated devices."""

    def make(axis_type: AxisType = AxisType.Auto, **sizes: int) -> Mesh:
        return make_mesh(MeshConfig(**sizes), axis_type=axis_type)

    return make
