"""What a user sees first: helps, examples, and a format in everything that programs read."""

import argparse
import json
import shlex
import subprocess
import sys

import builders
import pytest

import csulora
from csulora.cli import build_parser


def parsers():
    """The parser of csulora and that of each command, by name."""
    top = build_parser()
    (commands,) = (a for a in top._actions if isinstance(a, argparse._SubParsersAction))
    return {"": top, **commands.choices}


PARSERS = parsers()


@pytest.mark.parametrize("name", PARSERS)
def test_every_option_has_a_help_and_every_help_ends_in_examples_that_parse(name):
    parser = PARSERS[name]
    for action in parser._actions:
        hidden = action.option_strings == ["--rank"] and name == "correct"
        shown = isinstance(action, argparse._SubParsersAction) or action.help
        assert shown and (hidden or action.help != argparse.SUPPRESS), action
    first, *examples = parser.epilog.splitlines()
    assert first == "examples:" and examples
    for line in examples:
        program, *arguments = shlex.split(line)
        assert program == "csulora" and PARSERS[""].parse_args(arguments).run
    assert parser.format_help().endswith(parser.epilog + "\n")


def test_options_stand_in_groups():
    titles = [group.title for group in PARSERS["correct"]._action_groups]
    assert titles[2:] == [
        "method",
        "strengths of csulora",
        "strength of realign",
        "strengths of single modules, and budgets",
        "form of the result",
        "what is refused",
        "many adapters",
        "where it runs",
        "what is shown",
    ]


def test_the_former_name_of_form_works_unlisted(capsys, adapter, subspace, tmp_path):
    assert "--rank" not in PARSERS["correct"].format_help()
    written = []
    for option in ("--form", "--rank"):
        out = tmp_path / option
        call = ("correct", adapter, "--subspace", subspace, "--out-dir", out, option, "same")
        assert builders.run(capsys, *call).code == 0
        written.append(builders.tree(out))
    assert written[0] == written[1]
    report = json.loads(written[0][f"{adapter.name}/{builders.REPORT}"])
    assert report["settings"]["form"] == "same" and "rank" not in report["settings"]


def test_python_m_csulora():
    done = subprocess.run(
        [sys.executable, "-m", "csulora", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"csulora {csulora.__version__}\n"


def test_everything_that_programs_read_tells_its_format(capsys, pair, adapter, tmp_path):
    subspace = tmp_path / "s.safetensors"
    out = ("--out-dir", tmp_path / "out")
    for arguments, expected in (
        (("estimate", *pair, "--out", subspace, "--rank", 4), "csulora_estimate/1"),
        (("inspect", adapter, "--subspace", subspace), "csulora_report/1"),
        (("correct", adapter, "--subspace", subspace, *out), "csulora_outcomes/1"),
        (
            ("sweep", adapter, "--subspace", subspace, "--out-dir", tmp_path / "o"),
            "csulora_sweep/1",
        ),
    ):
        result = builders.run(capsys, *arguments, "--json")
        assert result.code == 0
        assert json.loads(result.out)["format"] == expected


def test_the_command_adds_its_own_remedy(capsys, adapter, subspace, tmp_path):
    """The library says what is the matter, the command line which option helps."""
    common = ("correct", adapter, "--subspace", subspace, "--out-dir", tmp_path / "out")
    output = tmp_path / "out" / adapter.name
    assert builders.run(capsys, *common).code == 0
    for options, text in (
        ((), f"{output}: already exists; pass --overwrite or --resume"),
        (
            ("--resume", "--lambda-off", 3),
            f"{output}: was made with other settings (lambda_off 10.0, now 3.0); pass --overwrite to "
            "replace it",
        ),
        (
            ("--resume", "--form", "same", "--strength-for", "*=1"),
            f"{output}: was made with other settings (form exact, now same; strength_for none, now "
            '{"*": 1.0}); pass --overwrite to replace it',
        ),
        (
            ("--resume", "--method", "realign", "--dtype", "float16"),
            f"{output}: was made with other settings (method csulora, now realign); pass --overwrite to "
            "replace it",
        ),
    ):
        result = builders.run(capsys, *common, *options, "--json")
        assert result.code == 1
        assert json.loads(result.out)["adapters"][0]["error"] == text
        assert result.complaints[0].endswith(text)
    (outcome,) = csulora.correct_many(
        [adapter], csulora.SafetySubspace.load(subspace), tmp_path / "out"
    )
    assert outcome.error == f"{output}: already exists"
