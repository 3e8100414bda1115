"""What the README shows is what its commands print, on the model that ships with the package."""

import re
import shlex

import builders
import pytest

TEXT = (builders.HERE.parent / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


ROOT = builders.HERE.parent
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#\s]+)\)", page.read_text(encoding="utf-8"))
    for link in links:
        assert "://" in link or (page.parent / link).exists(), link


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A current folder in which the README's paths lead to the package, and results do not."""
    (tmp_path / "csulora").symlink_to(builders.HERE.parent / "csulora")
    monkeypatch.chdir(tmp_path)


def test_the_first_screen(checkout, capsys):
    commands = [line for line in blocks("bash")[0].splitlines() if line.startswith("csulora ")]
    assert [line.split()[1] for line in commands] == ["estimate", "inspect", "correct", "correct"]
    printed = set()
    for line in commands:
        result = builders.run(capsys, *shlex.split(line)[1:])
        assert result.code == 0
        printed |= {" ".join(found.split()) for found in result.out.replace("┃", "│").splitlines()}
    shown = [" ".join(line.split()) for line in blocks("text")[0].replace("┃", "│").splitlines()]
    assert {line for line in shown if line not in ("", "...")} <= printed
    for folder in ("corrected/adapter", "realigned/adapter"):
        builders.effective(builders.Path(folder))


def test_the_python_examples(checkout, capsys):
    names = {}
    exec(compile(blocks("python")[0], "README.md", "exec"), names)
    shares, change = capsys.readouterr().out.splitlines()
    assert "'aligned': 0.10" in shares and 0 < float(change) < 1
    builders.effective(builders.Path("corrected/by-hand"))
    builders.Path("my-adapter").symlink_to("csulora/demo/assets/adapter")
    for status in ("corrected", "skipped"):
        exec(compile(blocks("python")[1], "README.md", "exec"), names)
        assert capsys.readouterr().out == f"{status}\n"
