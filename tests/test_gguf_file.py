"""The container: every type of block as the `gguf` package decodes it, and no file that could crash or hang us."""

from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from research.errors import UserError
from research.formats.gguf_file import READABLE, open_gguf

# Where the float16 scales of a block stand that the package can't make: random bytes there could be infinite.
SCALES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
METADATA = {
    "a.string": "héllo\n",
    "a.number": 7,
    "a.real": 0.25,
    "a.flag": True,
    "some.strings": ["", "x", "▁y"],
    "some.numbers": [1, -2, 3],
}


def blocks(kind: str, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Some stored rows: encoded by the package, or for the K-quants made of random bytes with sane scales."""
    random = np.random.default_rng(seed)
    if kind not in SCALES:
        return gguf.quants.quantize(random.normal(size=(rows, columns)).astype(np.float32), Type[kind])
    size, width = gguf.GGML_QUANT_SIZES[Type[kind]]
    stored = random.integers(0, 256, (rows, columns // size, width), np.uint8)
    for place in SCALES[kind]:
        scales = random.uniform(0.01, 0.1, (rows, columns // size, 1)).astype(np.float16)
        stored[..., place : place + 2] = scales.view(np.uint8)
    return stored.reshape(rows, -1)


def write(path: Path, tensors: dict[str, tuple[str, np.ndarray]], **metadata: object) -> Path:
    """Write a file with the package's own writer."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in (METADATA | metadata).items():
        kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        kinds.get(type(value), writer.add_array)(key, value)
    for name, (kind, stored) in tensors.items():
        writer.add_tensor(name, stored, raw_dtype=Type[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def small(tmp_path: Path) -> Path:
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    return write(tmp_path / "small.gguf", {"one": ("F32", values), "two": ("F16", values.astype(np.float16))})


@pytest.mark.parametrize("kind", READABLE)
def test_blocks_are_decoded_as_the_package_does(kind, tmp_path):
    stored = blocks(kind, rows=3, columns=512)
    file = open_gguf(write(tmp_path / "x.gguf", {"first": ("Q8_0", blocks("Q8_0", 1, 32)), "x": (kind, stored)}))
    expected = gguf.quants.dequantize(stored, Type[kind])
    assert file.tensors["x"].shape == (3, 512) and file.tensors["x"].type.name == kind
    found = file.read("x")
    assert found.dtype == np.float32 and np.isfinite(found).all() and len(np.unique(found)) > 10
    np.testing.assert_array_equal(found, expected)


def test_blocks_by_hand(tmp_path):
    """Q8_0 is scale · code, Q4_0 is scale · (code − 8) with the second half of a block in the high nibbles."""
    codes = np.arange(-16, 16, dtype=np.int8)
    scale = np.array([0.5], np.float16).view(np.uint8)
    q8 = np.concatenate([scale, codes.view(np.uint8)])[None]
    nibbles = np.arange(16, dtype=np.uint8)
    q4 = np.concatenate([scale, nibbles | (nibbles[::-1] << 4)])[None]
    file = open_gguf(write(tmp_path / "x.gguf", {"q8": ("Q8_0", q8), "q4": ("Q4_0", q4)}))
    np.testing.assert_array_equal(file.read("q8"), codes[None].astype(np.float32) / 2)
    np.testing.assert_array_equal(file.read("q4")[0], (np.concatenate([nibbles, nibbles[::-1]]) - 8.0) / 2)


def test_metadata_and_shapes(small):
    file = open_gguf(small)
    assert {key: file.metadata[key] for key in METADATA} == METADATA
    assert file.metadata["general.architecture"] == "llama"
    np.testing.assert_array_equal(file.read("two"), np.arange(12).reshape(3, 4))


def test_alignment_of_the_file_counts(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_custom_alignment(256)
    writer.add_tensor("x", np.float32([1, 2, 3]))
    writer.add_tensor("y", np.float32([4, 5]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    np.testing.assert_array_equal(open_gguf(tmp_path / "x.gguf").read("y"), [4, 5])


def test_file_cut_anywhere_is_an_error(small, tmp_path):
    whole, cut = small.read_bytes(), tmp_path / "cut.gguf"
    end = max(entry.start + entry.size for entry in open_gguf(small).tensors.values())
    for size in range(end):
        cut.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"cut\.gguf is not a whole GGUF file"):
            open_gguf(cut)
    cut.write_bytes(whole[:end])  # what is left are zeros that fill the last line
    open_gguf(cut)


def test_broken_header_is_read_or_refused_but_never_crashes(small, tmp_path):
    whole, broken = small.read_bytes(), tmp_path / "broken.gguf"
    refused, header = 0, min(entry.start for entry in open_gguf(small).tensors.values())
    for place in range(header):
        for value in (0x09, 0xFF):
            broken.write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
            try:
                open_gguf(broken)
            except UserError:
                refused += 1
    assert refused > header / 2  # the rest are bytes of names and values, which nothing can check


def test_deep_nesting_is_refused(tmp_path):
    key = (1).to_bytes(8, "little") + b"k"
    arrays = ((9).to_bytes(4, "little") + (1).to_bytes(8, "little")) * 5000
    content = b"GGUF" + (3).to_bytes(4, "little") + bytes(8) + (1).to_bytes(8, "little") + key
    (tmp_path / "deep.gguf").write_bytes(content + (9).to_bytes(4, "little") + arrays)
    with pytest.raises(UserError, match=r"deep\.gguf is not a whole GGUF file"):
        open_gguf(tmp_path / "deep.gguf")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "ends after 0 bytes"),
        (b"PK\x03\x04 a zip", "does not begin with GGUF"),
        (b"GGUF" + (3).to_bytes(4, "big") + bytes(16), "version 50331648; .*little-endian"),
        (b"GGUF" + (1).to_bytes(4, "little") + bytes(16), "version 1;"),
    ],
)
def test_other_files_are_refused_with_the_reason(content, reason, tmp_path):
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(UserError, match=rf"x\.gguf is not a whole GGUF file \(.*{reason}"):
        open_gguf(tmp_path / "x.gguf")


def test_what_is_not_there_is_named(small, tmp_path):
    with pytest.raises(UserError, match=r"absent\.gguf: No such file"):
        open_gguf(tmp_path / "absent.gguf")
    with pytest.raises(UserError, match="Is a directory"):
        open_gguf(tmp_path)
    with pytest.raises(UserError, match=r"small\.gguf: tensor three is missing"):
        open_gguf(small).read("three")


def test_type_that_cannot_be_read_is_named(tmp_path):
    file = open_gguf(write(tmp_path / "x.gguf", {"x": ("TQ2_0", blocks("TQ2_0", 1, 256))}))
    with pytest.raises(UserError, match="tensor x is TQ2_0; readable are F32, F16"):
        file.read("x")


def test_file_that_shrinks_after_opening_is_noticed(small):
    file = open_gguf(small)
    small.write_bytes(small.read_bytes()[: file.tensors["two"].start + 4])
    with pytest.raises(UserError, match="ends inside tensor two"):
        file.read("two")
