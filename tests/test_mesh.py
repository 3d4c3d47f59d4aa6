"""Meshes: what -1 becomes, which shapes are refused with which remedy, and how CPU devices come to be simulated."""

import os
import subprocess
import sys
from math import prod
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from research.config import MeshConfig
from research.errors import UserError
from research.mesh import AXES, describe, make_mesh, prepare_devices, resolve, sizes

ROOT = Path(__file__).parents[1]

# --- sizes


@pytest.mark.parametrize(
    ("asked", "count", "found"),
    [
        ({}, 1, {}),
        ({"tensor": 4}, 4, {"tensor": 4}),
        ({"tensor": 4}, 8, {"tensor": 4}),
        ({"data": -1, "tensor": 2}, 8, {"data": 4, "tensor": 2}),
        ({"tensor": -1}, 8, {"tensor": 8}),
        ({"fsdp": -1, "tensor": 4}, 4, {"fsdp": 1, "tensor": 4}),
        ({"data": 2, "fsdp": -1, "tensor": 2}, 12, {"data": 2, "fsdp": 3, "tensor": 2}),
        ({"replica": -1, "context": 4}, 8, {"replica": 2, "context": 4}),
    ],
)
def test_open_size_is_what_is_left(asked, count, found) -> None:
    assert sizes(resolve(MeshConfig(**asked), count)) == dict.fromkeys(AXES, 1) | found


@pytest.mark.parametrize(
    ("asked", "count", "message"),
    [
        (
            {"tensor": 4},
            2,
            "mesh data=1 fsdp=1 tensor=4 needs 4 devices, 2 found; valid data×fsdp×tensor: 1×1×2, 1×2×1, 2×1×1",
        ),
        ({"data": 2}, 1, "mesh data=2 fsdp=1 tensor=1 needs 2 devices, 1 found; valid data×fsdp×tensor: 1×1×1"),
        (
            {"data": -1, "tensor": 3},
            8,
            "mesh data=-1 fsdp=1 tensor=3: 8 devices can't be split by 3; valid data×fsdp×tensor: "
            "2×1×4, 4×1×2, 1×1×8, 1×2×4, 2×2×2, 8×1×1 and 4 more",
        ),
        (
            {"context": 4},
            2,
            "mesh data=1 fsdp=1 context=4 tensor=1 needs 4 devices, 2 found; valid data×fsdp×context×tensor: 1×1×2×1,",
        ),
        ({"data": -1, "tensor": 8}, 4, "mesh data=-1 fsdp=1 tensor=8 needs 8 devices, 4 found; valid data×fsdp×te"),
        ({"tensor": 10**12}, 512, "mesh data=1 fsdp=1 tensor=1000000000000 needs 1000000000000 devices, 512 found"),
    ],
)
def test_a_shape_that_does_not_fit_names_valid_ones_nearest_first(asked, count, message) -> None:
    with pytest.raises(UserError) as caught:
        resolve(MeshConfig(**asked), count)
    assert str(caught.value).startswith(message)


SIZES = st.lists(st.sampled_from([1, 2, 3, 4, 8]), min_size=len(AXES), max_size=len(AXES))


@given(SIZES, st.integers(0, len(AXES)), st.integers(1, 64))
def test_a_resolved_mesh_fits_and_leaves_nothing_where_a_size_is_open(asked, open_axis, count) -> None:
    if open_axis < len(AXES):
        asked[open_axis] = -1
    try:
        found = sizes(resolve(MeshConfig(**dict(zip(AXES, asked, strict=True))), count))
    except UserError:
        fixed = prod(size for size in asked if size != -1)
        assert fixed > count or (-1 in asked and count % fixed)
        return
    total = prod(found.values())
    assert total == count if -1 in asked else total <= count
    assert all(got == want for got, want in zip(found.values(), asked, strict=True) if want != -1)


# --- the mesh


def test_axes_have_the_names_and_the_order_of_the_config(mesh_of) -> None:
    mesh = mesh_of(data=2, fsdp=1, tensor=4)
    assert mesh.axis_names == AXES == ("replica", "stage", "data", "fsdp", "context", "expert", "tensor")
    assert mesh.devices.shape == (1, 1, 2, 1, 1, 1, 4)
    assert [device.id for device in mesh.devices.flat] == list(range(8))  # neighbours in tensor are neighbours


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_axis_types_are_given_not_left_to_a_default(axis_type, mesh_of) -> None:
    mesh = mesh_of(tensor=2, axis_type=axis_type)
    assert mesh.axis_types == (axis_type,) * len(AXES)
    x_vd = jax.device_put(jnp.ones((4, 2), jnp.float32), NamedSharding(mesh, P("tensor", None)))
    typed = {AxisType.Auto: P(None, None), AxisType.Explicit: P("tensor", None)}  # Explicit puts it into the type
    assert jax.typeof(x_vd).sharding.spec == typed[axis_type]


