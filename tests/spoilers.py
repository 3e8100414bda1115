"""Ways to spoil an adapter folder, and what a refusal looks like."""

import os
import pickle

import torch
from builders import (
    CONFIG,
    LAYERS,
    PREFIX,
    WEIGHTS,
    edit_json,
    edit_tensors,
    lora_names,
    raw_entry,
    write_adapter,
)

Q, DOWN = LAYERS
A_NAME, B_NAME = lora_names(Q)
EMBED = f"{PREFIX}model.embed_tokens"

ONE = torch.ones(1)
F32_PAIR = {A_NAME: raw_entry("F32", [4, 16], 0, 256), B_NAME: raw_entry("F32", [24, 4], 256, 640)}


class Payload:
    """Unpickling this runs a command that leaves a file behind."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def check_refusal(result, code, words, out, complaints=1):
    """One line that holds every word, nothing else unusual, nothing left on disk."""
    assert result.code == code, result.err
    assert len(result.complaints) == complaints, result.err
    for word in words:
        assert word in result.complaints[0], result.complaints[0]
    assert "Traceback" not in result.err
    # Names from files reach the terminal only as printable text, one line a message.
    assert all(line.startswith("csulora: ") for line in result.err.rstrip("\n").split("\n"))
    assert result.err.replace("\n", "").isprintable()
    assert not out.exists() or (out.is_dir() and not list(out.iterdir()))


def weights(data):
    return lambda folder: (folder / WEIGHTS).write_bytes(data)


def config(**changes):
    return lambda folder: edit_json(folder / CONFIG, **changes)


def config_text(text):
    return lambda folder: (folder / CONFIG).write_bytes(text)


def config_value(text, field="lora_alpha"):
    """Put a JSON literal that json.dumps would not write into the configuration."""

    def change(folder):
        edit_json(folder / CONFIG, **{field: "HERE"})
        path = folder / CONFIG
        path.write_text(path.read_text().replace('"HERE"', text))

    return change


def tensors(change):
    return lambda folder: edit_tensors(folder / WEIGHTS, change)


def put(name, value):
    return tensors(lambda found: found.__setitem__(name, value))


def poke(name, value):
    return tensors(lambda found: found[name].view(-1).__setitem__(3, value))


def embedding(**changes):
    """Add LoRA on an embedding; changed tensors by the end of their name, None leaves one out."""
    good = {"lora_embedding_A": torch.ones(4, 32), "lora_embedding_B": torch.ones(16, 4)}
    added = {f"{EMBED}.{name}": X for name, X in (good | changes).items() if X is not None}
    return tensors(lambda t: t.update(added))


def truncate(folder, size):
    os.truncate(folder / WEIGHTS, size)


def pickled(folder):
    (folder / WEIGHTS).unlink()
    payload = Payload(folder.parent.parent / "EXECUTED")
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(payload))


def linked(name, target):
    def change(folder):
        outside = folder.parent.parent / "outside"
        outside.mkdir()
        if (folder / name).exists():
            (folder / name).rename(outside / target)
        else:
            (outside / target).write_text("secret")
        (folder / name).symlink_to(outside / target)

    return change


def fifo(name):
    def change(folder):
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return change


def both(*changes):
    def change(folder):
        for one in changes:
            one(folder)

    return change


def names_clash(folder):
    write_adapter(folder, shapes={Q: (24, 16), "layers.0.self_attn.q_proj": (24, 16)})
