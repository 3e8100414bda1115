"""Bad and hostile checkpoints and subspaces: one clear line, nothing written, nothing executed."""

import json
import math
import os
import pickle
from pathlib import Path

import pytest
import torch
from builders import (
    WEIGHTS,
    checkpoint_pair,
    checkpoint_tensors,
    edit_tensors,
    raw_entry,
    raw_safetensors,
    run,
    subspace_tensors,
    write_adapter,
    write_checkpoint,
    write_json,
    write_subspace,
)
from spoilers import (
    ONE,
    Payload,
    Q,
    check_refusal,
)

# --- subspaces ------------------------------------------------------------------------------------


def subspace_with(change):
    def write(path):
        found = subspace_tensors()
        change(found)
        write_subspace(path, found)

    return write


def skew(found):
    found[f"{Q}.U"][:, 1] += 0.01 * found[f"{Q}.U"][:, 0]


BAD_SUBSPACES = {
    "not-there": (Path.unlink, ["no such file"]),
    "an-adapter": (
        lambda p: p.write_bytes(raw_safetensors({"x": raw_entry("F32", [1], 0, 4)}, b"0000")),
        ["not a subspace file", "csulora estimate"],
    ),
    "other-version": (
        lambda p: write_subspace(p, csulora_format="csulora_subspace/2"),
        ["csulora_subspace/2"],
    ),
    "truncated": (lambda p: os.truncate(p, p.stat().st_size - 4), ["safetensors"]),
    "header-of-2^60-bytes": (lambda p: p.write_bytes(raw_safetensors(b"{}", claim=2**60)), []),
    "a-folder": (lambda p: (p.unlink(), p.mkdir()), []),
    "metadata-seed": (lambda p: write_subspace(p, seed="x"), ["metadata"]),
    "metadata-share": (lambda p: write_subspace(p, energy_share="[1"), ["metadata"]),
    "metadata-share-list": (lambda p: write_subspace(p, energy_share="[1]"), ["metadata"]),
    "no-modules": (lambda p: write_subspace(p, {}), ["no modules"]),
    "V-missing": (subspace_with(lambda t: t.pop(f"{Q}.V")), [f"{Q}.V", "missing"]),
    "U-not-orthonormal": (subspace_with(skew), [f"{Q}.U", "orthonormal"]),
    "U-bfloat16": (
        subspace_with(lambda t: t.update({f"{Q}.U": t[f"{Q}.U"].bfloat16()})),
        [f"{Q}.U", "bfloat16", "float32"],
    ),
    "U-and-S-differ": (
        subspace_with(lambda t: t.update({f"{Q}.S": torch.ones(3)})),
        [f"{Q}.U", f"{Q}.S"],
    ),
    "U-wider-than-high": (
        subspace_with(lambda t: t.update({f"{Q}.U": torch.eye(3, 4)})),
        [f"{Q}.U"],
    ),
    "S-not-a-vector": (subspace_with(lambda t: t.update({f"{Q}.S": torch.ones(2, 2)})), [f"{Q}.S"]),
    "S-not-descending": (
        subspace_with(lambda t: t.update({f"{Q}.S": torch.arange(4.0)})),
        [f"{Q}.S", "descending"],
    ),
    "U-nan": (subspace_with(lambda t: t[f"{Q}.U"].__setitem__((0, 0), math.nan)), [f"{Q}.U"]),
    "V-inf": (subspace_with(lambda t: t[f"{Q}.V"].__setitem__((0, 0), math.inf)), [f"{Q}.V"]),
    "S-nan": (subspace_with(lambda t: t[f"{Q}.S"].__setitem__(0, math.nan)), [f"{Q}.S"]),
    "S-inf": (subspace_with(lambda t: t[f"{Q}.S"].__setitem__(0, math.inf)), [f"{Q}.S"]),
}


@pytest.mark.parametrize("command", ["correct", "inspect"])
@pytest.mark.parametrize("case", BAD_SUBSPACES)
def test_bad_subspace(case, command, adapter, subspace, out, capsys):
    change, words = BAD_SUBSPACES[case]
    change(subspace)
    rest = ("--out-dir", out) if command == "correct" else ()
    result = run(capsys, command, adapter, "--subspace", subspace, *rest)
    check_refusal(result, 2, [str(subspace), *words], out)


