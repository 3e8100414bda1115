"""Standard streams that are closed, full or without a reader; names that no stream can show."""

import json
import os
import subprocess
import sys

import builders
import forked
import pytest

import csulora.cli.inspect
from csulora import LoraAdapter

FULL = "os.dup2(os.open('/dev/full', os.O_WRONLY), {})"
CLOSED = "os.close({0}); sys.{1} = None"  # as Python finds it at its start
NO_READER = "r, w = os.pipe(); os.close(r); os.dup2(w, {})"
READ_ONLY = "os.dup2(os.open(os.devnull, os.O_RDONLY), {})"
ASCII = "sys.stdout.reconfigure(encoding='ascii', errors='strict');"
STDOUT = {
    "full": (FULL.format(1), "No space left on device"),
    "closed": (CLOSED.format(1, "stdout"), "closed"),
    "no reader": (NO_READER.format(1), "Broken pipe"),
    "read only": (READ_ONLY.format(1), "Bad file descriptor"),
}
OPTIONS = {"full": ["--json"], "closed": [], "no reader": ["--overwrite"], "read only": ["--json"]}
STDERR = {
    "full": FULL.format(2),
    "closed": CLOSED.format(2, "stderr"),
    "no reader": NO_READER.format(2),
}
COMPLAINT = "csulora: error: standard output: cannot be written ({})"


def test_streams_that_fail_neither_end_a_run_nor_show_a_traceback(tmp_path, adapter, subspace):
    cases = {}
    for kind, (setup, _) in STDOUT.items():
        out = ("--out-dir", tmp_path / f"out {kind}")
        arguments = ["correct", adapter, "--subspace", subspace, *out, *OPTIONS[kind]]
        cases[kind] = {"argv": arguments, "setup": setup}
    inspect = ["inspect", adapter, "--subspace", subspace]
    cases["inspect"] = {"argv": inspect, "setup": NO_READER.format(1)}
    cases["help"] = {"argv": ["--help"], "setup": FULL.format(1)}
    for kind, setup in STDERR.items():
        out = ("--out-dir", tmp_path / f"err {kind}")
        arguments = ["correct", adapter, "--subspace", subspace, *out]
        cases[f"err {kind}"] = {"argv": arguments, "setup": setup}
        cases[f"bad {kind}"] = {"argv": [*arguments, "--no-such-option"], "setup": setup}
    both = CLOSED.format(1, "stdout") + ";" + CLOSED.format(2, "stderr")
    arguments = ["correct", adapter, "--subspace", subspace, "--out-dir", tmp_path / "none"]
    cases["none"] = {"argv": arguments, "setup": both}
    results = forked.run_all(cases)
    reasons = {kind: reason for kind, (_, reason) in STDOUT.items()}
    reasons |= {"inspect": "Broken pipe", "help": "No space left on device"}
    for name, reason in reasons.items():
        lines = results[name]["err"].splitlines()
        assert results[name]["code"] == 2, lines
        assert [x for x in lines if "correcting" not in x] == [COMPLAINT.format(reason)]
    for kind in STDOUT:
        assert LoraAdapter.load(tmp_path / f"out {kind}" / "lora").modules
    for kind in STDERR:
        assert (
            results[f"err {kind}"]["code"] == 0 and "1 corrected" in results[f"err {kind}"]["out"]
        )
        assert results[f"bad {kind}"]["code"] == 2 and not results[f"bad {kind}"]["out"]
    assert results["none"] == {"code": 2, "out": "", "err": ""}
    assert LoraAdapter.load(tmp_path / "none" / "lora").modules


def test_a_process_that_starts_without_streams(tmp_path, adapter, subspace):
    """What it writes must not get the number of a stream: others print there."""
    command = [sys.executable, "-m", "csulora", "correct", adapter, "--subspace", subspace]
    command += ["--out-dir", tmp_path / "out"]
    line = " ".join(f"'{word}'" for word in command) + " <&- >&- 2>&-"
    assert subprocess.run(["sh", "-c", line]).returncode == 2
    assert LoraAdapter.load(tmp_path / "out" / "lora").modules
    assert len(builders.journal_lines(tmp_path / "out")) == 2


def test_what_others_print_stays_out_of_the_results(tmp_path, adapter, subspace):
    setup = """
import csulora.batch.steps as steps
write = steps.write
def loud(*arguments):
    os.write(1, b"C++ speaking\\n")
    print("Python speaking")
    return write(*arguments)
steps.write = loud
"""
    arguments = [
        "correct",
        adapter,
        "--subspace",
        subspace,
        "--out-dir",
        tmp_path / "out",
        "--json",
    ]
    found = forked.run_all({"": {"argv": arguments, "setup": setup}})[""]
    assert found["code"] == 0
    assert "C++ speaking" in found["err"] and "Python speaking" in found["err"]
    assert json.loads(found["out"])["summary"]["corrected"] == 1


NAMES = [
    b"caf\xe9",
    b"two\nlines\xff",
    "ünï".encode(),
    b"\xed\xa0\x80",
]  # the last a lone surrogate


def test_names_that_are_not_utf_8(tmp_path, subspace):
    source, out = tmp_path / "in", tmp_path / "out"
    for i, name in enumerate(NAMES):
        folder = builders.write_adapter(source / str(i))
        folder.rename(source / os.fsdecode(name))
    (tmp_path / "list").write_bytes(b"\0".join(bytes(source) + b"/" + name for name in NAMES))
    common = ["--subspace", subspace]
    calls = {
        "tree": ["correct", source, *common, "--out-dir", out, "--page", tmp_path / "p.html"],
        "list": ["correct", "--adapters-from", tmp_path / "list", *common, "--out-dir", out],
        "missing": ["inspect", source / os.fsdecode(b"no\xe9"), *common],
        "inspect": ["inspect", source / os.fsdecode(NAMES[0]), *common],
    }
    calls["list"] += ["--resume", "--json"]
    found = forked.run_all({name: {"argv": argv, "setup": ASCII} for name, argv in calls.items()})
    assert [found[name]["code"] for name in calls] == [0, 0, 1, 0], found
    assert sorted(os.listdir(bytes(out))) == sorted([*NAMES, builders.JOURNAL.encode()])
    assert "caf\\udce9" in found["tree"]["out"] and found["tree"]["out"].isascii()
    assert json.loads(found["list"]["out"])["summary"]["skipped"] == len(NAMES)
    report = json.loads((out / os.fsdecode(NAMES[0]) / builders.REPORT).read_text())
    assert report["source"]["name"] == r"caf\udce9"
    assert found["missing"]["err"].endswith("no\\udce9: no such folder\n")


@pytest.mark.parametrize(
    "error", [RuntimeError("two\nlines"), MemoryError(), OSError(5, "EIO", "f")]
)
def test_what_nobody_foresaw_is_one_line(capsys, monkeypatch, adapter, subspace, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(csulora.cli.inspect, "decompose_each", fail)
    call = ("inspect", adapter, "--subspace", subspace)
    result = builders.run(capsys, *call)
    assert result.code == 2 and result.out == ""
    text = f"{adapter}, {subspace}: {' '.join(f'{type(error).__name__}: {error}'.split())}"
    expected = (
        "f: EIO" if isinstance(error, OSError) else f"{text} (CSULORA_TRACEBACK=1 shows where)"
    )
    assert result.err == f"csulora: error: {expected}\n"
    monkeypatch.setenv("CSULORA_TRACEBACK", "1")
    shown = builders.run(capsys, *call).err
    assert shown.startswith("Traceback") and shown.endswith(f"csulora: error: {expected}\n")
