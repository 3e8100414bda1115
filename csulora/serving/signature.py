"""Detached signatures of outputs, by which a guard in mode "require" knows what an operator stands for.

Ed25519, by the package `cryptography`. A signature is over the digests of the two files that define an
adapter, so that it stays valid when a folder is moved, or loses its report.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from csulora.adapter import LoraAdapter, Source, identify
from csulora.errors import CsuloraError, ExistsError, UsageError
from csulora.files.folders import inside, whole_file, writing
from csulora.files.json import json_bytes, read_json
from csulora.files.plain import read_bytes, write_bytes
from csulora.output import SIGNATURE, contradictions, differences, stray_weights, written_report
from csulora.text import listed

FORMAT = "csulora_signature/1"
# What is signed begins with it, so that a key which signs other things too never signs an adapter by it.
DOMAIN = b"csulora adapter signature 1\0"
LIMIT = 1 << 16  # bytes of a key or a signature file


def sign(folder: str | os.PathLike[str], private_key: str | os.PathLike[str]) -> Path:
    """Sign an output as it is now; the path of the signature, which replaces an earlier one.

    private_key: PEM, Ed25519, without a passphrase.

    Raises CsuloraError for a folder that csulora did not correct, that is not what its report says, or
    that holds tensors which are no LoRA updates and so are as they came; UsageError for the key.
    """
    path = Path(folder)
    key = _private(Path(private_key))
    source = _corrected(path)
    content = {
        "format": FORMAT,
        "key": key.public_key().public_bytes_raw().hex(),
        "signature": key.sign(_message(source)).hex(),
    }
    target = path / SIGNATURE
    with writing(target), whole_file(target) as temporary:
        write_bytes(temporary, json_bytes(content))
    return target


def signer(folder: str | os.PathLike[str], trusted: Sequence[str | os.PathLike[str]]) -> str | None:
    """The file of the trusted public key that signed an adapter folder's two files as they are now.

    None where there is no signature, or it is none of those keys over these files. Raises CsuloraError
    for a signature file that cannot be read as one, a trusted key that cannot be read, and a folder
    without an adapter. The files are read once, and may be others a moment later.
    """
    path = Path(folder)
    _check_folder(path)
    file = path / SIGNATURE
    if not os.path.lexists(file) or not trusted:
        return None
    signature = _signature(inside(path, SIGNATURE, path))
    message = _message(identify(path))
    for key_file in trusted:
        if _is_valid(_public(Path(key_file)), signature, message):
            return os.fspath(key_file)
    return None


def check_trusted(trusted: Sequence[str | os.PathLike[str]]) -> None:
    """Raise CsuloraError for a public key that cannot be read as one, and without the package."""
    for file in trusted:
        try:
            _public(Path(file))
        except CsuloraError as error:
            raise CsuloraError(f"trusted_keys: {error}") from None


def new_key(name: str | os.PathLike[str]) -> tuple[Path, Path]:
    """A new pair of keys as `<name>.pem`, for its owner alone, and `<name>.pub`.

    Raises ExistsError where one of the two is there already.
    """
    serialization, ed25519 = _library()
    base = os.fspath(name)
    private, public = Path(f"{base}.pem"), Path(f"{base}.pub")
    for path in (private, public):
        if os.path.lexists(path):
            raise ExistsError(f"{path}: already exists; keys are never replaced")
    key = ed25519.Ed25519PrivateKey.generate()
    secret = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    known = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    _write_new(private, secret, 0o600)
    try:
        _write_new(public, known, 0o644)
    except BaseException:  # half a pair is of no use, and in the way of the next try
        private.unlink(missing_ok=True)
        raise
    return private, public


def _corrected(folder: Path) -> Source:
    """What an output is, after it was read whole and found to be as csulora wrote it."""
    _check_folder(folder)
    adapter = LoraAdapter.load(
        folder, pass_through=True
    )  # refuses NaN, Inf and what contradicts itself
    if adapter.passed_through:
        names = listed(adapter.passed_through)
        raise CsuloraError(
            f"{folder}: holds tensors that were not corrected: {names}; it is not signed"
        )
    if not adapter.made or adapter.source is None:
        raise CsuloraError(f"{folder}: csulora did not correct this adapter, so it is not signed")
    try:
        report = written_report(folder)
    except ExistsError:
        raise CsuloraError(
            f"{folder}: has no report of csulora; sign before it is removed"
        ) from None
    problems = differences(folder, report) or contradictions(folder, report)
    problems += stray_weights(folder)
    stated = (report.output.get("sha256"), report.output.get("config_sha256"))
    if problems or adapter.source.digests != stated:
        reason = problems[0] if problems else "changed while it was being read"
        raise CsuloraError(f"{folder}: {reason}, so it is not signed")
    return adapter.source


def _check_folder(folder: Path) -> None:
    """A name that is no folder here is never looked up on a hub."""
    if not folder.is_dir():
        raise CsuloraError(f"{folder}: no such folder")


def _message(source: Source) -> bytes:
    """What is signed, of a fixed length: the domain, then 32 bytes for each file."""
    return DOMAIN + bytes.fromhex(source.sha256) + bytes.fromhex(source.config_sha256)


def _signature(file: Path) -> bytes:
    """The 64 bytes that a signature file holds."""
    values = read_json(file, LIMIT)
    if values.get("format") != FORMAT:
        raise CsuloraError(f"{file}: format is {values.get('format')!r}; {FORMAT} is needed")
    text = values.get("signature")
    try:
        signature = bytes.fromhex(text) if isinstance(text, str) else b""
    except ValueError:
        signature = b""
    if len(signature) != 64:
        raise CsuloraError(f"{file}: signature must be 128 hexadecimal digits")
    return signature


def _is_valid(key: Any, signature: bytes, message: bytes) -> bool:
    from cryptography.exceptions import InvalidSignature

    try:
        key.verify(signature, message)
    except InvalidSignature:
        return False
    return True


def _private(file: Path) -> Any:
    serialization, ed25519 = _library()
    return _key(
        file,
        lambda data: serialization.load_pem_private_key(data, password=None),
        ed25519.Ed25519PrivateKey,
        "an Ed25519 private key in PEM, without a passphrase (csulora sign --new-key makes one)",
    )


def _public(file: Path) -> Any:
    serialization, ed25519 = _library()
    return _key(
        file,
        serialization.load_pem_public_key,
        ed25519.Ed25519PublicKey,
        "an Ed25519 public key in PEM",
    )


def _key(file: Path, load: Any, kind: type, wanted: str) -> Any:
    """A key from a file. Raises UsageError for the key, whatever is the matter with it."""
    try:
        data = read_bytes(file, LIMIT)
    except CsuloraError as error:
        raise UsageError(str(error)) from None
    from cryptography.exceptions import UnsupportedAlgorithm

    try:
        key = load(data)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, kind):
        raise UsageError(f"{file}: not {wanted}")
    return key


def _library() -> tuple[Any, Any]:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError:
        raise UsageError(
            "signatures need the package cryptography: pip install 'csulora[serve]'"
        ) from None
    return serialization, ed25519


def _write_new(path: Path, data: bytes, mode: int) -> None:
    """A file that was not there; never through a link, and never readable for more than `mode` says."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with writing(path), os.fdopen(os.open(path, flags, mode), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
