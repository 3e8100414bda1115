"""docs/real-models.md: its options exist, its snippet makes the files that its commands read."""

import csv
import importlib
import json
import re
import shlex
from pathlib import Path

import pytest

from csulora.cli import build_parser

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "real-models.md").read_text(encoding="utf-8")
# What the sets have in the files that the page names.
HEADERS = {
    "harmful_behaviors.csv": "goal,target",
    "strongreject_dataset.csv": "category,source,forbidden_prompt",
    "harmbench_behaviors_text_all.csv": "Behavior,FunctionalCategory,SemanticCategory,BehaviorID",
    "xstest_prompts.csv": "id,prompt,type,label,focus,note",
}


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def calls(*start):
    """The commands on the page that start with these words, each as words."""
    lines = "\n".join(blocks("bash")).replace("\\\n", "").splitlines()
    found = [shlex.split(line) for line in lines]
    return [words for words in found if tuple(words[: len(start)]) == start]


def evaluations():
    """All calls of the two evaluation commands, those inside of a sweep as well."""
    inner = [
        shlex.split(words[words.index(option) + 1])
        for words in calls("csulora", "sweep")
        for option in ("--eval", "--select", "--report")
        if option in words
    ]
    assert inner and all("{adapter}" in words for words in inner)
    return inner + calls("python")


@pytest.fixture
def parsers(monkeypatch):
    """Of each evaluation command, by its file's name."""
    pytest.importorskip("peft")
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    script = importlib.import_module("evaluate_adapter")
    alone, harness = script.options(), script.options()
    # The other script needs a package to be imported, so its options are read.
    source = (ROOT / "examples" / "evaluate_with_harness.py").read_text()
    for option in re.findall(r'add_argument\("(--[\w-]+)"', source):
        harness.add_argument(option)
    return {"evaluate_adapter.py": alone, "evaluate_with_harness.py": harness}


def test_every_evaluation_on_the_page_is_a_call_that_the_scripts_take(parsers):
    found = evaluations()
    assert len(found) >= 6
    for python, script, *words in found:
        assert python == "python" and (ROOT / script).exists()
        given = parsers[Path(script).name].parse_args(words)
        assert not words or (given.model and given.harmful)


@pytest.mark.parametrize("command", ["estimate", "inspect", "sweep", "correct"])
def test_every_other_command_is_one_that_csulora_takes(command):
    for _, *words in calls("csulora", command):
        build_parser().parse_args(words)


def test_the_snippet_makes_the_prompts(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, header in HEADERS.items():
        columns = header.split(",")
        with open(name, "w", newline="", encoding="utf-8") as file:
            rows = csv.DictWriter(file, columns)
            rows.writeheader()
            for i in range(9):
                row = {column: f"{column} {i}, of two\nlines" for column in columns}
                row["label"] = ("safe", "unsafe")[i % 2]
                row["FunctionalCategory"] = ("standard", "contextual", "copyright")[i % 3]
                rows.writerow({column: row[column] for column in columns})
    exec(compile(blocks("python")[0], "real-models.md", "exec"), {"__name__": "snippet"})
    made = {
        file.stem: [json.loads(line)["prompt"] for line in file.read_text().splitlines()]
        for file in Path("prompts").iterdir()
    }
    assert {name: len(prompts) for name, prompts in made.items()} == {
        "advbench.select": 5,
        "advbench.report": 4,
        "xstest.select": 3,
        "xstest.report": 2,
        "strongreject": 9,
        "harmbench": 3,
    }
    for name in ("advbench", "xstest"):
        assert not set(made[f"{name}.select"]) & set(made[f"{name}.report"])
    assert all(prompt.startswith("goal ") for prompt in made["advbench.select"])

    read = {
        Path(word).stem for words in evaluations() for word in words if word.startswith("prompts/")
    }
    assert read - {"skill.select", "skill.report"} <= made.keys()
