"""Files made to cost memory, disk or time, or to hang: one line each, soon, and the others go on."""

import json
import os
import subprocess
import sys
from functools import partial

import builders
import pytest
from builders import CONFIG, JOURNAL, LAYERS, REPORT, WEIGHTS, raw_entry, raw_safetensors
from spoilers import fifo

GB, TB = 1 << 30, 1 << 40
SECONDS, MEGABYTES = 5, 400  # processor time and memory that a refusal may take


def hole(path, size, head=b""):
    """A file of that size that takes next to nothing on disk."""
    path.unlink(missing_ok=True)
    with open(path, "wb") as file:
        file.write(head)
        file.truncate(size)


def big_tensor(name):
    """A well-formed file of one tensor of 6 GB."""
    head = raw_safetensors({name: raw_entry("F32", [GB, 6], 0, 24 * GB)})
    return partial(hole, size=len(head) + 24 * GB, head=head)


def circle(path):
    path.unlink(missing_ok=True)
    path.symlink_to(path.name)


def write(data):
    return lambda path: path.write_bytes(data)


def nested(count, name):
    """Folders within each other, deeper than a path can name."""

    def make(path):
        path.mkdir()
        place = os.open(path, os.O_RDONLY)
        for _ in range(count):
            os.mkdir(name, dir_fd=place)
            inner = os.open(name, os.O_RDONLY, dir_fd=place)
            os.close(place)
            place = inner
        os.close(place)

    return make


LISTS = b"[],"
WEIGHT_FILES = {
    "a-hole-behind-nothing": (partial(hole, size=6 * GB, head=raw_safetensors({})), "belong to no"),
    "a-hole-behind-a-header": (lambda path: os.truncate(path, 6 * GB), "belong to no"),
    "a-tera-of-zeros": (partial(hole, size=TB), "safetensors"),
    "one-big-tensor": (big_tensor("x"), " x"),
    "a-header-of-lists": (
        write(raw_safetensors(b'{"a":[' + LISTS * 4_000_000 + b"0]}")),
        "values",
    ),
    "a-long-header": (partial(hole, size=TB, head=(99 << 20).to_bytes(8, "little")), "header"),
    "a-circle": (circle, "Too many levels"),
}
CONFIG_FILES = {
    "config-a-hole": (partial(hole, size=3 * GB), "3221225472 bytes"),
    "config-of-lists": (write(b'{"a":[' + LISTS * 3_000_000 + b"0]}"), "values"),
    "config-a-circle": (circle, "Too many levels"),
}
OTHER_FILES = {
    "readme-of-a-tera": (partial(hole, size=TB), "1099511627776 bytes"),
    "readme-a-circle": (circle, "Too many levels"),
    "deep": (nested(1100, "d"), "more than 64 folders deep"),
    "too-long": (nested(40, "d" * 200), "File name too long"),
}
ADAPTERS = {
    **{name: (WEIGHTS, *case) for name, case in WEIGHT_FILES.items()},
    **{name: (CONFIG, *case) for name, case in CONFIG_FILES.items()},
    **{name: ("other", *case) for name, case in OTHER_FILES.items()},
}
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
# Of a checkpoint, of a subspace, and beside the outputs of a run that is resumed.
CHECKPOINTS = {
    "base-a-hole": (SINGLE, partial(hole, size=TB), "safetensors"),
    "base-a-hole-behind-a-header": (SINGLE, lambda path: os.truncate(path, 6 * GB), "belong to no"),
    "base-a-circle": (SINGLE, circle, "Too many levels"),
    "index-a-hole": (INDEX, partial(hole, size=3 * GB), "3221225472 bytes"),
    "index-a-pipe": (INDEX, os.mkfifo, "not a regular file"),
    "config-a-hole": ("config.json", partial(hole, size=3 * GB), "3221225472 bytes"),
    "config-a-circle": ("config.json", circle, "Too many levels"),
}
SUBSPACES = {
    "a-hole": (partial(hole, size=6 * GB), "safetensors"),
    "big": (big_tensor(f"{LAYERS[0]}.U"), "not a subspace"),
    "a-pipe": (lambda path: (path.unlink(), os.mkfifo(path)), "not a regular file"),
    "a-circle": (circle, "Too many levels"),
}
RESUMED = {
    "report-a-hole": (f"a/{REPORT}", partial(hole, size=3 * GB), 1, "3221225472 bytes"),
    "report-a-pipe": (f"a/{REPORT}", None, 1, "not a regular file"),
    "weights-a-pipe": (f"a/{WEIGHTS}", None, 1, "not a regular file"),
    "journal-a-hole": (JOURNAL, partial(hole, size=TB), 2, "1099511627776 bytes"),
    "journal-one-long-line": (JOURNAL, write(b"x" * (3 << 20)), 2, "not a journal"),
    "journal-a-pipe": (JOURNAL, None, 2, "not a regular file"),
}


