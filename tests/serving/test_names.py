"""Names of requests never lead out of the configured folders."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csulora.serving.names import adapters_in, find_adapter
from csulora.serving.refused import RefusedError


def test_names_of_folders(place):
    other = place.root / "other"
    for folder in (place.adapters / "one", place.adapters / "org" / "two", other / "one"):
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text("{}")
    folders = (place.adapters, other)
    assert find_adapter(folders, "one") == place.adapters / "one"
    assert find_adapter(folders, "org/two") == place.adapters / "org" / "two"
    assert find_adapter(folders[1:], "one") == other / "one"
    for unknown in ("two", "org", "One", "one/adapter_config.json", "x" * 300, "a/" * 200 + "a"):
        assert find_adapter(folders, unknown) is None
    (place.adapters / "linked").symlink_to(other / "one")
    assert find_adapter(folders, "linked") == other / "one"
    with pytest.raises(RefusedError, match="leaves the folders"):
        find_adapter(folders[:1], "linked")


def test_the_adapters_of_folders_are_those_that_names_stand_for(place):
    other, outside = place.root / "other", place.root / "outside"
    for folder in ("a/one", "a/.store/v3", "a/one/within"):
        place.adapter(folder)
    for folder in (other / "two", outside / "three"):
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text("{}")
    links = {
        "a/current": ".store/v3",  # the only way to it that is no hidden one
        "a/again": "current",
        "a/first": "one",
        "a/up": "..",
        "a/self": "self",
        "a/gone": "nowhere",
        "b": "a",
        "out": str(outside / "three"),
        "all": str(outside),
        "two": str(other / "two"),
    }
    for name, target in links.items():
        (place.adapters / name).symlink_to(target)
    folders = (place.adapters, other)
    found = adapters_in(folders)
    assert [os.path.relpath(path, place.root) for path in found] == [
        "adapters/a/one",
        "other/two",
        "adapters/a/again",
    ]
    for path, name in zip(found, ("a/one", "two", "a/again"), strict=True):
        assert str(find_adapter(folders, name)) == os.path.realpath(path)
    assert adapters_in(()) == [] and adapters_in((place.adapters, place.adapters)) == [
        found[0],
        found[2],
    ]


@pytest.mark.parametrize(
    "name",
    [
        *("", ".", "..", "../secret", "one/../../secret", "/etc", "//x", "a//b", "a/", "a\0b"),
        *("a\\b", "./one", "one/.", "\ud800"),
    ],
)
def test_names_that_lead_elsewhere(place, name):
    (place.root / "secret").mkdir()
    (place.root / "secret" / "adapter_config.json").write_text("{}")
    place.adapter("one")
    guard = place.guard()
    with pytest.raises(RefusedError) as caught:
        guard.find(name)
    assert caught.value.reason == "outside"
    assert place.decisions()[-1]["decision"] == "refused"


parts = st.one_of(
    st.sampled_from(["..", ".", "", "one", "secret", "out", "in", "~", "\0", "*", "$HOME"]),
    st.text(max_size=8),
)


@given(st.lists(parts, max_size=5).map("/".join))
def test_whatever_the_name_nothing_outside_is_found(tmp_path_factory, name):
    root = tmp_path_factory.getbasetemp() / "names"
    if not root.exists():
        for folder in ("adapters/one", "secret"):
            (root / folder).mkdir(parents=True)
            (root / folder / "adapter_config.json").write_text("{}")
        (root / "adapters" / "out").symlink_to(root / "secret")
        (root / "adapters" / "in").symlink_to(root / "adapters" / "one")
    try:
        found = find_adapter((root / "adapters",), name)
    except RefusedError:
        return
    assert found in (None, root / "adapters" / "one")
    assert found is None or os.path.realpath(found) == str(found)