# --- checkpoints ----------------------------------------------------------------------------------

SHARD, LAST_SHARD = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
INDEX = "model.safetensors.index.json"


def index(change):
    """Alter the weight_map of the aligned checkpoint, written in shards."""

    def write(root):
        checkpoint_pair(root, sharded=True)
        path = root / "aligned" / INDEX
        value = json.loads(path.read_text())
        change(value)
        write_json(path, value)

    return write


def entry(name):
    return index(lambda value: value["weight_map"].__setitem__(f"{Q}.weight", name))


def weight_in_index_only(root):
    checkpoint_pair(root, sharded=True)
    edit_tensors(root / "aligned" / LAST_SHARD, lambda tensors: tensors.pop(f"{Q}.weight"))


def outside_link(root):
    checkpoint_pair(root, sharded=True)
    shard = root / "aligned" / SHARD
    shard.rename(root / "elsewhere.safetensors")
    shard.symlink_to(root / "elsewhere.safetensors")


def weight(which, change):
    def write(root):
        base, aligned = checkpoint_tensors(0), checkpoint_tensors(1)
        change(base if which == "base" else aligned)
        write_checkpoint(root / "base", base)
        write_checkpoint(root / "aligned", aligned)

    return write


def set_weight(which, value):
    return weight(which, lambda found: found[f"{Q}.weight"].__setitem__((2, 3), value))


def cast(which, dtype):
    return weight(
        which, lambda found: found.update({f"{Q}.weight": found[f"{Q}.weight"].to(dtype)})
    )


def only_pickle(root):
    checkpoint_pair(root)
    (root / "base" / "model.safetensors").unlink()
    (root / "base" / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(root / "EXECUTED")))


def pickle_in_index(root):
    entry("pytorch_model.bin")(root)
    (root / "aligned" / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(root / "EXECUTED")))


def equal(root):
    for name in ("base", "aligned"):
        write_checkpoint(root / name, checkpoint_tensors(0))


def config_list(root):
    checkpoint_pair(root)
    write_json(root / "base" / "config.json", [1])


BAD_CHECKPOINTS = {
    "index-parent": (entry("../elsewhere.safetensors"), [INDEX, "../elsewhere", "outside"]),
    "index-parent-inside": (entry(f"sub/../{SHARD}"), [INDEX, "outside"]),
    "index-absolute": (entry("/etc/passwd"), [INDEX, "/etc/passwd", "outside"]),
    "index-windows": (entry("..\\elsewhere.safetensors"), [INDEX, "outside"]),
    "index-empty-name": (entry(""), [INDEX]),
    "index-dot": (entry("."), [INDEX]),
    "index-nul": (entry("a\0b"), [INDEX]),
    "index-link-outside": (outside_link, [INDEX, SHARD, "links outside"]),
    "index-missing-file": (entry("gone.safetensors"), ["gone.safetensors", "no such file"]),
    "index-missing-tensor": (
        weight_in_index_only,
        [LAST_SHARD, f"{Q}.weight", "no shard holds"],
    ),
    "index-a-pickle": (pickle_in_index, ["pytorch_model.bin", "never read"]),
    "index-entry-a-number": (entry(7), [INDEX, Q]),
    "index-map-a-list": (index(lambda value: value.update(weight_map=["x"])), [INDEX]),
    "index-map-empty": (index(lambda value: value.update(weight_map={})), [INDEX]),
    "index-map-missing": (index(lambda value: value.clear()), [INDEX, "weight_map"]),
    "only-a-pickle": (only_pickle, ["base", "pytorch_model.bin", "safe_serialization"]),
    "no-weights": (
        lambda root: (checkpoint_pair(root), (root / "base" / "model.safetensors").unlink()),
        ["base", "model.safetensors"],
    ),
    "config-a-list": (config_list, ["config.json", "object"]),
    "truncated": (
        lambda root: (
            checkpoint_pair(root),
            os.truncate(root / "aligned" / "model.safetensors", 900),
        ),
        ["aligned", "model.safetensors"],
    ),
    "a-file": (
        lambda root: (
            (checkpoint_pair(root), (root / "base").rename(root / "b"))
            and (root / "base").write_text("")
        ),
        ["base", "folder"],
    ),
    "base-nan": (set_weight("base", math.nan), ["base", f"{Q}.weight", "NaN"]),
    "base-inf": (set_weight("base", math.inf), ["base", f"{Q}.weight", "Inf"]),
    "aligned-nan": (set_weight("aligned", math.nan), ["aligned", f"{Q}.weight", "NaN"]),
    "aligned-inf": (set_weight("aligned", -math.inf), ["aligned", f"{Q}.weight", "Inf"]),
    "difference-overflows": (set_weight("aligned", 3e38), ["aligned", f"{Q}.weight"]),
    "int8": (cast("base", torch.int8), ["base", f"{Q}.weight", "I8", "unquantized"]),
    "fp8": (cast("aligned", torch.float8_e4m3fn), ["aligned", f"{Q}.weight", "F8_E4M3"]),
    "equal": (equal, ["aligned", "equal"]),
    "tensor-missing": (
        weight("aligned", lambda found: found.pop(f"{Q}.weight")),
        ["aligned", f"{Q}.weight", "missing"],
    ),
    "shapes-differ": (
        weight("aligned", lambda found: found.update({f"{Q}.weight": torch.ones(16, 24)})),
        ["aligned", f"{Q}.weight", "(16, 24)"],
    ),
    "no-linear-weights": (
        lambda root: [write_checkpoint(root / name, {"x": ONE}) for name in ("base", "aligned")],
        ["base", "no linear weights"],
    ),
}


