from pathlib import Path

import gguf
import numpy as np
import pytest

from engine.checkpoint.errors import CheckpointError
from engine.checkpoint.gguf_file import GgufFile


def write_sample(path: Path, quantisation: gguf.GGMLQuantizationType) -> np.ndarray:
    values = np.random.default_rng(0).standard_normal((3, 64), dtype=np.float32)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("a.text", "gr\u00fc\u00df dich")
    writer.add_array("a.list", ["x", "", "z"])
    writer.add_array("a.numbers", [1, -2, 3])
    writer.add_float64("a.real", 0.1)
    writer.add_bool("a.flag", True)
    packed = gguf.quants.quantize(values, quantisation)
    writer.add_tensor("other", np.ones(5, dtype=np.float32))
    writer.add_tensor("matrix", packed, raw_dtype=quantisation)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return gguf.quants.dequantize(packed, quantisation).reshape(values.shape)


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q8_0", "Q4_1", "Q5_0"])
def test_metadata_and_tensors_come_back(tmp_path: Path, name: str) -> None:
    expected = write_sample(tmp_path / "m.gguf", gguf.GGMLQuantizationType[name])
    with GgufFile(tmp_path / "m.gguf") as file:
        assert file.metadata["a.text"] == "gr\u00fc\u00df dich"
        assert file.metadata["a.list"] == ["x", "", "z"]
        assert file.metadata["a.numbers"] == [1, -2, 3]
        assert file.metadata["a.real"] == 0.1
        assert file.metadata["a.flag"] is True
        assert np.array_equal(file.read("matrix"), expected)
        assert np.array_equal(file.read("other"), np.ones(5))


def test_missing_gguf_tensor_is_named(tmp_path: Path) -> None:
    write_sample(tmp_path / "m.gguf", gguf.GGMLQuantizationType.F32)
    with (
        GgufFile(tmp_path / "m.gguf") as file,
        pytest.raises(CheckpointError, match="tensor absent is missing"),
    ):
        file.read("absent")


@pytest.mark.parametrize("kept", [5, 30, 100, 200, -1])
def test_truncated_gguf_is_refused(tmp_path: Path, kept: int) -> None:
    write_sample(tmp_path / "m.gguf", gguf.GGMLQuantizationType.F32)
    content = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(content[:kept])
    with pytest.raises(CheckpointError, match="truncated"):
        GgufFile(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "cannot be read"),
        (b"PK\x03\x04 a zip file", "not a GGUF file"),
        (b"GGUF" + (1).to_bytes(4, "little") + bytes(64), "version 1 is not supported"),
    ],
)
def test_other_content_is_refused(tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=expected):
        GgufFile(tmp_path / "m.gguf")


def test_absent_gguf_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        GgufFile(tmp_path / "m.gguf")
