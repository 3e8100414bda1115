"""Strengths of single modules and budgets as settings: patterns, refusals, plain values, words."""

import itertools
import json
import math
import pickle
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csulora import Correction, CsuloraError, Realignment, Report, UsageError
from csulora.settings import METHODS, method_from_dict
from csulora.strengths import LONGEST_PATTERN, MOST_PATTERNS, matches

NAMES = [
    f"model.layers.{layer}.{part}"
    for layer in (0, 1, 10)
    for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj")
] + ["lm_head"]
KINDS = list(METHODS.values())


def named(pattern):
    return [name for name in NAMES if matches(pattern, name)]


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        ("q_proj", [name for name in NAMES if name.endswith(".q_proj")]),
        ("mlp.*", [name for name in NAMES if ".mlp." in name]),
        ("*.mlp.*", [name for name in NAMES if ".mlp." in name]),
        ("layers.0.*", NAMES[:3]),
        ("layers.1.*", NAMES[3:6]),
        ("layers.[01].*", NAMES[:6]),
        ("model.layers.10.mlp.up_proj", [NAMES[8]]),
        ("[qo]_proj", [name for name in NAMES if "self_attn" in name]),
        ("?_proj", [name for name in NAMES if "self_attn" in name]),
        ("*proj", NAMES[:-1]),
        ("lm_head", ["lm_head"]),
        ("*", NAMES),
        ("proj", []),  # no end at a dot
        ("up_pro", []),
        ("layers.0", []),  # where a name begins or ends in the middle is not enough
        ("Q_PROJ", []),
        ("model", []),
    ],
)
def test_a_pattern_matches_a_whole_name_or_its_end_at_a_dot(pattern, wanted):
    assert named(pattern) == wanted
    settings = Correction(strength_for={pattern: 2})
    if wanted:
        assert settings.own_strengths(NAMES) == dict.fromkeys(wanted, 2.0)
    else:
        with pytest.raises(CsuloraError, match=r"no module matches strength_for .*like model\.la"):
            settings.own_strengths(NAMES)


@given(st.text(max_size=30), st.text(min_size=1, max_size=30))
def test_any_text_is_a_pattern(name, pattern):
    assert matches(pattern, name) in (True, False)
    if not set(pattern) & set("*?["):
        assert matches(pattern, name) == f".{name}".endswith(f".{pattern}")


def test_patterns_of_many_stars_cost_no_time():
    """In a report from elsewhere: no trying of all ways to share a name among them."""
    assert not matches("*a" * 200 + "b", "a" * 2000)


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_pattern_that_matches_counts(kind):
    values = {"*": 3, "layers.0.*": 0, "q_proj": "drop"}
    for order in itertools.permutations(values):
        own = kind(strength_for={pattern: values[pattern] for pattern in order}).own_strengths(
            NAMES
        )
        for name in NAMES:
            fitting = [pattern for pattern in order if matches(pattern, name)]
            assert own[name] == values[fitting[-1]]
    one, two = (
        kind(strength_for=dict(order)) for order in (values.items(), [*values.items()][::-1])
    )
    assert one != two and one == kind(strength_for=dict(values)) and hash(one) == hash(replace(one))


def test_a_pattern_whose_modules_all_have_later_ones_is_not_idle():
    assert Correction(strength_for={"q_proj": 1, "*": 2}).own_strengths(NAMES)[NAMES[0]] == 2
    with pytest.raises(CsuloraError, match="strength_for x, y"):
        Correction(strength_for={"*": 2, "y": 1, "x": 2}).own_strengths(NAMES)
    with pytest.raises(CsuloraError, match=r"strength_for x$"):
        Correction(strength_for={"x": 2}).own_strengths([])


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_module_is_corrected_with(kind):
    settings = kind(form="exact", strength_for={"a": 1})
    assert settings.for_module(None) == kind(form="exact")
    assert settings.for_module(7) == kind(form="exact").with_strength(7)
    assert settings.for_module(math.inf) == kind(form="exact").with_strength(math.inf)
    for nothing in (0, "drop"):
        assert settings.for_module(nothing).is_identity
        assert settings.for_module(nothing).form == "exact"
    budgeted = kind(strength_for={"a": 1}, budget={"change": 0.1})
    assert budgeted.for_module(None) == kind(budget={"change": 0.1})
    assert budgeted.for_module(2) == kind().with_strength(2)
    assert budgeted.with_strength(2).budget is None


