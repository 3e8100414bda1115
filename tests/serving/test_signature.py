"""Signatures of outputs: what they hold for, what is not signed, and what else must not notice them."""

import json
import os
import shutil
import stat
import subprocess
import sys

import builders
import pytest
import torch
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import csulora
from csulora import CsuloraError
from csulora.output import SIGNATURE
from csulora.serving.signature import DOMAIN, LIMIT, new_key, sign, signer

FILES = (builders.WEIGHTS, builders.CONFIG)


@pytest.fixture
def output(adapter, subspace, tmp_path):
    target = tmp_path / "out" / "lora"
    csulora.correct_folder(adapter, csulora.SafetySubspace.load(subspace), target)
    return target


@pytest.fixture
def keys(tmp_path):
    return new_key(tmp_path / "ops")


@pytest.fixture
def signed(output, keys):
    sign(output, keys[0])
    return output


def flip(path, position, bit):
    data = bytearray(path.read_bytes())
    data[position % len(data)] ^= 1 << bit
    path.write_bytes(data)


def test_a_signature_names_the_key_that_gave_it(output, keys, tmp_path):
    _, other = new_key(tmp_path / "other")
    assert signer(output, [keys[1]]) is None
    assert sign(output, keys[0]) == output / SIGNATURE
    assert signer(output, [other, keys[1]]) == str(keys[1])
    assert signer(output, [other]) is None
    assert signer(output, []) is None


def test_a_signature_is_ed25519_over_the_domain_and_two_digests(signed, keys):
    """Computed here from the description alone, so that other programs can do it too."""
    values = json.loads((signed / SIGNATURE).read_text())
    assert values.keys() == {"format", "key", "signature"}
    assert values["format"] == "csulora_signature/1"
    public = ed25519.Ed25519PublicKey.from_public_bytes(bytes.fromhex(values["key"]))
    assert public == serialization.load_pem_public_key(keys[1].read_bytes())
    digests = b"".join(bytes.fromhex(builders.digest(signed / name)) for name in FILES)
    public.verify(bytes.fromhex(values["signature"]), b"csulora adapter signature 1\0" + digests)


def test_a_signature_outlives_a_move_and_the_report(signed, keys, tmp_path):
    moved = tmp_path / "elsewhere"
    signed.rename(moved)
    (moved / builders.REPORT).unlink()
    (moved / "README.md").write_text("other")
    assert signer(moved, [keys[1]]) == str(keys[1])


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(name=st.sampled_from(FILES), position=st.integers(0, 1 << 20), bit=st.integers(0, 7))
def test_no_flipped_bit_keeps_the_signature(signed, keys, name, position, bit):
    before = (signed / name).read_bytes()
    try:
        flip(signed / name, position, bit)
        try:
            found = signer(signed, [keys[1]])
        except CsuloraError:  # no safetensors file any more
            found = None
        assert found is None
    finally:
        (signed / name).write_bytes(before)
    assert signer(signed, [keys[1]]) == str(keys[1])


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(position=st.integers(0, 127), digit=st.sampled_from("0123456789abcdef"))
def test_no_changed_digit_of_the_signature_holds(signed, keys, position, digit):
    before = (signed / SIGNATURE).read_text()
    values = json.loads(before)
    text = values["signature"]
    values["signature"] = text[:position] + digit + text[position + 1 :]
    builders.write_json(signed / SIGNATURE, values)
    try:
        expected = str(keys[1]) if values["signature"] == text else None
        assert signer(signed, [keys[1]]) == expected
    finally:
        (signed / SIGNATURE).write_text(before)


def test_the_two_files_cannot_change_places(output, keys, tmp_path):
    """Both digests have their place in what is signed."""
    digests = [bytes.fromhex(builders.digest(output / name)) for name in FILES]
    private = serialization.load_pem_private_key(keys[0].read_bytes(), None)
    for message, expected in (
        (DOMAIN + digests[0] + digests[1], str(keys[1])),
        (DOMAIN + digests[1] + digests[0], None),
        (digests[0] + digests[1], None),
    ):
        values = {"format": "csulora_signature/1", "signature": private.sign(message).hex()}
        builders.write_json(output / SIGNATURE, values)
        assert signer(output, [keys[1]]) == expected


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "not readable as JSON"),
        (b"\xff\xfe", "not readable as JSON"),
        (b"[]", "expected a JSON object"),
        (b'{"format": "csulora_signature/2"}', "csulora_signature/1 is needed"),
        (b'{"format": "csulora_signature/1"}', "128 hexadecimal digits"),
        (b'{"format": "csulora_signature/1", "signature": 7}', "128 hexadecimal digits"),
        (b'{"format": "csulora_signature/1", "signature": "ab"}', "128 hexadecimal digits"),
        (
            b'{"format": "csulora_signature/1", "signature": "' + b"x" * 128 + b'"}',
            "128 hexadecimal digits",
        ),
        (b" " * (LIMIT + 1), "at most"),
    ],
)
def test_a_malformed_signature_is_one_line(signed, keys, content, text):
    (signed / SIGNATURE).write_bytes(content)
    with pytest.raises(CsuloraError) as found:
        signer(signed, [keys[1]])
    assert str(signed / SIGNATURE) in str(found.value) and text in str(found.value)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("name", [*FILES, SIGNATURE])
