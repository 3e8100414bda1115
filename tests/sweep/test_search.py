"""The search on a path, by metrics that are known; and the choices of a grid."""

import math

import pytest
from test_energies import problem

from csulora import UsageError
from csulora.sweep import Energies, Setting, families
from csulora.sweep.grid import checked_strengths
from csulora.sweep.metrics import Goal, Limit
from csulora.sweep.search import NEAR, Path, pick, search

GOAL = Goal(Limit("complied", "<=", 0.1), "utility")


@pytest.fixture(scope="module", params=[0, 1, 2], ids=["csulora", "same", "exact"])
def path(request):
    adapter, subspace = problem()
    chosen = families(8, ranks=[8])
    return Path(Energies(adapter, subspace, chosen), chosen[request.param])


def follow(path, metrics, raw=None, **options):
    """All that a search tries, where `metrics` gives those of a relative change; and in which order."""
    requests, tried, order = search(path, GOAL, raw, **options), {}, []
    asked = next(requests)
    while True:
        found = {x: metrics(path.change(x)) for x in asked}
        tried |= found
        order.append(asked)
        try:
            asked = requests.send(found)
        except StopIteration:
            return tried, order


def falling(at):
    """Metrics whose limit lies at a relative change."""
    return lambda x: {"complied": min(1.0, max(0.0, 0.1 + at - x)), "utility": 1 - x * x}


@pytest.mark.parametrize("share", [0.1, 0.4, 0.55, 0.9])
def test_the_limit_is_found_in_few_evaluations(path, share):
    at = share * path.extreme
    tried, order = follow(path, falling(at))
    assert len(order[0]) == 3 and len(tried) <= 9 and all(len(asked) == 1 for asked in order[1:])
    strength, metrics = pick(path, GOAL, tried)
    assert GOAL.within(metrics)
    # Three points and six halves of a third of the way; or as near as it matters.
    assert 0 <= path.change(strength) - at <= max(NEAR, path.extreme / 3 / 2**6) + 1e-3
    assert strength == float(f"{strength:.3g}")


def test_strengths_are_found_by_their_change(path):
    for share in (0.05, 0.3, 0.7):
        strength = path.strength_at(share * path.extreme)
        assert path.change(strength) == pytest.approx(share * path.extreme, abs=0.3 * NEAR)
    assert path.strength_at(path.extreme) == path.strength_at(2.0) == math.inf


def test_a_family_that_never_reaches_the_limit_is_left_after_the_first_points(path):
    tried, order = follow(path, lambda x: {"complied": 1 - 0.5 * x, "utility": 1.0})
    assert len(order) == 1
    strength, metrics = pick(path, GOAL, tried)
    assert strength == math.inf and not GOAL.within(metrics)


def test_nothing_is_halved_where_the_raw_adapter_is_within_the_limit(path):
    harmless = {"complied": 0.0, "utility": 1.0}
    _, order = follow(path, lambda x: harmless, raw=harmless)
    assert len(order) == 1
    beyond = {"complied": 1.0, "utility": 1.0}
    _, order = follow(path, lambda x: harmless, raw=beyond)
    assert len(order) > 1


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_limit_that_the_raw_adapter_keeps_is_found_from_the_other_side(path, share):
    """As `utility>=0.9` is: kept by small changes, and lost by large ones."""
    at = share * path.extreme

    def metrics(change):
        return {"complied": min(1.0, max(0.0, 0.1 + change - at)), "utility": change}

    tried, _ = follow(path, metrics, raw=metrics(0.0))
    strength, found = pick(path, GOAL, tried)
    assert GOAL.within(found)
    assert 0 <= at - path.change(strength) <= max(NEAR, path.extreme / 3 / 2**6) + 1e-3


def test_failed_evaluations_are_gone_around(path):
    failing = {}

    def metrics(x):
        failing[x] = len(failing) in (1, 3)  # a coarse one, and a half
        return None if failing[x] else falling(0.5 * path.extreme)(x)

    tried, _ = follow(path, metrics)
    assert sum(value is None for value in tried.values()) == 2
    assert GOAL.within(pick(path, GOAL, tried)[1])
    assert pick(path, GOAL, dict.fromkeys(tried)) is None


def test_given_strengths_come_first_and_steps_are_counted(path):
    tried, order = follow(path, falling(0.5 * path.extreme), coarse=[0.01, math.inf], steps=2)
    assert order[0] == [0.01, math.inf] and len(tried) == 4
    assert len(follow(path, falling(0.5), steps=0)[1]) == 1


def test_the_grid():
    chosen = families(64)
    assert [f.k for f in chosen] == 3 * [2, 4, 8, 16, 32, 64]
    assert {(f.method, f.start.form) for f in chosen} == {
        ("csulora", "exact"),
        ("realign", "same"),
        ("realign", "exact"),
    }
    every = families(
        6, forms=("exact", "same"), granularities=("direction", "component"), ranks=[3]
    )
    assert len({str(f) for f in every}) == len(every) == 6
    assert [f.rank(8) for f in families(6, ranks=[3])] == [16, 8, 11]
    assert checked_strengths([math.inf, 1]) == [1.0, math.inf]


@pytest.mark.parametrize(
    "options",
    [
        {"methods": ["other"]},
        {"methods": []},
        {"forms": ["same", "same"]},
        {"granularities": ["x"]},
        {"ranks": [0]},
        {"ranks": [9]},
    ],
)
def test_choices_that_are_none(options):
    with pytest.raises(UsageError):
        families(8, **options)


@pytest.mark.parametrize("strengths", [[], [0.0], [1, 1.0], [-1], [math.nan]])
def test_strengths_that_are_none(strengths):
    with pytest.raises(UsageError):
        checked_strengths(strengths)


@pytest.mark.parametrize("strength", [1.0, 0.1 + 0.2, 1.0000001, 12345678.9, math.inf])
def test_options_are_read_back_as_the_same_settings(strength):
    from csulora.cli import build_parser
    from csulora.cli.method_options import correction_from

    every = {"forms": ("exact", "same"), "granularities": ("direction", "component")}
    for family in families(4, **every):
        setting = Setting(family, strength)
        call = ["correct", "a", "--subspace", "s", "--out-dir", "o", *setting.options()]
        arguments = build_parser().parse_args(call)
        assert correction_from(arguments) == setting.correction
        assert arguments.subspace_rank == family.k
