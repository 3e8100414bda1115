"""Folders that say csulora corrected them: served with a proof, and a report is none."""

import shutil
import sys
import types

import builders
import pytest
from builders import CONFIG, REPORT, WEIGHTS

import csulora
from csulora.serving.guard import RefusedError


def corrected(place, source, name="fixed", correction=None, **options):
    """An output of csulora outside of the configured folders."""
    subspace = csulora.SafetySubspace.load(place.root / "subspace.safetensors")
    target = place.root / name
    options = {"portable": True} | options
    csulora.correct_folder(source, subspace, target, correction, **options)
    place.age(target)
    return target


def refused(g, folder, **options):
    with pytest.raises(RefusedError) as caught:
        g.admit(folder, "name", **options)
    return caught.value


@pytest.mark.parametrize("mode", ["correct", "require"])
def test_recomputed_from_the_source(place, mode):
    source = place.adapter("deep/one")
    folder = corrected(place, source)
    g = place.guard(mode=mode)
    found = g.admit(folder, "fixed")
    assert (found.how, found.rank, found.form) == ("recomputed", 8, "exact")
    for name in (WEIGHTS, CONFIG, REPORT):
        assert (found.path / name).read_bytes() == (folder / name).read_bytes()
    g.check(found.path, "fixed")
    assert g.admit(folder, "fixed").how == g.admit(found.path, "fixed").how == "hit"
    assert refused(g, folder, max_rank=7).reason == "rank"
    # The copy stands by itself from now on, and is made anew where it is damaged.
    (found.path / WEIGHTS).write_bytes(b"x")
    g.check(found.path, "fixed")
    shutil.rmtree(source)
    assert place.guard(mode=mode).admit(folder, "fixed").how == "hit"


def test_realignment_is_proven_as_it_is_made(place):
    source = place.adapter(rank=1)
    folder = corrected(place, source, correction=csulora.Realignment())
    report = csulora.Report.from_dict(csulora.files.json.read_json(folder / REPORT))
    assert max(module.rank_error for module in report.modules.values()) > 0.1
    g = place.guard(method="realign")
    made = g.admit(source, "one")
    found = g.admit(folder, "fixed")
    assert (made.how, found.how) == ("corrected", "recomputed")
    assert (found.path / WEIGHTS).read_bytes() == (made.path / WEIGHTS).read_bytes()


def test_a_form_that_fits_badly_is_refused_as_when_it_is_made(place):
    source, strong = place.adapter(rank=9), {"lambda_off": 100.0}
    settings = csulora.Correction(**strong, form="same")
    folder = corrected(place, source, correction=settings)
    g = place.guard(strong)
    made, proven = refused(g, source, max_rank=16), refused(g, folder, max_rank=16)
    assert made.reason == proven.reason == "rank error" and str(made) == str(proven)
    assert place.guard(strong | {"form": "same"}).admit(folder, "fixed").how == "recomputed"


def forged(place, source):
    """Raw weights under the mark and the report of a correction."""
    folder = corrected(place, source)
    raw = csulora.LoraAdapter.load(source)
    fixed = csulora.LoraAdapter.load(folder)
    report = csulora.Report.from_dict(csulora.files.json.read_json(folder / REPORT))
    shutil.rmtree(folder)
    made = {"made": fixed.made, "source": None}
    csulora.adapter.replace(raw, **made).save(folder, report=report)
    return folder


def without_source(place, source):
    folder = corrected(place, source)
    shutil.rmtree(source)
    return folder


def of_a_changed_source(place, source):
    folder = corrected(place, source)
    builders.edit_json(source / CONFIG, lora_alpha=3)
    return folder


def at_strength_0(place, source):
    return corrected(place, source, correction=csulora.Correction(0, 0, 0, 0))


def weaker(place, source):
    return corrected(place, source, correction=csulora.Correction(lambda_off=1))


def by_patterns(place, source):
    patterns = {"strength_for": {"*": 0}}
    return corrected(place, source, correction=csulora.Correction(**patterns))


def with_another_subspace(place, source):
    subspace = place.root / "subspace.safetensors"
    kept = subspace.read_bytes()
    builders.write_subspace(subspace, builders.subspace_tensors(seed=1))
    folder = corrected(place, source)
    subspace.write_bytes(kept)
    return folder


def with_some_directions(place, source):
    """Of the very subspace, which leaves the update as it is everywhere else."""
    subspace = csulora.SafetySubspace.load(place.root / "subspace.safetensors").leading(1)
    target = place.root / "fixed"
    csulora.correct_folder(source, subspace, target, portable=True)
    place.age(target)
    return target


