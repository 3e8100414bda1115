"""Which adapters the arguments name, where each goes, and collisions found before any work."""

import inspect
import os
import sys
import time

import builders
import pytest
from builders import WEIGHTS

from csulora import UsageError
from csulora.batch.sources import Item, PassedOver, check_targets, find


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """Adapters at several depths, one inside another, one hidden, one behind a link."""
    monkeypatch.chdir(tmp_path)
    for place in ("a/x", "a/y", "b/deep/z", "b/deep/z/checkpoint-5", "c", ".hidden/h"):
        builders.write_adapter(tmp_path / "in" / place)
    builders.write_adapter(tmp_path / "elsewhere" / "e")
    (tmp_path / "in" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "empty").mkdir()
    return tmp_path / "in"


def targets(*arguments):
    return [item.target for item in find(arguments)]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("in/**", ["a/x", "a/y", "b/deep/z", "c"]),
        ("in", ["a/x", "a/y", "b/deep/z", "c"]),
        ("in/*", ["c"]),
        ("in/*/*", ["a/x", "a/y"]),
        ("in/a/?", ["x", "y"]),
        ("in/[ab]/x", ["a/x"]),
        ("in/[!a]*/**", ["b/deep/z", "c"]),
        ("in/**/z", ["b/deep/z"]),
        ("in/b/*/*/checkpoint-*", ["deep/z/checkpoint-5"]),
        ("**", ["elsewhere/e", "in/a/x", "in/a/y", "in/b/deep/z", "in/c"]),
        ("in/a/x", ["x"]),
        ("in/a/x/**", ["x"]),  # no folder, too; what lies within an adapter is not taken for one
        ("in/link/e", ["e"]),
    ],
)
def test_patterns_and_trees(tree, pattern, expected):
    assert targets(pattern) == expected


def test_sources_are_paths_that_exist(tree):
    for pattern in ("in/**", str(tree / "**"), "in", "**"):
        for source, target, local in find([pattern]):
            assert local
            assert os.path.exists(os.path.join(source, builders.CONFIG))
            assert source.endswith(target)


def test_what_is_passed_over_is_told(tree, capsys, subspace, tmp_path):
    (tree / "bare").mkdir()
    (tree / "bare" / WEIGHTS).write_bytes(b"")
    (tree / "nowhere").symlink_to(tree / "gone")
    (tree / "loop").symlink_to(tree / "loop")
    passed_over = PassedOver([], [])
    find(["in"], passed_over=passed_over)
    assert passed_over == (["in/link"], ["in/bare"])
    common = ("--subspace", subspace, "--out-dir", tmp_path / "out")
    result = builders.run_correct(capsys, "in", *common)
    link, bare = result.warnings[:2]
    assert "1 link (the first: in/link) to folders" in link and "in/bare" in bare
    result = builders.run_correct(capsys, "in/a", *common, "--overwrite")
    assert not result.warnings


@pytest.mark.parametrize("argument", ["in", "in/**", "**"])
def test_an_output_folder_within_a_tree_is_not_a_source(tree, argument, capsys, subspace):
    call = (argument, "--subspace", subspace, "--out-dir", tree / "made" / "here")
    for existing in ([], ["--resume"], ["--overwrite"]):
        result = builders.run_correct(capsys, *call, *existing, "--json")
        assert result.code == 0, result.err
        kinds = {entry[0] for entry in builders.outcomes(result).values()}
        assert kinds == ({"skipped"} if existing == ["--resume"] else {"corrected"})


def test_several_arguments_and_a_hub_id(tree):
    assert targets("in/c", "org/model", "in/a") == ["c", "model", "x", "y"]
    assert [item.local for item in find(["in/c", "org/model"])] == [True, False]


def test_a_folder_without_adapters_stays_one_source(tree):
    assert find(["in/empty"]) == [Item("in/empty", "empty")]


def test_names_with_wildcards_are_taken_as_they_are_if_they_exist(tree):
    builders.write_adapter(tree / "odd[1]*")
    assert targets("in/odd[1]*") == ["odd[1]*"]