def test_auto_is_the_default() -> None:
    assert make_mesh(MeshConfig(tensor=2)).axis_types == (AxisType.Auto,) * len(AXES)


def test_first_devices_are_used_and_the_rest_is_told() -> None:
    mesh = make_mesh(MeshConfig(data=3))
    assert list(mesh.devices.flat) == jax.devices()[:3]
    assert describe(mesh) == "mesh data=3 fsdp=1 tensor=1: 3 cpu devices; 5 left unused"
    assert describe(mesh, device_count=3) == "mesh data=3 fsdp=1 tensor=1: 3 cpu devices"
    assert describe(make_mesh(MeshConfig()), 1) == "mesh data=1 fsdp=1 tensor=1: 1 cpu device"


def test_given_devices_are_used_in_their_order_and_count() -> None:
    devices = jax.devices()[4:6]
    assert list(make_mesh(MeshConfig(data=-1), devices).devices.flat) == devices
    with pytest.raises(UserError, match="needs 4 devices, 2 found"):
        make_mesh(MeshConfig(data=4), devices)


def test_too_few_accelerators_name_the_simulation() -> None:
    gpu = SimpleNamespace(platform="gpu")
    with pytest.raises(UserError, match="needs 4 devices, 1 found.*; JAX_PLATFORMS=cpu simulates as many as"):
        make_mesh(MeshConfig(tensor=4), [gpu])


# --- simulated devices: each case in a process of its own, since a process starts its backends once


def in_new_process(script: str, **environment: str) -> str:
    """Return what a script prints that starts as a user's script does, with nothing set but `environment`."""
    kept = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS" and not name.startswith("JAX_")}
    head = "import jax\nfrom research.config import MeshConfig\nfrom research.mesh import *\n"
    done = subprocess.run(
        [sys.executable, "-c", head + script],
        env={**kept, "JAX_PLATFORMS": "cpu", **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


PREPARE = """
mesh = MeshConfig(data=-1, fsdp=2, tensor=2)
prepare_devices(mesh)
print(len(jax.devices()), *(make_mesh(mesh).shape[axis] for axis in ("data", "fsdp", "tensor")))
"""


@pytest.mark.parametrize(
    ("environment", "printed"),
    [
        ({}, "4 1 2 2"),
        ({"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}, "8 2 2 2"),
        ({"JAX_NUM_CPU_DEVICES": "12"}, "12 3 2 2"),
        ({"XLA_FLAGS": "--xla_cpu_enable_fast_math=false"}, "4 1 2 2"),
    ],
)
def test_devices_are_simulated_unless_the_user_says_how_many(environment, printed) -> None:
    assert in_new_process(PREPARE, **environment) == printed


def test_each_process_simulates_its_share(monkeypatch) -> None:
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.delenv("JAX_NUM_CPU_DEVICES", raising=False)
    updates = []
    monkeypatch.setattr(jax.config, "update", lambda *update: updates.append(update))
    prepare_devices(MeshConfig(tensor=4, data=2), processes=2)
    prepare_devices(MeshConfig(tensor=3), processes=2)  # too many in all, and `make_mesh` says so
    assert updates == [("jax_num_cpu_devices", 4), ("jax_num_cpu_devices", 2)]


def test_several_processes_leave_no_device_unused(monkeypatch) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="tensor=4 uses 4 devices, the 2 processes of this run have 8; use all of them"):
        make_mesh(MeshConfig(tensor=4))
    assert make_mesh(MeshConfig(tensor=8)).size == 8


def test_no_more_devices_are_simulated_than_start_quickly(monkeypatch) -> None:
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.delenv("JAX_NUM_CPU_DEVICES", raising=False)
    updates = []
    monkeypatch.setattr(jax.config, "update", lambda *update: updates.append(update))
    prepare_devices(MeshConfig(tensor=10**9))
    assert updates == [("jax_num_cpu_devices", 512)]


def test_started_backends_are_an_error_not_silence(monkeypatch) -> None:
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.delenv("JAX_NUM_CPU_DEVICES", raising=False)
    jax.devices()
    with pytest.raises(RuntimeError, match="before backends are initialized"):
        prepare_devices(MeshConfig(tensor=4))
