"""A server that the guard is kept out of: what it makes of outputs, and that its lack is noticed."""

import pytest
import torch
from builders import write_guard
from serving_world import KINDS, PROMPTS, build_adapter, corrected, edit_weights, tokens_of
from vllm_process import MARKS, environment, serving

from csulora import Correction, Realignment

pytestmark = MARKS
FORMS = {
    "raw": None,
    "exact": (Correction(), {"portable": False}),
    "same": (Correction(form="same"), {"portable": False}),
    "portable": (Correction(), {"portable": True}),
    "realign": (Realignment(edge=False), {"portable": False}),
    "bfloat16": (Correction(), {"portable": True, "dtype": torch.bfloat16}),
}


@pytest.fixture(scope="module")
def place(model, tmp_path_factory):
    """Each kind of adapter in each form."""
    folder = tmp_path_factory.mktemp("unguarded")
    for kind in KINDS:
        raw = build_adapter(model, folder / "raw" / kind, kind)
        for form, how in FORMS.items():
            if how is not None:
                corrected(model, raw, folder / form / kind, how[0], **how[1])
    return folder


@pytest.fixture(scope="module")
def server(model, place):
    config = write_guard(
        place / "serving.toml",
        mode="correct",
        subspace=str(model / "subspace.safetensors"),
        folders=["raw"],
        cache="cache",
    )
    env = environment(config, VLLM_PLUGINS="lora_filesystem_resolver")
    flags = ("--max-lora-rank=64", "--max-loras=4", "--max-cpu-loras=64")
    with serving(model / "aligned", place / "server.log", *flags, env=env) as running:
        yield running


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_server_makes_of_a_folder_what_peft_makes_of_it(kind, form, server, model, place):
    adapter = place / form / kind
    assert server.load(f"{kind}-{form}", adapter)[0] == 200
    answers = [server.complete(f"{kind}-{form}", prompt) for prompt in PROMPTS]
    assert answers == [(200, tokens) for tokens in tokens_of(model, adapter)]


def test_a_server_whose_plugins_leave_the_guard_out_does_not_show_it(server):
    assert server.metrics() == {} and "csulora guards" not in server.said()


def test_without_a_guard_one_adapter_with_nan_spoils_another(server, model, place):
    """What the guarded server is spared. Last, as nothing that this server says counts afterwards."""
    clean = place / "portable" / "plain"
    raw = build_adapter(model, place / "nan", seed=3)
    edit_weights(raw, lambda X: X * float("nan"))
    right = [(200, tokens) for tokens in tokens_of(model, clean)] * 2
    assert server.load("clean", clean)[0] == server.load("nan", raw)[0] == 200

    def six():
        return [server.complete("clean", prompt) for prompt in PROMPTS * 2]

    assert six() == right
    server.complete("nan", PROMPTS[0])
    after = six()
    print("right of six:", [found == wanted for found, wanted in zip(after, right, strict=True)])
    assert after != right
