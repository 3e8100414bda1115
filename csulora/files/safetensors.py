"""Safetensors files, in and out. Nothing else is ever read for tensors, and nothing is unpickled.

The safetensors library maps files into memory. A mapped file that another process cuts short ends this
one with a bus error, and one that is rewritten meanwhile is not what its digest says. So files come in
by plain reads into memory of our own: adapters and subspaces as one buffer, tensors as views of it, with
the digest of those very bytes, each piece hashed while the processor's cache still holds it; checkpoints
a weight at a time. The header is read first, and held to the size of the file, before room is made for
what it speaks of.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from csulora.errors import CsuloraError
from csulora.files.json import load_json
from csulora.files.memory import room
from csulora.files.plain import (
    PIECE,
    changed,
    hash_rest,
    joined,
    open_regular,
    reading,
    stamp,
    sync,
    write_all,
)

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
# Of so many numbers PyTorch computes without threads. A process that has started them cannot be
# forked, as the child waits for them; and servers and pools fork after they have read a subspace.
SERIAL = 32767
HEADER_LIMIT = 32 << 20  # bytes; of more than 200,000 tensors
# Bytes of tensors; smaller files are read sooner than checked without their content.
LARGE = 64 << 20

_DTYPES = {name: dtype for dtype, name in SAFETENSORS_DTYPES.items()}
# Bits of an element; the types that are not read here may stand in a checkpoint beside those that are.
_BITS = {name: 8 * dtype.itemsize for name, dtype in _DTYPES.items()} | {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F8_E8M0": 8,
    "C64": 64,
}


class Entry(NamedTuple):
    """What a header says of one tensor: type as safetensors spells it, shape, bytes of the body."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class Header(NamedTuple):
    """The checked header of a file, and what tells whether the file is still the same."""

    path: Path
    metadata: dict[str, str]
    entries: dict[str, Entry]  # by name in order
    start: int  # of the body, in bytes from the beginning of the file
    stamp: tuple[int, ...]


class Contents(NamedTuple):
    """What a file holds, and the hex sha256 of the bytes that it was read from."""

    tensors: dict[str, Tensor]  # by name in order
    metadata: dict[str, str]
    sha256: str


class SafetensorsFile:
    """An open file whose header has been read and checked; see `open_safetensors`."""

    def __init__(self, path: Path, file: FileIO) -> None:
        self._path, self._file = path, file
        self._digest = hashlib.sha256()
        found = os.fstat(file.fileno())
        size = found.st_size
        length = int.from_bytes(_exactly(path, file, min(size, 8), self._digest), "little")
        if size < 8 or length > min(size - 8, HEADER_LIMIT):
            raise _malformed(path, f"a header of {length} bytes in a file of {size}")
        text = _exactly(path, file, length, self._digest)
        self._body = size - 8 - length  # bytes
        metadata, entries = _parse(path, text, self._body)
        self.header = Header(path, metadata, entries, 8 + length, stamp(found))

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return self._body

    def outlines(self) -> dict[str, Tensor]:
        """All tensors without their content, on the device "meta", for checks that need none."""
        return {
            name: torch.empty(entry.shape, dtype=_dtype(self._path, name, entry), device="meta")
            for name, entry in self.header.entries.items()
        }

    def read(self, *, pin_memory: bool = False) -> tuple[dict[str, Tensor], str]:
        """All tensors by name in order, and the hex sha256 of the file. Refuses NaN and Inf."""
        dtypes = {name: _dtype(self._path, name, e) for name, e in self.header.entries.items()}
        body = room(self._path, self._body, pin_memory=pin_memory)
        _fill(self._path, self._file, body.numpy().data, self._digest)
        if _stamp(self._file) != self.header.stamp:
            raise changed(self._path)
        tensors = {
            name: _view(self._path, name, body[entry.begin : entry.end], dtypes[name], entry)
            for name, entry in self.header.entries.items()
        }
        # Nearly every file holds one type only: then its body is checked in one sweep.
        kinds = set(dtypes.values())
        parts = body.view(kinds.pop()).split(SERIAL) if len(kinds) == 1 and self._body else []
        if not parts or not all(map(is_finite, parts)):
            check_finite(self._path, tensors)
        return tensors, self._digest.hexdigest()

    def hash(self) -> str:
        """Hex sha256 of the file."""
        return hash_rest(self._path, self._file, self._digest)


@contextlib.contextmanager
def open_safetensors(path: Path) -> Iterator[SafetensorsFile]:
    """A safetensors file for one reading or hashing of all of it.

    Raises CsuloraError for whatever is not a well-formed safetensors file: a header that lies about
    its length, offsets that overlap, leave gaps or point outside, unknown types.
    """
    with reading(path), open_regular(path) as file:
        yield SafetensorsFile(path, file)


def read_safetensors(
    path: Path,
    *,
    pin_memory: bool = False,
    check: Callable[[dict[str, Tensor]], object] | None = None,
) -> Contents:
    """All of a file, in one reading.

    pin_memory: read into page-locked memory, which a GPU copies from without waiting.
    check: for a large file called with its tensors on the device "meta" before any content is read.

    Raises CsuloraError as `open_safetensors`, and for NaN or Inf and a file without tensors.
    """
    with open_safetensors(path) as file:
        if not file.header.entries:
            raise CsuloraError(f"{path}: holds no tensors")
        if check is not None and file.size >= LARGE:
            check(file.outlines())
        tensors, digest = file.read(pin_memory=pin_memory)
        return Contents(tensors, file.header.metadata, digest)