def test_nothing_is_read_through_a_link_out_of_the_folder(signed, keys, tmp_path, name):
    outside = tmp_path / f"outside-{name}"
    (signed / name).rename(outside)
    (signed / name).symlink_to(outside)
    with pytest.raises(CsuloraError, match="links outside its folder"):
        signer(signed, [keys[1]])


def test_a_pipe_in_place_of_a_signature_is_not_waited_for(signed, keys):
    (signed / SIGNATURE).unlink()
    os.mkfifo(signed / SIGNATURE)
    with pytest.raises(CsuloraError, match="not a regular file"):
        signer(signed, [keys[1]])


def test_a_link_in_place_of_a_signature_is_replaced_and_not_followed(output, keys, tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("mine")
    (output / SIGNATURE).symlink_to(outside)
    sign(output, keys[0])
    assert outside.read_text() == "mine" and not (output / SIGNATURE).is_symlink()
    assert signer(output, [keys[1]]) == str(keys[1])


def test_only_what_csulora_corrected_is_signed(adapter, keys):
    with pytest.raises(CsuloraError, match="csulora did not correct this adapter"):
        sign(adapter, keys[0])
    assert not (adapter / SIGNATURE).exists()


def test_an_output_that_was_trained_on_is_not_signed(output, keys):
    """Saved in place by PEFT: no mark any more, though the report is there."""
    builders.edit_tensors(output / builders.WEIGHTS, lambda t: next(iter(t.values())).add_(1))
    with pytest.raises(CsuloraError, match="csulora did not correct"):
        sign(output, keys[0])


@pytest.mark.parametrize("name", FILES)
def test_an_output_that_is_not_as_written_is_not_signed(output, keys, name):
    if name == builders.CONFIG:
        builders.edit_json(output / name, revision="main")
    else:
        flip(output / name, -1, 0)  # the last bit of the last number: the mark is still there
    with pytest.raises(CsuloraError, match=f"{name} is not what was written, so it is not signed"):
        sign(output, keys[0])


def test_an_output_without_its_report_is_not_signed(output, keys):
    (output / builders.REPORT).unlink()
    with pytest.raises(CsuloraError, match="sign before it is removed"):
        sign(output, keys[0])


def test_tensors_that_were_passed_through_are_not_signed(tmp_path, subspace, keys):
    adapter = builders.write_adapter(tmp_path / "in" / "more")
    extra = "base_model.model.classifier.weight"
    builders.edit_tensors(
        adapter / builders.WEIGHTS, lambda t: t.update({extra: torch.zeros(2, 2)})
    )
    target = tmp_path / "out" / "more"
    csulora.correct_folder(
        adapter, csulora.SafetySubspace.load(subspace), target, pass_through=True
    )
    with pytest.raises(CsuloraError, match=f"not corrected: {extra}; it is not signed"):
        sign(target, keys[0])


def test_a_folder_that_is_not_there_is_never_looked_up_on_a_hub(keys):
    for call in (lambda: sign("some/adapter", keys[0]), lambda: signer("some/adapter", [keys[1]])):
        with pytest.raises(CsuloraError, match="some/adapter: no such folder"):
            call()


def test_nothing_else_of_the_project_minds_a_signature(
    capsys, signed, keys, adapter, subspace, tmp_path
):
    before = builders.tree(signed)
    assert builders.run(capsys, "verify", signed, "--source", adapter).code == 0
    common = (adapter, "--subspace", subspace, "--out-dir", signed.parent)
    result = builders.run_correct(capsys, *common, "--resume", "--json")
    assert builders.outcomes(result) == {"lora": ("skipped", None)}
    assert builders.tree(signed) == before
    # Made anew it is another adapter, of which the signature would say nothing.
    assert builders.run_correct(capsys, *common, "--overwrite", "--lambda-off", 3).code == 0
    assert not (signed / SIGNATURE).exists()


def test_a_signature_of_a_source_is_not_carried_along(signed, subspace, keys, tmp_path):
    (signed / "extra.json").write_text("{}")
    target = tmp_path / "again"
    outcome = csulora.correct_folder(
        signed, csulora.SafetySubspace.load(subspace), target, again=True
    )
    assert (target / "extra.json").exists() and not (target / SIGNATURE).exists()
    assert SIGNATURE not in outcome.left_out
    assert signer(target, [keys[1]]) is None


def test_new_keys_are_their_owner_s_and_never_replaced(tmp_path):
    private, public = new_key(tmp_path / "a.b")
    assert (private.name, public.name) == ("a.b.pem", "a.b.pub")
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    assert b"PRIVATE" in private.read_bytes() and b"PRIVATE" not in public.read_bytes()
    before = builders.tree(tmp_path)
    for name in (private, public):
        with pytest.raises(CsuloraError, match="keys are never replaced"):
            new_key(tmp_path / "a.b")
        assert builders.tree(tmp_path) == before
        name.unlink()
        before.pop(name.name)
    assert new_key(tmp_path / "a.b")
    (tmp_path / "c.pub").symlink_to(tmp_path / "nowhere")
    with pytest.raises(CsuloraError, match="keys are never replaced"):
        new_key(tmp_path / "c")
    assert not (tmp_path / "c.pem").exists() and not (tmp_path / "nowhere").exists()


def test_no_half_of_a_pair_stays(tmp_path, monkeypatch):
    from csulora.serving import signature

    write = signature._write_new

    def fails_for_the_second(path, data, mode):
        if path.suffix == ".pub":
            raise CsuloraError("full")
        write(path, data, mode)

    monkeypatch.setattr(signature, "_write_new", fails_for_the_second)
    with pytest.raises(CsuloraError, match="full"):
        new_key(tmp_path / "a")
    assert builders.tree(tmp_path) == {}


def test_keys_of_another_kind_are_refused(output, keys, tmp_path):
    other = ec.generate_private_key(ec.SECP256R1())
    elliptic = tmp_path / "ec.pem"
    pkcs8 = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8)
    elliptic.write_bytes(other.private_bytes(*pkcs8, serialization.NoEncryption()))
    locked = tmp_path / "locked.pem"
    secret = ed25519.Ed25519PrivateKey.generate()
    locked.write_bytes(secret.private_bytes(*pkcs8, serialization.BestAvailableEncryption(b"word")))
    text = tmp_path / "text.pem"
    text.write_text("no key")
    for file in (elliptic, locked, text, keys[1]):
        with pytest.raises(csulora.UsageError, match="not an Ed25519 private key"):
            sign(output, file)
    sign(output, keys[0])
    for file in (text, keys[0]):
        with pytest.raises(csulora.UsageError, match="not an Ed25519 public key"):
            signer(output, [file])
    with pytest.raises(CsuloraError, match="no such file"):
        signer(output, [tmp_path / "missing.pub"])