def test_patterns_with_many_stars_and_trees_of_many_levels(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    deep = os.path.join("in", *["d"] * 40)
    os.makedirs(os.path.join(deep, "x"))
    builders.write_adapter(tmp_path / deep / "x" / "lora")
    start = time.process_time()
    for pattern in ("in/" + "**/" * 12 + "nothing", "in/" + "**/d/" * 12 + "nothing"):
        with pytest.raises(UsageError, match="matches no folder"):
            find([pattern])
    assert len(find(["in/" + "**/" * 12 + "lora"])) == 1
    assert time.process_time() - start < 5


def test_a_tree_deeper_than_recursion_goes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    levels = ["in" + "/d" * i for i in range(1500)]  # paths that the file system takes
    for path in levels:
        os.mkdir(path)
    config = f"{levels[-1]}/{builders.CONFIG}"
    with open(config, "w"):
        pass
    assert targets("in") == [levels[-1].removeprefix("in/")]
    os.unlink(config)
    for path in reversed(levels):  # whoever clears up recurses
        os.rmdir(path)


@pytest.mark.parametrize("pattern", ["in/nothing*", "none/**", "in/**/nothing", "in/empty/**"])
def test_a_pattern_without_a_match_is_an_error(tree, pattern):
    with pytest.raises(UsageError, match="matches no folder"):
        find([pattern])


def test_a_folder_that_cannot_be_listed_is_an_error(tree, monkeypatch):
    listed = os.scandir

    def scandir(path):
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UsageError, match=r"deep: cannot be listed \(Permission denied\)"):
        find(["in/**"])


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["in/a/x", "elsewhere/../in/a/x"], "rename"),
        (["in/c", "in/a"], "lie within"),  # with the folder below: to c, and to c/below
        (["in/**", "in/*/*"], "rename"),
        (["in/c", "in/c"], "rename"),
    ],
)
def test_collisions_before_any_work(tree, arguments, word, capsys, tmp_path):
    if word == "lie within":
        builders.write_adapter(tree / "a" / "c" / "below")
    subspace = builders.write_subspace(tmp_path / "s.safetensors")
    out = tmp_path / "out"
    result = builders.run(capsys, "correct", *arguments, "--subspace", subspace, "--out-dir", out)
    assert (result.code, len(result.complaints)) == (2, 1), result.err
    assert word in result.complaints[0]
    assert not out.exists()


def test_outputs_do_not_go_through_a_link(tree, capsys, tmp_path):
    subspace = builders.write_subspace(tmp_path / "s.safetensors")
    out, outside = tmp_path / "out", tmp_path / "outside"
    out.mkdir()
    outside.mkdir()
    (out / "a").symlink_to(outside)
    result = builders.run(capsys, "correct", "in", "--subspace", subspace, "--out-dir", out)
    assert (result.code, len(result.complaints)) == (2, 1)
    assert str(out / "a") in result.complaints[0] and "link" in result.complaints[0]
    assert builders.tree(outside) == {}


def test_an_adapter_named_like_the_journal(tmp_path):
    with pytest.raises(UsageError, match="name of the journal"):
        check_targets([Item("x/" + builders.JOURNAL, builders.JOURNAL)], tmp_path)


def test_outputs_mirror_the_tree(tree, capsys, tmp_path):
    subspace = builders.write_subspace(tmp_path / "s.safetensors")
    arguments = ("--subspace", subspace, "--out-dir", tmp_path / "out")
    assert builders.run(capsys, "correct", "in/**", *arguments).code == 0
    found = sorted((tmp_path / "out").rglob(builders.REPORT))
    places = [str(path.parent.relative_to(tmp_path / "out")) for path in found]
    assert places == ["a/x", "a/y", "b/deep/z", "c"]


def test_trees_deeper_than_the_stack(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    deep = os.path.join("in", *["d"] * 200)
    builders.write_adapter(tmp_path / deep / "lora")
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 100)
    try:
        assert targets("in") == [os.path.join(*["d"] * 200, "lora")]
    finally:
        sys.setrecursionlimit(limit)


def test_a_tree_deeper_than_a_path_is_one_line(tmp_path, capsys, subspace, out):
    place = os.open(tmp_path, os.O_RDONLY)
    for name in ["in"] + ["d" * 250] * 20:
        os.mkdir(name, dir_fd=place)
        place, outer = os.open(name, os.O_RDONLY, dir_fd=place), place
        os.close(outer)
    os.close(place)
    builders.write_adapter(tmp_path / "in" / "lora")
    result = builders.run_correct(capsys, tmp_path / "in", "--subspace", subspace, "--out-dir", out)
    assert (result.code, len(result.complaints)) == (2, 1) and not out.exists()
    assert "File name too long" in result.complaints[0]
