"""Files: safetensors in and out, digests, folders that appear whole or not at all, hub ids.

Only safetensors and JSON are ever read; nothing is unpickled. Readers turn every malformed input into
one CsuloraError that names the file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from csulora.errors import CsuloraError

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

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


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; numbers and text that could not be written back are refused."""
    return parse_json(path, read_bytes(path))


def read_bytes(path: Path) -> bytes:
    """A small file whole."""
    check_regular(path)
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise CsuloraError(f"{path}: no such file") from None
    except OSError as error:
        raise CsuloraError(f"{path}: cannot be read ({error.strerror or error})") from None


def parse_json(path: Path, data: bytes) -> dict[str, Any]:
    """`read_json` of a file whose bytes are at hand."""
    try:
        value = json.loads(data.decode(), parse_constant=_finite, parse_float=_finite)
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise CsuloraError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(value, dict):
        raise CsuloraError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _finite(literal: str) -> float:
    value = float(literal)
    if not math.isfinite(value):
        raise ValueError(f"{literal} is not a finite number")
    return value


def check_regular(path: Path) -> None:
    """Refuse what is there but no file: opening a named pipe would wait for ever."""
    if path.exists() and not path.is_file():
        raise CsuloraError(f"{path}: not a regular file; refused")


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """Deterministic, strictly valid JSON text (an infinite strength must already be a string)."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    return text.encode() + b"\n"


def json_rows(value: Mapping[str, Any]) -> bytes:
    """The same with lines for two levels only: a report stays readable, and quick to write."""
    encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode
    return (_rows(value, "  ", lambda entry: _inner(entry, encode), encode) + "\n").encode()


def _inner(value: Any, encode: Callable[[Any], str]) -> str:
    if isinstance(value, Mapping) and value:
        return _rows(value, "    ", encode, encode)
    return encode(value)


def _rows(
    value: Mapping[str, Any], indent: str, inner: Callable[[Any], str], encode: Callable[[str], str]
) -> str:
    rows = ",\n".join(f"{indent}{encode(key)}: {inner(entry)}" for key, entry in value.items())
    return "{\n" + rows + "\n" + indent[:-2] + "}"


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CsuloraError(f"{path}: cannot be read ({error.strerror})") from None


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
) -> None:
    """Write and fsync one safetensors file."""
    with open(path, "wb") as file:
        for chunk in safetensors_chunks(tensors, metadata):
            file.write(chunk)
        _sync(file)


def write_bytes(path: Path, data: bytes) -> None:
    """Write and fsync a small file."""
    with open(path, "wb") as file:
        file.write(data)
        _sync(file)


def copy_file(source: Path, destination: Path) -> None:
    """Copy a file's contents (not its links or owner) and fsync the copy."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    with open(source, "rb") as reader, open(destination, "wb") as writer:
        shutil.copyfileobj(reader, writer, 1 << 20)
        _sync(writer)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that is renamed onto it on success and removed on failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.tmp-", dir=path.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """A temporary folder beside `path` that is renamed onto it on success and removed on failure.

    With `overwrite` an existing folder is replaced, otherwise it is an error. What a killed run left
    behind is for `recover_folders`.
    """
    make_folders(path.parent)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.tmp-", dir=path.parent))
    try:
        inner = temporary / "new"
        inner.mkdir()
        yield inner
        for folder in [inner, *(p for p in inner.rglob("*") if p.is_dir())]:
            _sync_folder(folder)
        if path.exists():
            if not overwrite:
                raise CsuloraError(f"{path}: already exists; pass --overwrite or --resume")
            os.rename(path, temporary / "old")
        try:
            os.rename(inner, path)
        except OSError:
            if (temporary / "old").exists():
                os.rename(temporary / "old", path)
            raise
        _sync_folder(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def make_folders(path: Path) -> None:
    """Make a folder and those above it that are missing, each of them durable."""
    if not path.is_dir():
        make_folders(path.parent)
        path.mkdir(exist_ok=True)
        _sync_folder(path.parent)


def recover_folders(parent: Path, names: Collection[str]) -> None:
    """Undo what a killed run left beside the folders `names` of `parent`.

    Half-written folders are removed; a folder that was set aside to be replaced comes back. One pass
    over `parent`, so call it once for many names.
    """
    if not parent.is_dir():
        return
    for entry in list(os.scandir(parent)):
        found = re.fullmatch(r"\.(.+)\.tmp-[a-z0-9_]{8}", entry.name, re.DOTALL)
        if found is None or found[1] not in names or not entry.is_dir(follow_symlinks=False):
            continue
        old, path = Path(entry.path) / "old", parent / found[1]
        if old.exists() and not path.exists():
            os.rename(old, path)  # killed between the two renames of whole_folder
        shutil.rmtree(entry.path, ignore_errors=True)


def inside(folder: Path, name: str, source: Path) -> Path:
    """The path of an entry `name` that `source` (an index, a listing) gives, refused outside `folder`.

    Links are followed only to places inside the folder or to the blob store of a hub cache, where
    every file of a snapshot is a link.
    """
    parts = Path(name).parts
    if not parts or Path(name).is_absolute() or ".." in parts or "\0" in name or "\\" in name:
        raise CsuloraError(f"{source}: entry {name!r} points outside its folder; refused")
    path = folder / name
    target, root = path.resolve(), folder.resolve()
    caches = [place.parent for place in root.parents if place.name == "snapshots"]
    allowed = [root, *(cache / "blobs" for cache in caches)]
    if not any(target.is_relative_to(place) for place in allowed):
        raise CsuloraError(f"{source}: entry {name!r} links outside its folder; refused")
    return path


def resolve_source(name: str | os.PathLike[str], patterns: list[str]) -> Path:
    """A local folder as it is, or the local snapshot of a hub id, downloaded if need be."""
    path = Path(name)
    if path.exists():
        return path
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(name)) or str(name).startswith("."):
        raise CsuloraError(f"{name}: no such folder")
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(str(name), allow_patterns=patterns))
    except Exception as error:  # the hub client raises many kinds; each is one line for the user
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CsuloraError(
            f"{name}: no such folder, and not to be had from the hub ({reason})"
        ) from None


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
