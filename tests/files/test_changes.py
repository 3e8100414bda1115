"""Files that change while they are in use: what was read counts, or the run ends in one line."""

import hashlib
import os
import shutil
import subprocess
import sys

import builders
import pytest
import torch
from builders import LAYERS, WEIGHTS
from safetensors.torch import load_file, save_file

import csulora
from csulora import CsuloraError
from csulora.files import plain, safetensors
from csulora.files.checkpoint import Checkpoint

Q = LAYERS[0]


def rewrite(path, tensors, metadata=None):
    """In place: whoever has the old file mapped sees the new bytes."""
    other = path.with_name("other")
    save_file(tensors, other, metadata)
    with open(path, "r+b") as file:
        file.write(other.read_bytes())
        file.truncate()
    other.unlink()


def test_a_subspace_that_is_rewritten_after_it_was_loaded(tmp_path, subspace, adapter):
    loaded = csulora.SafetySubspace.load(subspace)
    fresh = tmp_path / "fresh"
    shutil.copyfile(subspace, fresh)
    before, digest = load_file(subspace), builders.digest(subspace)
    before = {name: X.clone() for name, X in before.items()}
    other = builders.subspace_tensors(seed=9)
    content = builders.write_subspace(tmp_path / "other", other).read_bytes()
    with open(subspace, "r+b") as file:
        file.write(content)
    outcome = csulora.correct_folder(adapter, loaded, tmp_path / "out")
    assert loaded.sha256 == digest == outcome.report.subspace["sha256"]
    assert loaded.leading(2).sha256 == digest
    for name, module in loaded.modules.items():
        assert torch.equal(module.U, before[f"{name}.U"])
        assert torch.equal(module.V, before[f"{name}.V"])
    csulora.correct_folder(adapter, csulora.SafetySubspace.load(fresh), tmp_path / "again")
    assert builders.tree(tmp_path / "out") == builders.tree(tmp_path / "again")


