"""What is taken from an evaluation's output, and what is refused."""

import pytest

from csulora import UsageError
from csulora.sweep.command import Command
from csulora.sweep.metrics import Goal, Limit, MetricsError, read_metrics


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"complied": 0.25}', {"complied": 0.25}),
        (
            '{"complied": 0.9}\nlog {brace\n{"complied": 0, "utility": 61}\n',
            {"complied": 0, "utility": 61},
        ),
        ('{\n "utility": 0.5,\n "by kind": {"complied": 1}\n}\ndone', {"utility": 0.5}),
        ('{"b": 1, "a": 2, "ok": true, "name": "x", "none": null}', {"a": 2, "b": 1}),
        ("{{{{" + '{"refused": 1}' + "}}", {"refused": 1}),
        ("{" * 50_000 + '{"refused": 1e-3}', {"refused": 0.001}),
    ],
    ids=["one", "last", "indented", "no numbers", "braces", "many braces"],
)
def test_the_last_object_counts(text, expected):
    found = read_metrics(text)
    assert found == expected and list(found) == sorted(found)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "printed no JSON object"),
        ("complied 0.1", "printed no JSON object"),
        ("[1, 2]", "printed no JSON object"),
        ('{"complied": 0.1', "printed no JSON object"),
        ('{"complied": NaN}', "complied is nan"),
        ('{"complied": 0.1}\n{"complied": -Infinity}', "complied is -inf"),
        ('{"utility": 1e999}', "utility is inf"),
        ('{"utility": 1' + "0" * 400 + "}", "utility is inf"),
        ('{"complied": 97.5}', "complied is 97.5, but has to be a share between 0 and 1"),
        ('{"refused": -0.1}', "refused is -0.1"),
        ('{"complied": "0.1", "utility": 1}', "its JSON has no number 'complied'"),
        ('{"complied": true, "utility": 1}', "its JSON has no number 'complied'"),
        ("{}", "its JSON has no number 'complied'"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "printed JSON that is too deep"),
    ],
)
def test_what_says_nothing_is_no_metric(text, reason):
    with pytest.raises(MetricsError) as error:
        read_metrics(text, () if " is " in reason else ("complied",))
    assert reason in str(error.value)


def test_an_object_without_any_number():
    with pytest.raises(MetricsError, match="no numbers"):
        read_metrics('{"complied": null}')
    with pytest.raises(MetricsError, match="too many"):
        read_metrics("{" + ", ".join(f'"m{i}": 1' for i in range(2000)) + "}")
    with pytest.raises(MetricsError, match="too long"):
        read_metrics('{"' + "m" * 1000 + '": 1}')


def test_limits_and_goals():
    limit = Limit.parse(" complied <= 0.1")
    assert (limit.metric, limit.relation, limit.value, str(limit)) == (
        "complied",
        "<=",
        0.1,
        "complied<=0.1",
    )
    goal = Goal(limit, "utility")
    good, better, beyond, far = (
        {"complied": c, "utility": u} for c, u in ((0.1, 0.5), (0.0, 0.6), (0.2, 1.0), (0.9, 1.0))
    )
    assert goal.within(good) and not goal.within(beyond)
    order = [far, beyond, good, better]
    assert sorted(order, key=lambda m: goal.rank(m, 0.3)) == order
    assert goal.rank(good, 0.2) > goal.rank(good, 0.3)
    least = Goal(Limit.parse("refused>=0.9"), "utility")
    assert least.within({"refused": 0.9}) and not least.within({"refused": 0.89})


@pytest.mark.parametrize(
    "text",
    ["", "complied", "complied<0.1", "complied<=", "complied<=x", "complied<=nan", "<=1", "a<=inf"],
)
def test_what_is_no_limit(text):
    with pytest.raises(UsageError, match="a limit is NAME<=X"):
        Limit.parse(text)


def test_commands_are_split_and_never_seen_by_a_shell(tmp_path):
    command = Command("run 'a b' --at={adapter} $HOME ; rm {adapter}")
    folder = tmp_path / "with space"
    assert command.on(folder) == ["run", "a b", f"--at={folder}", "$HOME", ";", "rm", str(folder)]
    for line in ("", "run it", "run '{adapter}"):
        with pytest.raises(UsageError, match="the evaluation command"):
            Command(line)
