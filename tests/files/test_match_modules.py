"""Names matched by their endings: held to the rule written out, also where nothing fits."""

import random
import time

import pytest

from csulora import CsuloraError
from csulora.files.names import match_modules


def by_the_rule(wanted, known):
    """Every pair looked at: the same name, or one that ends the other at a dot."""
    problems = []
    for name in wanted:
        fits = sorted(k for k in known if f".{name}".endswith(f".{k}") or k.endswith(f".{name}"))
        if name in known or len(fits) == 1:
            continue
        problems.append(name + (f" (fits {', '.join(fits[:3])})" if fits else ""))
    return problems


def test_the_same_as_looking_at_every_pair():
    chance = random.Random(0)

    def names(count):
        parts = ["a", "b", ""]
        return {".".join(chance.choices(parts, k=chance.randint(1, 5))) for _ in range(count)}

    seen = 0
    for _ in range(3000):
        known, wanted = names(6), sorted(names(1))
        problems = by_the_rule(wanted, known)
        if problems:
            seen += 1
            with pytest.raises(CsuloraError) as caught:
                match_modules(wanted, known, "s")
            assert f"1 module(s): {problems[0]}; these" in str(caught.value)
        else:
            found = match_modules(wanted, known, "s")
            assert list(found) == wanted and found[wanted[0]] in known
    assert 300 < seen < 2700


@pytest.mark.parametrize("kind", ["one leaf", "one long ending", "deep"])
def test_many_names_alike_take_a_moment(kind):
    """Looking at every pair takes minutes."""
    wanted, known = {
        "one leaf": ([f"x.{i}.q" for i in range(10000)], {f"y.{i}.q" for i in range(10000)}),
        "one long ending": (
            [f"{i}" + ".a" * 20 for i in range(10000)],
            {f"n{i}" + ".a" * 20 for i in range(10000)},
        ),
        "deep": (["b" + ".a" * 50000], {"c" + ".a" * 50000}),
    }[kind]
    start = time.process_time()
    with pytest.raises(CsuloraError, match="no unique match"):
        match_modules(wanted, known, "s")
    assert time.process_time() - start < 10