def test_a_missing_package_is_one_clear_line(output, tmp_path):
    code = (
        "import sys; sys.modules['cryptography'] = None\n"
        "from csulora.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    for arguments in (["sign", str(output), "--key", "k.pem"], ["sign", "--new-key", "k"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 2
        assert done.stderr == (
            "csulora: error: signatures need the package cryptography: pip install 'csulora[serve]'\n"
        )


def test_the_command_makes_keys_and_signs(capsys, output, adapter, keys, tmp_path):
    result = builders.run(capsys, "sign", "--new-key", tmp_path / "k", "--json")
    assert result.code == 0
    assert json.loads(result.out) == {
        "format": "csulora_sign/1",
        "private_key": str(tmp_path / "k.pem"),
        "public_key": str(tmp_path / "k.pub"),
    }
    assert builders.run(capsys, "sign", "--new-key", tmp_path / "k").code == 2
    shutil.copytree(output, output.parent / "second")
    result = builders.run(capsys, "sign", output.parent, "--key", tmp_path / "k.pem")
    assert (result.code, result.out) == (0, "2 signed, 0 not\n")
    for folder in (output, output.parent / "second"):
        assert signer(folder, [tmp_path / "k.pub"]) == str(tmp_path / "k.pub")


def test_the_command_names_what_it_does_not_sign(capsys, output, adapter, keys):
    result = builders.run(capsys, "sign", output, adapter, "--key", keys[0], "--json")
    assert result.code == 1 and len(result.complaints) == 1
    good, bad = json.loads(result.out)["folders"]
    assert good == {"folder": str(output), "signed": True}
    assert bad["folder"] == str(adapter) and not bad["signed"]
    assert bad["error"] in result.complaints[0]


@pytest.mark.parametrize("key", ["missing", "folder", "too long"])
def test_a_key_that_cannot_be_read_is_told_once(capsys, output, tmp_path, key):
    shutil.copytree(output, output.parent / "second")
    (tmp_path / "folder.pem").mkdir()
    name = "x" * 300 if key == "too long" else f"{key}.pem"
    result = builders.run(capsys, "sign", output.parent, "--key", tmp_path / name)
    assert result.code == 2 and result.out == "" and len(result.complaints) == 1
    assert f"csulora: error: {tmp_path / name}: " in result.err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--key", "missing.pem"), "no folders given"),
        (("FOLDER", "--new-key", "k"), "--new-key makes keys and signs nothing"),
        (("nowhere", "--key", "k.pem"), "nowhere: no such folder"),
        (("FOLDER",), ""),
    ],
)
def test_a_wrong_call_is_2(capsys, output, arguments, text):
    given_ = [str(output) if word == "FOLDER" else word for word in arguments]
    result = builders.run(capsys, "sign", *given_)
    assert result.code == 2 and text in result.err