def without_report(place, source):
    folder = corrected(place, source)
    (folder / REPORT).unlink()
    return folder


def tampered(place, source):
    folder = corrected(place, source)
    builders.edit_json(folder / CONFIG, lora_alpha=1000)
    return folder


def not_portable(place, source):
    return corrected(place, source, portable=False)


@pytest.mark.parametrize("mode", ["correct", "require"])
@pytest.mark.parametrize(
    "make",
    [
        *(forged, without_source, of_a_changed_source, at_strength_0, weaker, by_patterns),
        *(with_another_subspace, with_some_directions, without_report, tampered, not_portable),
    ],
)
def test_a_report_alone_proves_nothing(place, make, mode):
    folder = make(place, place.adapter())
    g = place.guard(mode=mode)
    error = refused(g, folder)
    assert (error.reason == "unproven" and str(folder) in str(error)) or make is not_portable
    assert place.entries() == [] and place.leftovers() == []


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
@pytest.mark.parametrize("signed", [True, False])
def test_a_file_that_is_swapped_between_its_check_and_its_copy(
    place, signatures, monkeypatch, name, signed
):
    source, key = place.adapter(), place.root / "a.pub"
    folder = corrected(place, source)
    key.write_text("a")
    if signed:
        sign(folder, key)
    g = place.guard(trusted_keys=["a.pub"])
    real = csulora.serving.proof.copy_file

    def swapping(path, target, **options):
        return real(source / name if path.name == name else path, target, **options)

    monkeypatch.setattr("csulora.serving.proof.copy_file", swapping)
    assert refused(g, folder).reason == "changed"
    assert place.entries() == [] and place.leftovers() == []


def test_passed_through_tensors_are_not_proven_either(place):
    source = place.adapter()
    builders.edit_tensors(
        source / WEIGHTS, lambda tensors: tensors.update(odd=tensors[min(tensors)].clone())
    )
    folder = corrected(place, source, pass_through=True, portable=False)
    for form in ("portable", "keep"):
        assert refused(place.guard(form=form), folder).reason == "not lora"


@pytest.fixture
def signatures(monkeypatch):
    """Stands in for csulora.serving.signature: the digests of both files and a key's text."""

    def signer(folder, trusted):
        file = folder / "csulora_signature.json"
        stated = file.read_text() if file.exists() else None
        both = builders.digest(folder / WEIGHTS) + builders.digest(folder / CONFIG)
        return next((str(key) for key in trusted if stated == both + key.read_text()), None)

    module = types.ModuleType("csulora.serving.signature")
    module.signer = signer
    module.check_trusted = lambda trusted: None
    monkeypatch.setitem(sys.modules, "csulora.serving.signature", module)


def sign(folder, key):
    both = builders.digest(folder / WEIGHTS) + builders.digest(folder / CONFIG)
    (folder / "csulora_signature.json").write_text(both + key.read_text())


@pytest.mark.parametrize("mode", ["correct", "require"])
def test_signed_by_a_trusted_key(place, signatures, mode):
    source, keys = place.adapter(), [place.root / "a.pub", place.root / "b.pub"]
    for key in keys:
        key.write_text(key.name)
    folder = corrected(place, source, correction=csulora.Correction(lambda_off=1))
    shutil.rmtree(source)
    trusting = {"mode": mode, "trusted_keys": ["a.pub"]}
    assert refused(place.guard(**trusting), folder).reason == "unproven"
    sign(folder, keys[1])
    assert refused(place.guard(**trusting), folder).reason == "unproven"
    sign(folder, keys[0])
    g = place.guard(**trusting)
    found = g.admit(folder, "one")
    assert found.how == "signed" and g.admit(folder, "one").how == "hit"
    g.check(found.path, "one")
    place.age(folder)
    g.admit(folder, "one")
    with pytest.MonkeyPatch.context() as patch:  # nor is the folder read for each request
        patch.setattr(sys.modules["csulora.serving.signature"], "signer", None)
        assert g.admit(folder, "one").how == "hit"
    (found.path / WEIGHTS).write_bytes(b"x")
    assert g.again(found.path, "one") == found.path
    # A key that counts no longer takes its entries with it, by whatever name.
    for changes in ({"trusted_keys": None}, {"trusted_keys": ["b.pub"]}):
        g = place.guard(**trusting | changes)
        assert refused(g, folder).reason == "unproven"
        assert refused(g, found.path).reason == "not corrected"
    keys[0].write_text("another key in the same file")
    assert refused(place.guard(**trusting), folder).reason == "unproven"


