"""Safetensors files, in and out. Nothing else is ever read for tensors, and nothing is unpickled.

The safetensors library maps files into memory. A mapped file that another process cuts short ends this
one with a bus error, and one that is rewritten meanwhile is not what its digest says. So adapters come
in by one read into memory of our own: one buffer, tensors as views of it, and the digest of those very
bytes, each piece hashed while the processor's cache still holds it. Checkpoints and subspaces, which are
large, are read lazily by the library.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from csulora.errors import CsuloraError
from csulora.files.plain import check_regular, sync

SAFETENSORS_DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
HEADER_LIMIT = 100_000_000  # bytes; the safetensors library's own limit
PIECE = 1 << 20  # bytes read and hashed at a time

_DTYPES = {name: dtype for dtype, name in SAFETENSORS_DTYPES.items()}


@contextlib.contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """A lazy reader of one safetensors file (`keys`, `get_tensor`, `get_slice`, `metadata`)."""
    check_regular(path)
    try:
        reader = safe_open(str(path), framework="pt", device="cpu")
    except FileNotFoundError:
        raise CsuloraError(f"{path}: no such file") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise CsuloraError(f"{path}: not a readable safetensors file ({error})") from None
    with reader as handle:
        yield handle


def read_tensor(handle: Any, path: Path, name: str) -> Tensor:
    """One tensor by name; the error names file and tensor."""
    try:
        return handle.get_tensor(name)
    except (SafetensorError, OSError, ValueError, RuntimeError, AttributeError) as error:
        raise CsuloraError(f"{path}: tensor {name} cannot be read ({error})") from None


def read_safetensors(path: Path, *, pin_memory: bool = False) -> tuple[dict[str, Tensor], str]:
    """All tensors of a file, by name in order, and the hex sha256 of the file.

    pin_memory: read into page-locked memory, which a GPU copies from without waiting.

    Raises CsuloraError for whatever is not a well-formed safetensors file: a header that lies about
    its length, offsets that overlap, leave gaps or point outside, unknown types, NaN or Inf.
    """
    check_regular(path)
    try:
        with open(path, "rb", buffering=0) as file:
            header, body, digest = _read(path, file, pin_memory)
    except FileNotFoundError:
        raise CsuloraError(f"{path}: no such file") from None
    except OSError as error:
        raise CsuloraError(f"{path}: cannot be read ({error.strerror or error})") from None
    tensors = dict(sorted(_views(path, header, body)))
    if not tensors:
        raise CsuloraError(f"{path}: holds no tensors")
    kinds = {tensor.dtype for tensor in tensors.values()}
    # Nearly every file holds one type only: then its body is checked in one sweep.
    one = len(kinds) == 1 and body.numel() and _is_finite(_view(body, next(iter(kinds))))
    if not one:
        check_finite(path, tensors)
    return tensors, digest


def check_finite(where: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise CsuloraError that names the tensor if one holds NaN or Inf."""
    for name, tensor in tensors.items():
        if not _is_finite(tensor):
            raise CsuloraError(f"{where}: tensor {name} holds NaN or Inf")


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The raw little-endian bytes of a tensor, without a copy where it is contiguous on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def safetensors_chunks(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, piece by piece; the same input gives the same bytes.

    The safetensors library writes metadata in hash order, which differs from run to run, so the header
    is laid out here: metadata by key, tensors by element size and name, body 8-byte aligned.
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    # Wide types first, as the library does, keeps every tensor aligned to its own element size.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    end = 0
    for name in names:
        tensor = tensors[name]
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": SAFETENSORS_DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        if tensors[name].numel():
            yield tensor_bytes(tensors[name])


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> str:
    """Write and fsync one safetensors file; the hex sha256 of what was written."""
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for chunk in safetensors_chunks(tensors, metadata):
            digest.update(chunk)
            file.write(chunk)
        sync(file)
    return digest.hexdigest()


def _read(path: Path, file: BinaryIO, pin_memory: bool) -> tuple[bytes, Tensor, str]:
    size = os.fstat(file.fileno()).st_size
    digest = hashlib.sha256()
    start = _exactly(path, file, min(size, 8), digest)
    length = int.from_bytes(start, "little")
    if size < 8 or length > min(size - 8, HEADER_LIMIT):
        raise _malformed(path, f"a header of {length} bytes in a file of {size}")
    header = _exactly(path, file, length, digest)
    body = torch.empty(size - 8 - length, dtype=torch.uint8, pin_memory=pin_memory)
    _fill(path, file, body.numpy().data, digest)
    if file.read(1):
        raise CsuloraError(f"{path}: changed while it was being read")
    return header, body, digest.hexdigest()


def _exactly(path: Path, file: BinaryIO, size: int, digest: Any) -> bytes:
    data = bytearray(size)
    _fill(path, file, memoryview(data), digest)
    return bytes(data)


def _fill(path: Path, file: Any, view: memoryview, digest: Any) -> None:
    position = 0
    while position < len(view):
        count = file.readinto(view[position : position + PIECE])
        if not count:
            raise CsuloraError(f"{path}: changed while it was being read")
        digest.update(view[position : position + count])
        position += count


def _views(path: Path, header: bytes, body: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the header as a view of the body, which they must tile without gap or overlap."""
    try:
        entries = json.loads(header.decode(), object_pairs_hook=_unique)
        entries.pop("__metadata__", None)
        spans = sorted(
            (*_span(entry), name, entry["dtype"], entry["shape"]) for name, entry in entries.items()
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _malformed(path, f"header: {error!r}") from None
    position = 0
    for begin, end, name, dtype_name, shape in spans:
        dtype = _DTYPES.get(dtype_name)
        if dtype is None:
            raise _malformed(path, f"tensor {name} has the unknown type {dtype_name!r}")
        count = math.prod(shape)
        if begin != position or end - begin != count * dtype.itemsize or end > len(body):
            raise _malformed(
                path, f"tensor {name}, {dtype_name} {shape}, does not fit bytes {begin} to {end}"
            )
        position = end
        yield name, _view(body[begin:end], dtype).view(shape)
    if position != len(body):
        raise _malformed(path, f"{len(body) - position} bytes at the end belong to no tensor")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _span(entry: dict[str, Any]) -> tuple[int, int]:
    begin, end = entry["data_offsets"]
    sizes = (begin, end, *entry["shape"])
    if not all(type(value) is int and 0 <= value < 1 << 63 for value in sizes):
        raise ValueError(f"sizes {sizes[:8]}")
    if not isinstance(entry["shape"], list) or not isinstance(entry["dtype"], str):
        raise TypeError("shape or dtype")
    return begin, end


def _view(data: Tensor, dtype: torch.dtype) -> Tensor:
    # Other writers may not align to the element's size; such a tensor has to be copied.
    if data.storage_offset() % dtype.itemsize:
        data = data.clone()
    return data.view(dtype)


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    if tensor.dtype.itemsize == 1:
        tensor = tensor.float()  # the 8-bit types have no comparisons
    # Both ends are NaN if any element is, and one is infinite if any element is.
    low, high = torch.aminmax(tensor.detach())
    return math.isfinite(low) and math.isfinite(high)


def _malformed(path: Path, reason: str) -> CsuloraError:
    return CsuloraError(f"{path}: not a readable safetensors file ({reason})")
