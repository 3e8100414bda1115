"""Reading a safetensors file as one buffer: the same tensors as the library, and nothing malformed."""

import builders
import pytest
import torch
from builders import raw_entry, raw_safetensors
from safetensors.torch import load_file, save_file

from csulora import CsuloraError
from csulora.files.safetensors import read_safetensors

PAIR = {"a": raw_entry("F32", [2], 0, 8), "b": raw_entry("F32", [2], 8, 16)}


def written(tmp_path, data):
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("dtypes", [("float32",), ("bfloat16",), ("bfloat16", "float32", "int64")])
def test_same_tensors_as_the_library_and_the_digest_of_the_file(tmp_path, dtypes):
    tensors = {
        f"{name}{i}": torch.randn(3, 5 + i).to(getattr(torch, name))
        for name in dtypes
        for i in range(3)
    }
    tensors["empty"] = torch.empty(0, 4)
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, {"format": "pt"})
    found, _, digest = read_safetensors(path)
    assert digest == builders.digest(path)
    assert list(found) == sorted(tensors)
    for name, tensor in load_file(path).items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)


def test_tensors_share_one_buffer(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(4), "b": torch.ones(4)}, path)
    found = read_safetensors(path).tensors
    assert found["a"].untyped_storage().data_ptr() == found["b"].untyped_storage().data_ptr()


def test_a_tensor_off_its_alignment_is_read_all_the_same(tmp_path):
    entries = {"a": raw_entry("U8", [1], 0, 1), "b": raw_entry("F32", [1], 1, 5)}
    path = written(tmp_path, raw_safetensors(entries, b"\1" + torch.tensor(2.5).numpy().tobytes()))
    assert read_safetensors(path).tensors["b"].item() == 2.5


@pytest.mark.parametrize(
    ("entries", "size", "word"),
    [
        (PAIR | {"c": raw_entry("F32", [1], 0, 4)}, 16, "does not fit"),
        ({"a": PAIR["a"], "b": raw_entry("F32", [2], 12, 20)}, 20, "does not fit"),
        (PAIR, 15, "does not fit"),
        (PAIR, 17, "belong to no tensor"),
        ({"a": raw_entry("F32", [3], 0, 8)}, 8, "does not fit"),
        ({"a": raw_entry("F4", [3], 0, 8)}, 8, "unknown type"),
        ({"a": raw_entry("F32", [True, 2], 0, 8)}, 8, "header"),
        ({"a": raw_entry("F32", [2.0], 0, 8)}, 8, "header"),
        ({"a": {"dtype": "F32", "shape": [2]}}, 8, "header"),
        (b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"a":1}', 0, "twice"),
    ],
)
def test_what_does_not_add_up(tmp_path, entries, size, word):
    path = written(tmp_path, raw_safetensors(entries, b"\0" * size))
    with pytest.raises(CsuloraError, match=word):
        read_safetensors(path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("alone", [True, False])
def test_nan_and_inf_anywhere_name_the_tensor(tmp_path, dtype, value, alone):
    tensors = {"good": torch.ones(33), "bad": torch.ones(1000)}
    tensors["bad"][777] = value
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    if not alone:
        tensors["number"] = torch.ones(1, dtype=torch.int64)
    path = tmp_path / "x.safetensors"
    save_file(tensors, path)
    with pytest.raises(CsuloraError, match="tensor bad holds NaN or Inf"):
        read_safetensors(path)


def test_large_finite_values_are_fine(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.full((100,), 3e38), "b": torch.full((9,), -3e38)}, path)
    assert len(read_safetensors(path).tensors) == 2


@pytest.mark.parametrize("change", [-8, 8])
def test_a_file_that_changes_while_it_is_read(tmp_path, monkeypatch, change):
    from csulora.files import safetensors

    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(64)}, path)
    exactly = safetensors._exactly

    def meanwhile(*arguments):
        found = exactly(*arguments)
        with open(path, "r+b") as file:
            file.truncate(path.stat().st_size + change)
        return found

    monkeypatch.setattr(safetensors, "_exactly", meanwhile)
    with pytest.raises(CsuloraError, match="changed while it was being read"):
        read_safetensors(path)
