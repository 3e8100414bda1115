"""A safetensors file in one read: one buffer, tensors as views of it, and the digest of those very bytes.

The safetensors library maps files into memory. A mapped file that another process cuts short ends this
one with a bus error, and one that is rewritten meanwhile is not what its digest says. One read into
memory of our own has neither problem and hashes each piece while the processor's cache still holds it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from csulora.errors import CsuloraError
from csulora.files import SAFETENSORS_DTYPES, check_regular

HEADER_LIMIT = 100_000_000  # bytes; the safetensors library's own limit
PIECE = 1 << 20  # bytes read and hashed at a time

_DTYPES = {name: dtype for dtype, name in SAFETENSORS_DTYPES.items()}


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
    _check_finite(path, tensors, body)
    return tensors, digest


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


def _check_finite(path: Path, tensors: dict[str, Tensor], body: Tensor) -> None:
    """NaN or Inf anywhere is an error that names the tensor.

    Nearly every file holds one type only: then its body is checked in one sweep.
    """
    kinds = {tensor.dtype for tensor in tensors.values()}
    if len(kinds) == 1 and body.numel() and _is_finite(_view(body, next(iter(kinds)))):
        return
    for name, tensor in tensors.items():
        if not _is_finite(tensor):
            raise CsuloraError(f"{path}: tensor {name} holds NaN or Inf")


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    if tensor.dtype.itemsize == 1:
        tensor = tensor.float()  # the 8-bit types have no comparisons
    # Both ends are NaN if any element is, and one is infinite if any element is.
    low, high = torch.aminmax(tensor)
    return math.isfinite(low) and math.isfinite(high)


def _malformed(path: Path, reason: str) -> CsuloraError:
    return CsuloraError(f"{path}: not a readable safetensors file ({reason})")
