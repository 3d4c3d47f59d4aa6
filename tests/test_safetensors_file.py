"""The streaming writer against the library's own reader, and what a damaged file says."""

import weakref

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file
from safetensors.numpy import save_file as save_with_library

from research.errors import UserError
from research.formats.safetensors_file import TensorSpec, by_alignment, list_tensors, read_tensor, write_tensors

RNG = np.random.default_rng(0)
TENSORS = {
    "codes": RNG.integers(-127, 128, (3, 5, 7)).astype(np.int8),
    "odd": RNG.normal(size=3).astype(np.float16),
    "table": RNG.normal(size=(4, 6)).astype(np.float32),
    "brain": RNG.normal(size=(2, 3)).astype(ml_dtypes.bfloat16),
    "transposed": RNG.normal(size=(4, 6)).astype(np.float32).T,
}


@pytest.fixture
def file(tmp_path):
    """A file of `TENSORS` as our writer makes it."""
    specs = {name: TensorSpec.of(tensor) for name, tensor in TENSORS.items()}
    order = by_alignment(specs)
    path = tmp_path / "model.safetensors"
    write_tensors(path, {name: specs[name] for name in order}, (TENSORS[name] for name in order), {"format": "pt"})
    return path


def test_the_library_reads_what_we_write_bit_for_bit(file):
    found = load_file(file)
    assert set(found) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert found[name].tobytes() == tensor.tobytes(), name


def test_we_read_what_the_library_writes(tmp_path):
    save_with_library({name: np.ascontiguousarray(tensor) for name, tensor in TENSORS.items()}, tmp_path / "x")
    assert list_tensors(tmp_path / "x") == {name: TensorSpec.of(tensor) for name, tensor in TENSORS.items()}
    for name, tensor in TENSORS.items():
        found = read_tensor(tmp_path / "x", name)
        assert found.dtype == tensor.dtype and found.tobytes() == tensor.tobytes()
    assert np.array_equal(read_tensor(tmp_path / "x", "table", slice(1, 3)), TENSORS["table"][1:3])


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
def test_every_code_of_eight_bit_floats_comes_back(tmp_path, dtype):
    """The library's reader knows them by name only."""
    tensors = {"first": np.ones(3, np.float32), "codes": np.arange(256, dtype=np.uint8).reshape(8, 32).view(dtype)}
    specs = {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}
    write_tensors(tmp_path / "x", specs, tensors.values(), {"format": "pt"})
    assert list_tensors(tmp_path / "x") == specs
    found = read_tensor(tmp_path / "x", "codes")
    assert found.dtype == dtype and found.shape == (8, 32) and found.tobytes() == bytes(range(256))
    assert read_tensor(tmp_path / "x", "codes", slice(2, 4)).tobytes() == bytes(range(64, 128))


def test_wide_dtypes_come_first_so_that_all_are_aligned(file):
    header_length = int.from_bytes(file.read_bytes()[:8], "little")
    assert header_length % 8 == 0
    specs = {name: TensorSpec.of(tensor) for name, tensor in TENSORS.items()}
    assert by_alignment(specs) == ["table", "transposed", "odd", "brain", "codes"]


def test_one_array_in_memory_at_a_time(tmp_path):
    alive: list[weakref.ref] = []

    def make():
        for value in range(3):
            assert all(reference() is None for reference in alive), "an earlier array is still held"
            array = np.full(4, value, np.float32)
            alive.append(weakref.ref(array))
            yield array
            del array

    write_tensors(tmp_path / "x", {name: TensorSpec("F32", (4,)) for name in "abc"}, make(), {})
    assert load_file(tmp_path / "x")["c"].tolist() == [2, 2, 2, 2]


@pytest.mark.parametrize("cut", [0, 4, 40, -1])
def test_truncated_file_is_named(file, cut):
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(UserError, match="model.safetensors is not a whole safetensors file"):
        list_tensors(file)


def test_missing_file_and_directory_are_named(tmp_path):
    with pytest.raises(UserError, match="absent.safetensors is missing"):
        list_tensors(tmp_path / "absent.safetensors")
    with pytest.raises(UserError, match="not a whole safetensors file"):
        list_tensors(tmp_path)


def test_arrays_that_differ_from_the_announcement_are_errors(tmp_path):
    spec = {"a": TensorSpec("F32", (4,))}
    with pytest.raises(ValueError, match="tensor a is"):
        write_tensors(tmp_path / "x", spec, [np.zeros(4, np.float16)], {})
    with pytest.raises(ValueError, match="more tensors"):
        write_tensors(tmp_path / "x", spec, [np.zeros(4, np.float32)] * 2, {})
    with pytest.raises(ValueError, match="dtype uint16 can't be stored"):
        TensorSpec.of(np.zeros(4, np.uint16))