def test_a_signature_of_other_bytes(place, signatures):
    (place.root / "a.pub").write_text("a")
    folder = corrected(place, place.adapter())
    sign(folder, place.root / "a.pub")
    builders.edit_json(folder / CONFIG, lora_alpha=1000)
    g = place.guard(trusted_keys=["a.pub"])
    assert refused(g, folder).reason == "unproven"


def test_a_signature_does_not_make_a_raw_adapter_a_corrected_one(place, signatures):
    (place.root / "a.pub").write_text("a")
    folder = place.adapter()
    sign(folder, place.root / "a.pub")
    assert place.guard(trusted_keys=["a.pub"]).admit(folder, "one").how == "corrected"
    other = place.adapter("two", seed=1)
    sign(other, place.root / "a.pub")
    g = place.guard(mode="require", trusted_keys=["a.pub"])
    assert refused(g, other).reason == "not corrected"


def counted(monkeypatch, name):
    """The calls of a function of csulora.serving.proof from now on."""
    calls, real = [], getattr(csulora.serving.proof, name)

    def call(*arguments, **options):
        calls.append(arguments)
        return real(*arguments, **options)

    monkeypatch.setattr(f"csulora.serving.proof.{name}", call)
    return calls


@pytest.mark.parametrize("make", [without_source, weaker, without_report, tampered])
def test_what_cannot_be_proven_is_not_copied(place, monkeypatch, make):
    folder, g = make(place, place.adapter()), place.guard()
    copies = counted(monkeypatch, "copy_file")
    for _ in range(3):
        assert refused(g, folder).reason == "unproven"
    assert copies == []


def test_a_proof_that_fails_is_remembered_for_a_moment(place, monkeypatch):
    folder, g = forged(place, place.adapter()), place.guard()
    place.age(folder)
    proofs, copies = counted(monkeypatch, "verify"), counted(monkeypatch, "copy_file")
    first = str(refused(g, folder))
    for _ in range(3):
        assert str(refused(g, folder)) == first
    assert len(proofs) == 1 and len(copies) == 3
    monkeypatch.setattr("csulora.serving.recent.MOMENT", 0)
    assert str(refused(g, folder)) == first and len(proofs) == 2


def test_what_was_not_proven_is_looked_at_anew_once_its_report_is_another(place):
    folder = corrected(place, place.adapter())
    report = (folder / REPORT).read_bytes()
    (folder / REPORT).unlink()
    g = place.guard()
    assert refused(g, folder).reason == "unproven"
    (folder / REPORT).write_bytes(report)
    assert g.admit(folder, "one").how == "recomputed"


def test_what_was_not_proven_is_proven_once_its_source_is_there(place, monkeypatch):
    source = place.adapter()
    folder = corrected(place, source)
    hidden = source.rename(place.root / "hidden")
    g = place.guard()
    assert refused(g, folder).reason == "unproven"
    hidden.rename(source)
    monkeypatch.setattr("csulora.serving.recent.MOMENT", 0)
    assert g.admit(folder, "one").how == "recomputed"


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG, REPORT])
def test_the_copy_is_what_is_proven(place, monkeypatch, name):
    """Whatever was seen before it was made."""
    source = place.adapter()
    folder = corrected(place, source)
    other = corrected(place, source, "weaker", csulora.Correction(lambda_off=1))
    g = place.guard()
    real = csulora.serving.proof.copy_file

    def swapping(path, target, **options):
        return real(other / name if path.name == name else path, target, **options)

    monkeypatch.setattr("csulora.serving.proof.copy_file", swapping)
    equal = (other / name).read_bytes() == (folder / name).read_bytes()
    if equal:
        assert name == CONFIG
    else:
        assert refused(g, folder).reason == ("unproven" if name == REPORT else "changed")
        assert place.entries() == [] and place.leftovers() == []


def test_the_report_that_counts_is_the_one_that_was_copied(place, monkeypatch):
    """One that speaks of the server's settings is there first, and the true one when it is copied."""
    source = place.adapter()
    folder, strong = weaker(place, source), corrected(place, source, "strong")
    true = place.root / "true.json"
    shutil.copy(folder / REPORT, true)
    output = csulora.files.json.read_json(true)["output"]
    shutil.copy(strong / REPORT, folder / REPORT)
    builders.edit_json(folder / REPORT, output=output)
    g = place.guard()
    real = csulora.serving.proof.copy_file

    def swapping(path, target, **options):
        return real(true if path.name == REPORT else path, target, **options)

    monkeypatch.setattr("csulora.serving.proof.copy_file", swapping)
    error = refused(g, folder)
    assert error.reason == "unproven" and "with other settings" in str(error)
    assert place.entries() == [] and place.leftovers() == []