def test_a_number_replaces_all_but_the_aligned_strength_and_0_that_too():
    settings = Correction(lambda_aligned=2, strength_for={"a": 1})
    assert settings.for_module(5).strengths == (2, 5, 5, 5)
    assert settings.for_module(0).strengths == (0, 0, 0, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_identity_is_one_in_every_module(kind):
    nothing = Correction(0, 0, 0, 0) if kind is Correction else Realignment(0)
    assert nothing.is_identity and replace(nothing, strength_for={"a": 0}).is_identity
    for own in (1, math.inf, "drop"):
        assert not replace(nothing, strength_for={"b": 0, "a": own}).is_identity
    assert not kind(budget={"change": 1e-9}).is_identity


@given(
    st.sampled_from(KINDS),
    st.dictionaries(
        st.text(min_size=1, max_size=20),
        st.one_of(st.floats(0, 1e300), st.just(math.inf), st.just("drop"), st.integers(0, 9)),
        max_size=5,
    ),
    st.one_of(st.none(), st.floats(1e-300, 1e300)),
)
def test_settings_survive_json_with_the_order_of_patterns(kind, patterns, limit):
    budget = None if limit is None else {"change": limit}
    settings = kind(strength_for=patterns, budget=budget)
    values = json.loads(json.dumps(settings.to_dict(), allow_nan=False))
    assert list(values.get("strength_for", {})) == list(patterns)
    assert kind.from_dict(values) == method_from_dict(values) == settings
    assert pickle.loads(pickle.dumps(settings)) == settings
    assert hash(method_from_dict(values)) == hash(settings)


def test_plain_values():
    """No patterns and no budget, no keys: settings of before are the same."""
    assert Correction().to_dict().keys() & {"strength_for", "budget"} == set()
    settings = Correction(1, strength_for={"q_proj": math.inf, "mlp.*": "drop", "o_proj": 3})
    assert settings.to_dict()["strength_for"] == {"q_proj": "inf", "mlp.*": "drop", "o_proj": 3.0}
    assert Correction(1, budget={"off": 0.1}).to_dict() == {
        "method": "csulora",
        "lambda_aligned": 1.0,
        "granularity": "direction",
        "form": "exact",
        "budget": {"off": 0.1},
    }
    assert "strength" not in Realignment(budget={"change": 1}).to_dict()


def test_words():
    patterns = {"q_proj": 0, "mlp.*": "drop", "o_proj": math.inf}
    assert str(Correction(strength_for=patterns)).endswith(
        ", granularity direction; q_proj at 0; mlp.* dropped; o_proj at inf"
    )
    assert str(Correction(1, budget={"off": 0.25})) == (
        "csulora at a budget of off 0.25, aligned 1, granularity direction"
    )
    assert str(Realignment(budget={"change": 0.3}, strength_for=patterns)) == (
        "realign at a budget of change 0.3, target 1; q_proj at 0; mlp.* dropped; o_proj at inf"
    )
    shown = repr(Realignment(strength_for=patterns, budget={"change": 0.3}))
    assert "strength_for={'q_proj': 0.0, 'mlp.*': 'drop', 'o_proj': inf}" in shown
    assert eval(shown, {"Realignment": Realignment, "inf": math.inf}) == Realignment(
        strength_for=patterns, budget={"change": 0.3}
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"strength_for": {"a": -1}}, "strength_for a must be at least 0"),
        ({"strength_for": {"a": math.nan}}, "strength_for a must be at least 0"),
        ({"strength_for": {"a": True}}, "strength_for a must be a number"),
        ({"strength_for": {"a": None}}, "strength_for a must be a number"),
        ({"strength_for": {"a": "keep"}}, "strength_for a: 'keep' is neither a number nor drop"),
        ({"strength_for": {"": 1}}, "a pattern has 1 to"),
        ({"strength_for": {5: 1}}, "a pattern has 1 to"),
        ({"strength_for": {"x" * (LONGEST_PATTERN + 1): 1}}, "a pattern has 1 to"),
        ({"strength_for": dict.fromkeys(map(str, range(MOST_PATTERNS + 1)), 1)}, "at most 2000"),
        ({"strength_for": [("a", 1)]}, "strength_for must be a mapping"),
        ({"strength_for": None}, "strength_for must be a mapping"),
        ({"budget": {}}, "budget must be a mapping with one entry"),
        ({"budget": {"change": 1, "off": 1}}, "budget must be a mapping with one entry"),
        ({"budget": 0.3}, "budget must be a mapping with one entry"),
        ({"budget": {"energy": 0.3}}, "must be of change"),
        ({"budget": {"change": 0}}, "budget change must be finite and above 0"),
        ({"budget": {"change": math.inf}}, "budget change must be finite and above 0"),
        ({"budget": {"change": -1}}, "budget change must be at least 0"),
        ({"budget": {"change": "0.3"}}, "budget change must be a number"),
    ],
)
def test_settings_that_are_refused(kind, options, word):
    with pytest.raises(UsageError, match=word):
        kind(**options)
    if all(isinstance(key, str) for key in options.get("strength_for") or {}):
        with pytest.raises(UsageError, match=word):
            kind.from_dict(options)


def test_a_budget_beside_the_strengths_that_it_finds_is_refused():
    for name in ("lambda_left", "lambda_right", "lambda_off"):
        with pytest.raises(UsageError, match=f"{name} cannot be given beside a budget"):
            Correction(**{name: 3}, budget={"change": 0.3})
    with pytest.raises(UsageError, match="strength cannot be given beside a budget"):
        Realignment(2, budget={"change": 0.3})
    with pytest.raises(UsageError, match="budget of realign must be of change, not 'off'"):
        Realignment(budget={"off": 0.3})
    assert Correction(2, budget={"off": 0.3}).lambda_aligned == 2


@pytest.mark.parametrize("strength", [None, 0.0, 2.5, math.inf])
def test_a_report_tells_the_strength_that_was_found(strength):
    report = Report({}, totals_of_nothing(), strength=strength)
    values = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert Report.from_dict(values) == report
    assert values["strength"] == ("inf" if strength == math.inf else strength)
    del values["strength"]  # as in reports of before
    assert Report.from_dict(values).strength is None


@pytest.mark.parametrize("strength", [-1, "much", True, [], 1e999])
def test_a_strength_that_no_budget_finds(strength):
    values = Report({}, totals_of_nothing()).to_dict() | {"strength": strength}
    with pytest.raises(CsuloraError, match="not a report of this version"):
        Report.from_dict(values)


def totals_of_nothing():
    from csulora.report import totals

    return totals({})