def read_tensor(header: Header, name: str) -> Tensor:
    """One tensor of a file, which is opened for it, so that what was read before can be dropped.

    Raises CsuloraError if the file is not the one of the header any more.
    """
    path, entry = header.path, header.entries[name]
    dtype = _dtype(path, name, entry)
    with reading(path), open_regular(path) as file:
        data = room(path, entry.end - entry.begin)
        file.seek(header.start + entry.begin)
        _fill(path, file, data.numpy().data)
        if _stamp(file) != header.stamp:
            raise changed(path)
    return _view(path, name, data, dtype, entry)


def check_finite(where: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise CsuloraError that names the tensor if one holds NaN or Inf."""
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise CsuloraError(f"{where}: tensor {name} holds NaN or Inf")


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor Inf; reads it once, and `torch.isfinite` several times."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    if tensor.dtype.itemsize == 1:
        tensor = tensor.float()  # the 8-bit types have no comparisons
    # Both ends are NaN if any element is, and one is infinite if any element is.
    low, high = torch.aminmax(tensor.detach())
    return math.isfinite(low) and math.isfinite(high)


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
    try:
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise CsuloraError(
            f"{error.object[error.start - 40 : error.end]!r}: not a name in Unicode"
        ) from None
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        if tensors[name].numel():
            yield tensor_bytes(tensors[name])


def write_safetensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    *,
    mode: int | None = None,
    durable: bool = True,
) -> str:
    """Write and fsync one safetensors file; the hex sha256 of what was written.

    mode, durable: as in `csulora.files.plain.write_bytes`.
    """
    digest = hashlib.sha256()
    with open(path, "wb", buffering=0) as file:
        for piece in joined(safetensors_chunks(tensors, metadata)):
            digest.update(piece)
            write_all(file, piece)
        sync(file, mode, durable=durable)
    return digest.hexdigest()


def _exactly(path: Path, file: FileIO, size: int, digest: Any) -> bytearray:
    data = bytearray(size)
    _fill(path, file, memoryview(data), digest)
    return data


def _fill(path: Path, file: FileIO, view: memoryview, digest: Any = None) -> None:
    position = 0
    while position < len(view):
        count = file.readinto(view[position : position + PIECE])
        if not count:
            raise changed(path)
        if digest is not None:
            digest.update(view[position : position + count])
        position += count


def _stamp(file: FileIO) -> tuple[int, ...]:
    return stamp(os.fstat(file.fileno()))


def _parse(path: Path, text: bytearray, size: int) -> tuple[dict[str, str], dict[str, Entry]]:
    """Metadata, and every tensor by name; together they tile a body of `size` bytes."""
    try:
        if not text.startswith(b"{"):
            raise ValueError("not an object")
        found = load_json(text, object_pairs_hook=_unique, parse_int=_natural)
        metadata = _metadata(found.pop("__metadata__", None))
        entries = {name: _entry(value) for name, value in found.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _malformed(path, f"header: {error!r}") from None
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        begin, end = entry.begin, entry.end
        bits = _BITS.get(entry.dtype, 0) * _count(entry.shape)
        known = entry.dtype in _BITS
        if not known or begin != position or 8 * (end - begin) != bits or end > size:
            _dtype(path, name, entry)  # an unknown type has no size
            raise _malformed(
                path,
                f"tensor {name}, {entry.dtype} {list(entry.shape[:8])}, "
                f"does not fit bytes {begin} to {end}",
            )
        position = end
    if position != size:
        raise _malformed(path, f"{size - position} bytes at the end belong to no tensor")
    return metadata, dict(sorted(entries.items()))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    for name in found:
        name.encode()  # half a pair of surrogates is no text
    return found


def _natural(literal: str) -> int:
    if literal.startswith("-"):
        raise ValueError(f"{literal[:20]}, a negative size")
    return int(literal)


def _metadata(found: Any) -> dict[str, str]:
    """Checked; none at all may be written as null."""
    metadata = {} if found is None else found
    for value in metadata.values():
        if not isinstance(value, str):
            raise TypeError("metadata")
        value.encode()
    return metadata


def _entry(value: dict[str, Any]) -> Entry:
    dtype, shape, (begin, end) = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(shape, list) or not isinstance(dtype, str):
        raise TypeError("shape or dtype")
    if not all(type(size) is int and size < 1 << 63 for size in (begin, end, *shape)):
        raise ValueError(f"sizes {(begin, end, *shape[:8])}")
    return Entry(dtype, tuple(shape), begin, end)


def _count(shape: tuple[int, ...]) -> int:
    """Elements of a tensor, -1 where no machine could count them, even if a later size is 0."""
    count = 1
    for size in shape:
        count *= size
        if count >= 1 << 63:
            return -1
    return count


def _dtype(path: Path, name: str, entry: Entry) -> torch.dtype:
    dtype = _DTYPES.get(entry.dtype)
    if dtype is None:
        raise _malformed(path, f"tensor {name} has the unknown type {entry.dtype[:20]!r}")
    return dtype


def _view(path: Path, name: str, data: Tensor, dtype: torch.dtype, entry: Entry) -> Tensor:
    # Other writers may not align to the element's size; such a tensor has to be copied.
    if data.storage_offset() % dtype.itemsize:
        data = data.clone()
    try:
        return data.view(dtype).view(entry.shape)
    except RuntimeError as error:  # a shape that PyTorch cannot express
        raise _malformed(path, f"tensor {name}: {error}") from None


def _malformed(path: Path, reason: str) -> CsuloraError:
    return CsuloraError(f"{path}: not a readable safetensors file ({reason})")