def prepare(root):
    """Everything on disk, and the commands by name."""
    subspace = builders.write_subspace(root / "subspace.safetensors")
    common = ("--subspace", subspace, "--out-dir")
    commands = {}
    for name, (file, spoil, _) in ADAPTERS.items():
        folder = builders.write_adapter(root / "in" / name)
        spoil(folder / file)
        commands[name] = ("correct", folder, *common, root / "out")
    builders.write_adapter(root / "in" / "z")
    commands["all"] = ("correct", root / "in", *common, root / "all")
    for name, (file, spoil, _) in CHECKPOINTS.items():
        pair = builders.checkpoint_pair(root / f"pair-{name}")
        if file == INDEX:
            (pair[0] / SINGLE).unlink()
        spoil(pair[0] / file)
        commands[f"pair-{name}"] = ("estimate", *pair, "--out", root / "s")
    for name, (spoil, _) in SUBSPACES.items():
        file = builders.write_subspace(root / f"subspace-{name}")
        spoil(file)
        arguments = ("--subspace", file, "--out-dir", root / "out")
        commands[f"subspace-{name}"] = ("correct", root / "in" / "z", *arguments)
    for name in RESUMED:
        source = builders.write_adapter(root / "sources" / "a")
        arguments = ("correct", source, *common, root / f"resumed-{name}")
        commands[f"first-{name}"] = arguments
        commands[f"resumed-{name}"] = (*arguments, "--resume")
    return commands


def run_all(commands, between):
    """(code, stderr, seconds, MB) of each command."""
    process = subprocess.Popen(
        [sys.executable, builders.HERE / "cli" / "measured.py"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    results = {}
    try:
        for name, command in commands.items():
            between(name)
            process.stdin.write(json.dumps([str(word) for word in command]) + "\n")
            process.stdin.flush()
            results[name] = json.loads(process.stdout.readline())
    finally:
        process.kill()
        process.wait()
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    root = tmp_path_factory.mktemp("hostile")

    def between(name):
        case = name.removeprefix("resumed-")
        if name.startswith("resumed-"):
            file, spoil, _, _ = RESUMED[case]
            if spoil is None:
                fifo(file)(root / name)
            else:
                spoil(root / name / file)

    found = run_all(prepare(root), between)
    found["root"] = root
    yield found
    subprocess.run(
        ["rm", "-rf", root], check=True
    )  # pytest's own removal goes as deep as its stack


def check(result, code, word):
    found, errors, seconds, grown = result
    complaints = [x for x in errors.split("\n") if x.startswith(("csulora: e", "csulora: failed"))]
    assert found == code and len(complaints) == 1, errors
    assert word in complaints[0] and "unforeseen" not in errors and "Traceback" not in errors
    assert seconds < SECONDS and grown < MEGABYTES, (seconds, grown)


@pytest.mark.parametrize("case", ADAPTERS)
def test_adapter(case, results):
    check(results[case], 1, ADAPTERS[case][2])


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_checkpoint(case, results):
    check(results[f"pair-{case}"], 2, CHECKPOINTS[case][2])


@pytest.mark.parametrize("case", SUBSPACES)
def test_subspace(case, results):
    check(results[f"subspace-{case}"], 2, SUBSPACES[case][1])


@pytest.mark.parametrize("case", RESUMED)
def test_resume(case, results):
    check(results[f"resumed-{case}"], *RESUMED[case][2:])


def test_all_of_them_in_one_run_and_a_good_one_beside(results):
    code, errors, _, grown = results["all"]
    assert code == 1 and grown < MEGABYTES, grown
    assert errors.count("csulora: failed") == len(ADAPTERS), errors
    assert "unforeseen" not in errors
    out = results["root"] / "all"
    assert builders.outputs(out) == ["z"]
    assert not (results["root"] / "out").exists()
