"""Files with mutations: read as the other libraries read them, or refused in one line, soon."""

from __future__ import annotations

import json
import random
import time
import warnings

import builders
import pytest
import torch
from builders import CONFIG, JOURNAL, REPORT, WEIGHTS
from mutations import mutated, mutated_safetensors
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file

import csulora
from csulora.batch import Call, steps
from csulora.batch.call import Run
from csulora.batch.journal import Journal
from csulora.batch.sources import Item
from csulora.files.checkpoint import Checkpoint

SECONDS = 1.0  # of processor time that any input may take


def same(found, expected):
    """Equal to the bit, NaN or not."""
    assert found.keys() == expected.keys()
    for name, X in found.items():
        Y = expected[name]
        assert (X.dtype, X.shape) == (Y.dtype, Y.shape), name
        assert torch.equal(X.contiguous().view(-1).view(torch.uint8), Y.view(-1).view(torch.uint8))


class Kind:
    """A file of one kind in its place; `read` takes what it holds to be valid or raises CsuloraError."""

    mutate = staticmethod(mutated)

    def __init__(self, root):
        self.root = root
        self.file = self.prepare()
        self.data = self.file.read_bytes()

    def check(self, chance):
        """Whether a mutation of the file was taken to be valid."""
        self.file.write_bytes(self.mutate(self.data, chance))
        try:
            return self.read()
        except csulora.CsuloraError as error:
            assert str(error)
            return False


class Weights(Kind):
    mutate = staticmethod(mutated_safetensors)

    def prepare(self):
        self.folder = builders.write_adapter(self.root / "lora", shapes={"q_proj": (6, 4)}, rank=2)
        return self.folder / WEIGHTS

    def read(self):
        adapter = csulora.LoraAdapter.load(self.folder, pass_through=True)
        same(adapter.tensors(), load_file(self.file))
        return True


class Config(Weights):
    mutate = staticmethod(mutated)

    def prepare(self):
        super().prepare()
        patterns = {"rank_pattern": {"k_proj": 3}, "alpha_pattern": {"q_proj": 3.5, "x.y": 2}}
        builders.edit_json(self.folder / CONFIG, **patterns)
        return self.folder / CONFIG

    def read(self):
        found = csulora.LoraAdapter.load(self.folder, pass_through=True).config
        assert found == LoraConfig.from_json_file(str(self.file))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                theirs = LoraConfig.from_pretrained(str(self.folder))
            except (TypeError, ValueError, AttributeError, KeyError):
                return True  # what it makes of fields that do not concern the update
        for name in ("r", "lora_alpha"):
            assert getattr(theirs, name) == found[name]
        for name in ("rank_pattern", "alpha_pattern"):
            assert (getattr(theirs, name) or {}) == (found.get(name) or {})
        assert bool(theirs.use_rslora) == bool(found.get("use_rslora"))
        return True


class Subspace(Kind):
    mutate = staticmethod(mutated_safetensors)

    def prepare(self):
        tensors = builders.subspace_tensors({"q_proj": (6, 4)}, rank=2)
        return builders.write_subspace(self.root / "s.safetensors", tensors)

    def read(self):
        loaded = csulora.SafetySubspace.load(self.file)
        assert loaded.sha256 == builders.digest(self.file)
        same(loaded._tensors(), load_file(self.file))
        with safe_open(self.file, "pt") as theirs:
            assert theirs.metadata().get("base", "") == loaded.origin.base
        return True


class Output(Kind):
    """An output that is to be recognised by its report."""

    def prepare(self):
        self.source = builders.write_adapter(self.root / "in" / "lora", rank=2)
        self.subspace = csulora.SafetySubspace.load(builders.write_subspace(self.root / "s"))
        self.out = self.root / "out"
        csulora.correct_many([self.source], self.subspace, self.out)
        return self.out / "lora" / REPORT

    def read(self):
        target = self.out / "lora"
        found = csulora.correct_folder(self.source, self.subspace, target, existing="resume")
        assert found.status == "skipped"
        json.dumps(found.report.to_dict(), allow_nan=False)
        return True


class Lines(Output):
    """The journal, whose lines decide with the state of the files."""

    def prepare(self):
        super().prepare()
        self.run = Run.of(Call(self.out, existing="resume"), self.subspace)
        return self.out / JOURNAL

    def read(self):
        journal = Journal(self.out)
        try:
            job = steps.Job(0, Item(str(self.source), "lora"))
            done = steps.decide(self.run, journal.entry, job)
        finally:
            journal.close()
        if done is not None:
            json.dumps(done.outcome.totals.to_dict(), allow_nan=False)
        return done is not None


class Index(Kind):
    def prepare(self):
        tensors = {f"{name}_proj.weight": torch.randn(4, 4) for name in "qkv"}
        self.folder = builders.write_checkpoint(self.root / "base", tensors, sharded=True)
        return self.folder / "model.safetensors.index.json"

    def read(self):
        checkpoint = Checkpoint.open(self.folder)
        for name, weight in checkpoint.weights.items():
            theirs = load_file(weight.file)[weight.name]
            same({name: checkpoint.read(name)}, {name: theirs})
        return True


class Shard(Index):
    mutate = staticmethod(mutated_safetensors)

    def prepare(self):
        super().prepare()
        return self.folder / "model-00001-of-00002.safetensors"

    def read(self):
        checkpoint = Checkpoint.open(self.folder)
        with safe_open(self.file, "pt") as theirs:
            for name, weight in checkpoint.weights.items():
                if weight.file == self.file:
                    expected = theirs.get_tensor(weight.name)
                    same({name: checkpoint.read(name)}, {name: expected})
        return True


SHARES = {
    Weights: 0.3,
    Config: 0.2,
    Subspace: 0.1,
    Output: 0.15,
    Lines: 0.1,
    Index: 0.05,
    Shard: 0.1,
}


@pytest.mark.filterwarnings("ignore:.*that no shard holds")
@pytest.mark.parametrize("total", [2000, pytest.param(20_000, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("kind", SHARES)
def test_mutations(tmp_path, monkeypatch, kind, total):
    monkeypatch.setattr(steps, "SETTLED_NS", 0)
    subject = kind(tmp_path)
    subject.file.write_bytes(subject.data)
    valid = 0
    for number in range(round(SHARES[kind] * total)):
        chance = random.Random(f"{kind.__name__} {total} {number}")
        start = time.process_time()
        try:
            valid += subject.check(chance)
        except Exception as error:
            error.add_note(f"input {number}: {subject.file.read_bytes()[:2000]!r}")
            raise
        assert time.process_time() - start < SECONDS, number
    print(kind.__name__, number + 1, valid)
    assert 0 < valid < number  # some are harmless; else the reading is not what is tested
