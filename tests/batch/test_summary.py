"""What a run says of itself: table, JSON, page, probe."""

import json
import os
from pathlib import Path

import builders
import pytest

from csulora import Outcome
from csulora.batch.summary import Summary, probe
from csulora.report import Totals


def totals(off, change):
    shares = {"aligned": 1 - off, "partial_left": 0.0, "partial_right": 0.0, "off": off}
    return Totals(1, 1.0, 1.0, shares, shares, change, 0.0)


def outcome(name, off=0.2, change=0.1, **rest):
    return Outcome(name, Path(name), "corrected", totals=totals(off, change), **rest)


def test_counts_bytes_and_slowest():
    summary = Summary(4, copy_speed=1e9)
    summary.add(outcome("a", seconds=1.0, bytes_in=10, bytes_out=20))
    summary.add(outcome("b", seconds=3.0, bytes_in=1, bytes_out=2))
    summary.add(Outcome("c", Path("c"), "failed", error="c: no", kind="source"))
    summary.add(Outcome("d", Path("d"), "skipped", totals=totals(0.4, 0.3)))
    found = summary.to_dict()
    assert (found["corrected"], found["skipped"], found["failed"]) == (2, 1, 1)
    assert (found["bytes_in"], found["bytes_out"]) == (11, 22)
    assert found["failures"] == {"source": 1} and summary.examples == {"source": "c: no"}
    assert [entry["adapter"] for entry in found["slowest"]] == ["b", "a"]
    assert found["share_of_copy_speed"] == pytest.approx(33 / found["seconds"] / 1e9)
    assert found["spread"]["off"]["median"] == pytest.approx(0.2)
    json.dumps(found, allow_nan=False)


def test_outliers_are_named_at_both_ends_and_only_among_many():
    summary = Summary(200)
    for i in range(200):
        summary.add(outcome(f"n{i}", off=0.2 + 0.0001 * (i % 50), change=0.1))
    assert summary.outliers() == []
    summary.add(outcome("high", off=0.9))
    summary.add(outcome("low", off=0.01))
    summary.add(outcome("changed", change=0.7))
    assert [(o.adapter, o.figure) for o in summary.outliers()] == [
        ("changed", "change"),
        ("high", "off"),
        ("low", "off"),
    ]
    alike = Summary(25)
    for i in range(25):
        alike.add(outcome(f"n{i}", off=0.2, change=209.21323))
    assert alike.outliers() == []
    few = Summary(3)
    for off in (0.1, 0.1, 0.9):
        few.add(outcome("x", off=off))
    assert few.outliers() == []


def test_an_empty_run_has_a_summary():
    json.dumps(Summary(0).to_dict(), allow_nan=False)


@pytest.fixture
def many(tmp_path, subspace):
    for i in range(25):
        builders.write_adapter(tmp_path / "in" / f"n{i:02}", seed=i)
    (tmp_path / "in" / "n03" / builders.WEIGHTS).write_bytes(b"\xff" * 40)
    return (tmp_path / "in", "--subspace", subspace, "--out-dir", tmp_path / "out")


def test_table_of_a_run(many, capsys, tmp_path):
    result = builders.run(capsys, "correct", *many, "--probe")
    assert result.code == 1
    lines = [line.split("   ")[0].rstrip() for line in result.out.splitlines()]
    assert lines[0] == "24 corrected, 1 failed"
    wanted = {"time", "weights", "copying", "off-subspace share", "relative change", "slowest"}
    assert wanted <= set(lines) and "failed: source" in lines
    assert "the first:" in result.out and "n03" in result.out


def test_json_of_a_run(many, capsys):
    result = builders.run(capsys, "correct", *many, "--json", "--probe")
    found = json.loads(result.out)
    assert len(found["adapters"]) == found["summary"]["total"] == 25
    assert found["adapters"][3]["kind"] == "source"
    assert found["adapters"][4]["totals"]["modules"] == 2
    assert found["summary"]["copy_bytes_per_second"] > 0


@pytest.mark.parametrize("suffix", [".png", ".html"])
def test_page(many, capsys, tmp_path, suffix):
    evil = builders.write_adapter(tmp_path / "in" / "<b>$evil$", seed=1)
    builders.edit_tensors(evil / builders.WEIGHTS, lambda t: t.update(x=t.popitem()[1]))
    page = tmp_path / f"page{suffix}"
    assert builders.run(capsys, "correct", *many, "--page", page).code == 1
    data = page.read_bytes()
    if suffix == ".png":
        assert data.startswith(b"\x89PNG")
    else:
        text = data.decode()
        assert "24 adapters corrected" in text and "data:image/png;base64," in text
        assert "&lt;b&gt;$evil$" in text and "<b>" not in text


@pytest.mark.parametrize("name", ["page.pdf", "folder.png", "file/page.png"])
def test_a_page_that_cannot_be_written_is_refused_before_any_work(many, capsys, tmp_path, name):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("")
    result = builders.run(capsys, "correct", *many, "--page", tmp_path / name)
    assert (result.code, len(result.complaints)) == (2, 1)
    assert not (tmp_path / "out").exists()


def test_probe_leaves_nothing_and_reads_weights_only(many, tmp_path):
    from csulora.batch import find

    before = builders.tree(tmp_path)
    assert probe(find([many[0]]), tmp_path / "out") > 0
    assert builders.tree(tmp_path) == before and not (tmp_path / "out").exists()
    assert probe(find(["org/model"]), tmp_path / "out") is None


def test_probe_copies_no_more_than_its_limit_and_waits_for_nothing(many, tmp_path, monkeypatch):
    from csulora.batch import find, summary

    sizes, sync = [], summary.sync

    def measured(file):
        sync(file)
        sizes.append(file.seek(0, 2))

    monkeypatch.setattr(summary, "PROBE_BYTES", 1 << 20)
    monkeypatch.setattr(summary, "sync", measured)
    weights = [folder / builders.WEIGHTS for folder in sorted(many[0].iterdir())]
    weights[0].unlink()
    os.mkfifo(weights[0])
    os.truncate(weights[1], 3 << 30)
    assert probe(find([many[0]]), tmp_path / "out") > 0
    assert sizes[-1] == 1 << 20


@pytest.mark.parametrize("size", ["0", "x", "-1", "1Q", "nan"])
def test_batch_bytes_that_are_none(many, capsys, size):
    result = builders.run(capsys, "correct", *many, f"--batch-bytes={size}")
    assert result.code == 2 and "--batch-bytes" in result.err


def test_sizes():
    from csulora.cli.options import _size

    assert [_size(text) for text in ("7", "2K", "512M", "1.5g")] == [7, 2048, 1 << 29, 3 << 29]
