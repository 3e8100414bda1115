"""Mode "require": what is in the cache is served and kept whole, and nothing else is made."""

import builders
import pytest
from builders import WEIGHTS
from refusing import refused

import csulora
from csulora.serving.guard import RefusedError


def longer(file):
    with file.open("ab") as weights:
        weights.write(b"x")


def test_require_serves_what_is_in_the_cache_and_corrects_nothing(place):
    one, two = place.adapter("one"), place.adapter("two", seed=1)
    place.guard().admit(one, "one")
    g = place.guard(mode="require")
    assert g.admit(one, "one").how == "hit"
    error = refused(g, two)
    assert error.reason == "not corrected"
    assert len(place.entries()) == 1


def test_require_repairs_only_to_the_same_bytes(place, monkeypatch):
    folder = place.adapter()
    place.guard().admit(folder, "one")
    g = place.guard(mode="require")
    found = g.admit(folder, "one")
    longer(found.path / WEIGHTS)
    g.check(found.path, "one")
    longer(found.path / WEIGHTS)
    other = csulora.serving.entries.write_folder

    def otherwise(adapter, *arguments, **options):
        next(iter(adapter.modules.values())).B.mul_(1.001)
        return other(adapter, *arguments, **options)

    monkeypatch.setattr("csulora.serving.entries.write_folder", otherwise)
    with pytest.raises(RefusedError, match="comes out otherwise now"):
        g.check(found.path, "one")
    assert place.entries() == []
    with pytest.raises(RefusedError):  # what it came out as is nothing to compare with
        g.check(found.path, "one")
    with pytest.raises(RefusedError):
        g.again(found.path, "one")
    assert place.entries() == []


@pytest.mark.parametrize("spoiled", ["longer", "gone"])
def test_require_repairs_by_its_record_after_a_restart(place, spoiled):
    folder, other = place.adapter(), place.adapter("other", seed=1)
    path = place.guard().admit(folder, "one").path
    before = (path / WEIGHTS).read_bytes()
    if spoiled == "longer":
        longer(path / WEIGHTS)
    else:
        (path / WEIGHTS).unlink()
    g = place.guard(mode="require")
    found = g.admit(folder, "one")
    assert (found.how, found.path) == ("repaired", path)
    assert (path / WEIGHTS).read_bytes() == before and g.admit(folder, "one").how == "hit"
    assert place.decisions()[-2]["decision"] == "repaired"
    with pytest.raises(RefusedError, match="takes corrected adapters only"):
        g.admit(other, "other")


@pytest.mark.parametrize("record", ["gone", "other policy", "signed", "other bytes"])
def test_require_makes_nothing_without_a_record_that_counts(place, record):
    folder = place.adapter()
    path = place.guard().admit(folder, "one").path
    longer(path / WEIGHTS)
    file = path.with_name(f"{path.name}.json")
    changes = {
        "gone": {"format": "another"},
        "other policy": {"policy": "0" * 64},
        "signed": {"how": "signed"},
        "other bytes": {"sha256": "0" * 64},
    }
    builders.edit_json(file, **changes[record])
    with pytest.raises(RefusedError) as caught:
        place.guard(mode="require").admit(folder, "one")
    assert caught.value.reason == ("damaged" if record == "other bytes" else "not corrected")
    assert place.guard(mode="require").cache.find(path.name) is None


def test_the_refusal_says_where_the_form_for_another_rank_is_there(place):
    folder = place.adapter(rank=9)
    weak = {"lambda_left": 0.1, "lambda_right": 0.1, "lambda_off": 0.1}
    place.guard(weak).admit(folder, "one")
    g = place.guard(weak, mode="require")
    assert g.admit(folder, "one", max_rank=32).how == "hit"
    error = refused(g, folder, max_rank=16)
    assert error.reason == "not corrected" and str(error).endswith(
        "the cache has it in the form exact, and the max_lora_rank of this server takes the form "
        "same: run csulora prewarm with that --max-lora-rank"
    )
    assert "form" not in str(refused(place.guard(mode="require"), folder, max_rank=16))
    assert "form" not in str(refused(g, place.adapter("two", seed=1), max_rank=8))
