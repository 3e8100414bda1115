"""What a guard remembers: of so many things, never more, and what is forgotten is looked at again."""

from collections import OrderedDict

import builders
import pytest
from builders import CONFIG, WEIGHTS
from hypothesis import given
from hypothesis import strategies as st

from csulora.serving import recent
from csulora.serving.guard import RefusedError


@given(st.lists(st.tuples(st.sampled_from(["get", "set", "forget"]), st.integers(0, 6))))
def test_the_least_recently_used_is_forgotten(steps):
    size, recent.SIZE = recent.SIZE, 3
    try:
        found, wanted = recent.Recent(), OrderedDict()
        for number, (step, thing) in enumerate(steps):
            if step == "set":
                found.set(thing, number)
                wanted[thing] = number
                wanted.move_to_end(thing)
                if len(wanted) > 3:
                    wanted.popitem(last=False)
            elif step == "forget":
                found.forget(thing)
                wanted.pop(thing, None)
            else:
                if thing in wanted:
                    wanted.move_to_end(thing)
                assert found.get(thing) == wanted.get(thing)
        assert len(found._values) <= 3
    finally:
        recent.SIZE = size


def remembered(value, seen=None):
    """The sizes of all that an object of a guard, and those that it holds, keeps by thing."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, (dict, set, list)):
        yield len(value)
    elif type(value).__module__.startswith(("csulora.serving", "collections")):
        for one in vars(value).values():
            yield from remembered(one, seen)


def no_update(folder):
    builders.edit_json(folder / CONFIG, use_dora=True)


def half_a_pair(folder):
    builders.edit_tensors(folder / WEIGHTS, lambda tensors: tensors.popitem())


def too_far(folder):
    """Refused by what only a correction shows, under the settings below."""


@pytest.mark.parametrize("spoil", [no_update, half_a_pair, too_far])
@pytest.mark.parametrize("mode", ["correct", "require", "observe"])
def test_what_a_guard_remembers_does_not_grow(place, monkeypatch, mode, spoil):
    monkeypatch.setattr(recent, "SIZE", 2)
    settings = {"lambda_left": 0, "lambda_right": 0, "lambda_off": 1e4}
    g = place.guard(settings, mode=mode, max_lora_rank=4)
    sizes = []
    for i in range(8):
        folder = place.adapter(str(i), seed=i)
        spoil(folder)
        place.age(folder)
        try:
            g.admit(folder, "one")
        except RefusedError:
            assert mode != "observe"
        sizes.append(list(remembered(g)))
    assert sizes[3] == sizes[7] != []


def test_what_a_guard_remembers_of_what_it_serves(place, monkeypatch):
    monkeypatch.setattr(recent, "SIZE", 2)
    g = place.guard()
    sizes = []
    for i in range(6):
        g.check(g.admit(place.adapter(str(i), seed=i), "one").path, "one")
        sizes.append(sum(remembered(g)))
    assert sizes[3] - sizes[2] == sizes[5] - sizes[4] == 1  # what it holds has to be known


def test_what_is_forgotten_is_looked_at_again(place, monkeypatch):
    monkeypatch.setattr(recent, "SIZE", 1)
    one, two = place.adapter("one"), place.adapter("two", seed=1)
    g = place.guard()
    first, second = g.admit(one, "one"), g.admit(two, "two")
    sound = builders.tree(first.path)
    data = bytearray((first.path / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (first.path / WEIGHTS).write_bytes(data)
    g.check(first.path, "one")
    assert builders.tree(first.path) == sound
    for _ in range(2):
        for path, folder in ((first.path, one), (second.path, two)):
            g.check(path, "x")
            assert g.admit(folder, "x").path == path
    builders.edit_tensors(one / WEIGHTS, lambda tensors: next(iter(tensors.values())).mul_(2))
    assert g.admit(one, "one").path != first.path


def test_an_entry_of_other_settings_is_not_trusted_for_being_forgotten(place, monkeypatch):
    monkeypatch.setattr(recent, "SIZE", 1)
    folder = place.adapter()
    weak = place.guard({"lambda_off": 0}).admit(folder, "one")
    g = place.guard()
    for _ in range(2):
        with pytest.raises(RefusedError, match="made with other settings"):
            g.check(weak.path, "one")
        g.admit(place.adapter("two", seed=1), "two")