def test_a_subspace_that_is_cut_short_after_it_was_loaded(subspace):
    """In a process: a mapping would end it with a bus error."""
    code = (
        "import os, sys, csulora\n"
        "loaded = csulora.SafetySubspace.load(sys.argv[1])\n"
        "os.truncate(sys.argv[1], 0)\n"
        "print(sum(float(m.U.sum() + m.V.sum()) for m in loaded.modules.values()), loaded.sha256)\n"
    )
    tensors = {name: X.clone() for name, X in load_file(subspace).items()}
    digest = builders.digest(subspace)
    command = [sys.executable, "-c", code, str(subspace)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    total, found = done.stdout.split()
    assert float(total) == pytest.approx(
        sum(float(X.sum()) for name, X in tensors.items() if name[-1] in "UV"), abs=1e-4
    )
    assert found == digest


def test_the_digest_of_a_subspace_in_memory_is_that_of_its_file(tmp_path, adapter):
    made = builders.random_subspace(csulora.LoraAdapter.load(adapter))
    made.save(tmp_path / "s")
    loaded = csulora.SafetySubspace.load(tmp_path / "s")
    assert made.sha256 == loaded.sha256 == builders.digest(tmp_path / "s")


# --- checkpoints ----------------------------------------------------------------------------------


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_those_that_the_library_reads(tmp_path, dtype, sharded):
    base, _ = builders.checkpoint_pair(tmp_path, dtype=dtype, sharded=sharded)
    expected = {}
    for file in base.glob("*.safetensors"):
        expected |= load_file(file)
    opened = Checkpoint.open(base)
    assert {weight.name for weight in opened.weights.values()} == set(expected)
    for name, weight in opened.weights.items():
        found = opened.read(name)
        assert found.dtype == expected[weight.name].dtype == dtype
        assert weight.shape == tuple(found.shape)
        assert torch.equal(found, expected[weight.name])


def rewritten(path):
    rewrite(path, builders.checkpoint_tensors(5))


def replaced(path):
    save_file(builders.checkpoint_tensors(5), path.with_name("new"))
    path.with_name("new").rename(path)


CHANGES = {
    "rewritten": (rewritten, "changed while"),
    "replaced": (replaced, "changed while"),
    "cut short": (lambda path: os.truncate(path, 1500), "changed while"),
    "grown": (lambda path: os.truncate(path, path.stat().st_size + 1), "changed while"),
    "gone": (lambda path: path.unlink(), "no such file"),
    "a pipe": (lambda path: (path.unlink(), os.mkfifo(path)), "not a regular file"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_checkpoint_that_changes_is_one_line(tmp_path, pair, case):
    change, words = CHANGES[case]
    opened = Checkpoint.open(pair[0])
    opened.read(Q)
    os.utime(pair[0] / "model.safetensors", ns=(1, 1))  # a clock that ticks slowly hides no change
    opened = Checkpoint.open(pair[0])
    change(pair[0] / "model.safetensors")
    with pytest.raises(CsuloraError, match=f"model.safetensors: {words}"):
        opened.read(Q)


def test_a_checkpoint_that_is_cut_short_while_a_weight_is_read(pair, monkeypatch):
    opened = Checkpoint.open(pair[0])
    room = safetensors.room

    def meanwhile(*arguments):
        os.truncate(pair[0] / "model.safetensors", 1500)
        return room(*arguments)

    monkeypatch.setattr(safetensors, "room", meanwhile)
    with pytest.raises(CsuloraError, match=r"model.safetensors: changed while"):
        opened.read(Q)


def test_estimate_ends_in_one_line_when_a_checkpoint_changes(capsys, tmp_path, pair, monkeypatch):
    read = safetensors.read_tensor
    from csulora.files import checkpoint

    def meanwhile(header, name):
        found = read(header, name)
        if header.path.parent.name == "aligned":
            os.utime(header.path)
        return found

    monkeypatch.setattr(checkpoint, "read_tensor", meanwhile)
    out = tmp_path / "s.safetensors"
    result = builders.run(capsys, "estimate", *pair, "--out", out)
    assert (result.code, len(result.complaints)) == (2, 1) and not out.exists()
    assert "aligned/model.safetensors: changed while" in result.complaints[0]


def test_no_file_is_mapped_and_no_header_read_twice(tmp_path, pair, subspace, adapter, monkeypatch):
    import mmap

    def never(*_, **__):
        raise AssertionError("mapped")

    opened = []
    real = plain.open_regular

    def counted(path, **options):
        opened.append(path)
        return real(path, **options)

    monkeypatch.setattr(mmap, "mmap", never)
    monkeypatch.setattr("safetensors.safe_open", never)
    monkeypatch.setattr(safetensors, "open_regular", counted)
    csulora.SafetySubspace.load(subspace)
    assert opened == [subspace]
    parsed = []
    parse = safetensors._parse

    def counting(path, *rest):
        parsed.append(path)
        return parse(path, *rest)

    monkeypatch.setattr(safetensors, "_parse", counting)
    found = csulora.estimate(*pair, rank=2)
    assert sorted(parsed) == sorted(folder / "model.safetensors" for folder in pair)
    # As before, the digest is over names, types, shapes and bytes of the selected weights.
    expected = hashlib.sha256()
    tensors = load_file(pair[0] / "model.safetensors")
    for name in sorted(found.modules):
        X = tensors[f"{name}.weight"]
        expected.update(f"{name}.weight\0F32\0{tuple(X.shape)}\0".encode() + X.numpy().tobytes())
    assert found.origin.base_digest == expected.hexdigest()


# --- adapters and small files ---------------------------------------------------------------------


def test_an_adapter_that_is_rewritten_while_it_is_read(adapter, monkeypatch):
    room = safetensors.room
    os.utime(adapter / WEIGHTS, ns=(1, 1))

    def meanwhile(*arguments, **options):
        rewrite(adapter / WEIGHTS, load_file(adapter / WEIGHTS), {"format": "pt"})
        return room(*arguments, **options)

    monkeypatch.setattr(safetensors, "room", meanwhile)
    with pytest.raises(CsuloraError, match=f"{WEIGHTS}: changed while"):
        csulora.LoraAdapter.load(adapter)


@pytest.mark.parametrize("size", [1, 30])
def test_a_small_file_that_changes_while_it_is_read(tmp_path, monkeypatch, size):
    path = tmp_path / "x"
    path.write_bytes(b"a" * 20)
    look = os.fstat

    def meanwhile(descriptor):
        found = look(descriptor)
        os.truncate(path, size)
        return found

    monkeypatch.setattr(os, "fstat", meanwhile)
    with pytest.raises(CsuloraError, match="x: changed while"):
        plain.read_bytes(path, 100)