@pytest.mark.parametrize("case", BAD_CHECKPOINTS)
def test_bad_checkpoint(case, tmp_path, out, capsys):
    change, words = BAD_CHECKPOINTS[case]
    change(tmp_path)
    arguments = ("estimate", tmp_path / "base", tmp_path / "aligned", "--out")
    result = run(capsys, *arguments, out / "s.safetensors")
    check_refusal(result, 2, [str(tmp_path), *words], out)
    assert result.out == ""
    assert not (tmp_path / "EXECUTED").exists()


def test_hostile_names_in_a_checkpoint(tmp_path, out, capsys):
    """A name with a newline and a terminal escape is data: it passes, and is shown as text."""
    name = "evil\n\x1b[31m.q_proj"
    for folder, seed in (("base", 0), ("aligned", 1)):
        generator = torch.Generator().manual_seed(seed)
        write_checkpoint(
            tmp_path / folder, {f"{name}.weight": torch.randn(8, 8, generator=generator)}
        )
    pair = tmp_path / "base", tmp_path / "aligned"
    subspace = out / "s.safetensors"
    result = run(capsys, "estimate", *pair, "--out", subspace, "--rank", 2)
    assert result.code == 0
    assert "\x1b" not in result.out + result.err
    adapter = write_adapter(tmp_path / "lo\nra", shapes={name: (8, 8)})
    for arguments in (("correct", adapter, "--out-dir", out), ("inspect", adapter)):
        result = run(capsys, *arguments, "--subspace", subspace)
        assert result.code == 0
        assert "\x1b" not in result.out + result.err
        assert all(line.startswith("csulora: ") for line in result.err.splitlines())


# --- hub caches -----------------------------------------------------------------------------------


def into_hub_cache(folder, cache):
    """The layout of a hub cache: a snapshot of links into a blob store; its snapshot folder."""
    snapshot = cache / "snapshots" / "0123abc"
    (cache / "blobs").mkdir(parents=True)
    for number, path in enumerate(sorted(p for p in folder.rglob("*") if p.is_file())):
        blob = cache / "blobs" / f"{number:064x}"
        path.rename(blob)
        link = snapshot / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


@pytest.mark.parametrize("below", ["", "nested/adapter"])
def test_hub_cache_layout(below, tmp_path, out, capsys):
    base, aligned = (
        into_hub_cache(folder, tmp_path / f"models--{folder.name}")
        for folder in checkpoint_pair(tmp_path / "plain", sharded=True)
    )
    subspace = out / "s.safetensors"
    assert run(capsys, "estimate", base, aligned, "--out", subspace, "--rank", 4).code == 0
    write_adapter(tmp_path / "plain-lora" / below)
    adapter = into_hub_cache(tmp_path / "plain-lora", tmp_path / "models--lora") / below
    result = run(capsys, "correct", adapter, "--subspace", subspace, "--out-dir", out)
    assert result.code == 0, result.err
    assert not any((out / adapter.name / name).is_symlink() for name in (WEIGHTS, "README.md"))
