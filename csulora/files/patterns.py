"""PEFT's `rank_pattern` and `alpha_pattern`: which keys are taken, and which of them a name meets first.

A key is a regular expression that has to match a module's whole name or what follows one of its dots.
Keys come from strangers and Python's matcher backtracks, so keys of a small grammar only are taken, and
they are matched here, in a time in proportion to the length of a name.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from csulora.errors import CsuloraError
from csulora.text import one_line

MOST_KEYS = 100_000
MOST_EXPRESSIONS = 2_000  # of them, more than names; each takes a fraction of a ms to compile
LONGEST_KEY = 2_000
MOST_REPEATS = 4  # of a key; names of modules are short, and so are their patterns
DEEPEST = 4  # groups within groups
MOST_WORK = 4_000_000  # steps for all names of an adapter, each about a microsecond
_REMEMBERED = 20_000  # steps of one automaton

_GRAMMAR = (
    "only names, ., .*, \\., \\d, [0-9]+ and other sets, ^, $ and (a|b) without repeated groups are "
    "taken; name the modules instead"
)
# One character of a name: a set, an escape, any, or itself.
_ATOM = r"\[\^?\]?(?:\\.|[^\]\[\\])*\]|\\[dw]|\\[^\w\s]|\.|[^\\.^$*+?{}\[\]|()]"
_REPEAT = r"(?:[*+?]|\{\d{1,2}(?:,\d{1,2})?\})\??"
_TOKEN = re.compile(rf"(?P<atom>{_ATOM})|(?P<repeat>{_REPEAT})|(?P<open>\((?:\?:)?)|[)|^$]")
_PLAIN = re.compile(rf"[\w.-]{{1,{LONGEST_KEY}}}", re.ASCII)
_LITERAL = re.compile(r"[^\\.^$*+?{}\[\]|()]|\.|\\[^\w\s]")


class Pattern:
    """The values that a pattern gives to module names, its keys compiled once.

    values: number by key. default: for a name that no key matches.

    Raises CsuloraError, naming `where` and the key, for a key outside the grammar.
    """

    def __init__(self, where: str | Path, field: str, values: Mapping[str, float], default: float):
        self.field, self.values, self.default = field, values, default
        self._place = f"{where}: {field}"
        self._keys = list(values)
        self._literals = _Literals()
        self._automata: list[tuple[int, _Automaton]] = []
        self._work = 0
        self._met: dict[str, str | None] = {}  # by name, the first key that matches; asked often
        if len(values) > MOST_KEYS:
            raise CsuloraError(
                f"{self._place} has {len(values)} keys; at most {MOST_KEYS} are taken"
            )
        for index, key in enumerate(values):
            self._compile(index, key)

    def __call__(self, name: str) -> float:
        """The value for a module name: that of the first key that matches, by PEFT's rule."""
        key = self.key(name) if self.values else None
        return self.default if key is None else self.values[key]

    def key(self, name: str) -> str | None:
        """The first key that matches a module name. Raises CsuloraError where that takes too long."""
        if name not in self._met:
            self._met[name] = self._matched(name)
        return self._met[name]

    def _matched(self, name: str) -> str | None:
        if "\n" in name:  # where a line ends, Python's expressions have rules of their own
            raise CsuloraError(f"{self._place}: no key can be matched with {name!r}")
        found, work = self._literals.first(name)
        self._work += work
        for index, automaton in self._automata:
            if found is not None and index > found:
                break
            matches, work = automaton.matches(name)
            self._work += work
            if matches:
                found = index
                break
        if self._work > MOST_WORK:
            raise CsuloraError(
                f"{self._place}: its {len(self._keys)} keys take too long to match with all modules"
            )
        return None if found is None else self._keys[found]

    def replaced(self, values: Mapping[str, float], default: float) -> Pattern:
        """The same keys with other values."""
        new = copy.copy(self)
        new.values, new.default = values, default
        return new

    def _compile(self, index: int, key: str) -> None:
        try:
            for tokens, anchored in _branches(key):
                if _PLAIN.fullmatch(key) or all(map(_LITERAL.fullmatch, tokens)):
                    self._literals.add(index, tokens, anchored)
                elif len(self._automata) == MOST_EXPRESSIONS:
                    raise ValueError(
                        f"more than {MOST_EXPRESSIONS} keys are expressions; name modules"
                    )
                else:
                    self._automata.append((index, _Parser(tokens).automaton(anchored)))
        except (ValueError, re.error, OverflowError) as error:
            shown = key if len(key) <= 60 else key[:60] + "..."
            raise CsuloraError(f"{self._place} key {shown!r}: {one_line(error)}") from None


def _branches(key: str) -> Iterator[tuple[list[str], bool]]:
    """The alternatives of a key outside all groups as tokens, and whether each begins with the name."""
    if _PLAIN.fullmatch(key):  # nearly all keys, and there can be many
        yield list(key), False
        return
    for tokens in _split(_tokens(key)):
        anchored = tokens[:1] == ["^"]
        tokens = tokens[1:] if anchored else tokens
        tokens = tokens[:-1] if tokens[-1:] == ["$"] else tokens
        if not tokens or "^" in tokens or "$" in tokens:
            raise ValueError(_GRAMMAR)
        yield tokens, anchored


def _tokens(key: str) -> list[str]:
    if len(key) > LONGEST_KEY:
        raise ValueError(f"{len(key)} characters; at most {LONGEST_KEY} are taken")
    tokens, repeats, end = [], 0, 0
    while end < len(key):
        found = _TOKEN.match(key, end)
        if not found or not found.group().isprintable():
            raise ValueError(_GRAMMAR)
        repeats += found.lastgroup == "repeat"
        end = found.end()
        tokens.append(found.group())
    if repeats > MOST_REPEATS:
        raise ValueError(f"{repeats} repeats; at most {MOST_REPEATS} are taken")
    return tokens


def _split(tokens: list[str]) -> Iterator[list[str]]:
    depth, start = 0, 0
    for i, token in enumerate(tokens):
        depth += token.startswith("(") - (token == ")")
        if token == "|" and not depth:
            yield tokens[start:i]
            start = i + 1
    yield tokens[start:]


class _Literals:
    """Keys without repeats, sets and groups, however many: found by length and the places of their dots,
    which stand for any character."""

    def __init__(self) -> None:
        self._places: dict[int, set[tuple[int, ...]]] = {}
        self._index: dict[tuple[bool, tuple[int, ...], str], int] = {}

    def add(self, index: int, tokens: list[str], anchored: bool) -> None:
        dots = tuple(i for i, token in enumerate(tokens) if token == ".")
        text = "".join(token[-1] for token in tokens)
        self._places.setdefault(len(text), set()).add(dots)
        self._index.setdefault((anchored, dots, text), index)

    def first(self, name: str) -> tuple[int | None, int]:
        """The lowest index of a key that matches, and the steps it took."""
        found, work = None, 1
        for end in ends(name) if self._index else ():
            for dots in self._places.get(len(end), ()):
                text = _with_dots(end, dots)
                work += 2
                for anchored in (False, True) if end == name else (False,):
                    index = self._index.get((anchored, dots, text))
                    if index is not None and (found is None or index < found):
                        found = index
        return found, work


def _with_dots(text: str, places: tuple[int, ...]) -> str:
    characters = list(text)
    for i in places:
        characters[i] = "."
    return "".join(characters)


class _Part(NamedTuple):
    """A part of an expression: its positions that can come first, and last, as bits; whether it can be
    empty."""

    first: int
    last: int
    empty: bool


class _Parser:
    """Tokens to an automaton with one state for each character that the expression names."""

    def __init__(self, tokens: list[str]) -> None:
        self._tokens, self._at = tokens, 0
        self._atoms: list[re.Pattern[str]] = []
        self._before: list[int] = []  # of each position, those that can come before it

    def automaton(self, anchored: bool) -> _Automaton:
        part = self._choice(0)
        if self._at < len(self._tokens):
            raise ValueError(_GRAMMAR)
        return _Automaton(self._atoms, self._before, part, anchored)

    def _peek(self) -> str:
        return self._tokens[self._at] if self._at < len(self._tokens) else ""

    def _choice(self, depth: int) -> _Part:
        part = self._sequence(depth)
        while self._peek() == "|":
            self._at += 1
            other = self._sequence(depth)
            part = _Part(
                part.first | other.first, part.last | other.last, part.empty or other.empty
            )
        return part

    def _sequence(self, depth: int) -> _Part:
        part = _Part(0, 0, True)
        while self._peek() not in ("", "|", ")"):
            part = self._joined(part, self._item(depth))
        return part

    def _item(self, depth: int) -> _Part:
        token = self._peek()
        self._at += 1
        if token in ("(", "(?:"):
            return self._group(depth + 1)
        if not re.fullmatch(_ATOM, token):
            raise ValueError(_GRAMMAR)
        repeat = self._repeat()
        if repeat[:1] == "{":
            return self._counted(token, repeat)
        part = self._position(token)
        if repeat[:1] in ("*", "+"):
            self._before[-1] |= part.last
        return part._replace(empty=repeat[:1] in ("*", "?"))

    def _group(self, depth: int) -> _Part:
        if depth > DEEPEST:
            raise ValueError(_GRAMMAR)
        part = self._choice(depth)
        if self._peek() != ")":
            raise ValueError(_GRAMMAR)
        self._at += 1
        repeat = self._repeat()
        if repeat[:1] not in ("", "?"):
            raise ValueError(_GRAMMAR)
        return part._replace(empty=part.empty or repeat != "")

    def _repeat(self) -> str:
        """The repeat that follows, if one does."""
        token = self._peek()
        if not re.fullmatch(_REPEAT, token):
            return ""
        self._at += 1
        return token

    def _counted(self, token: str, repeat: str) -> _Part:
        least, _, most = repeat.strip("{}?").partition(",")
        if int(most or least) < int(least):
            raise ValueError(_GRAMMAR)
        part = _Part(0, 0, True)
        for i in range(int(most or least)):
            part = self._joined(part, self._position(token)._replace(empty=i >= int(least)))
        return part

    def _position(self, token: str) -> _Part:
        if token[0] == "[" and re.search(r"--|&&|~~|\|\|", token):  # Python reserves these
            raise ValueError(_GRAMMAR)
        self._atoms.append(re.compile(token))
        self._before.append(0)
        bit = 1 << len(self._atoms) - 1
        return _Part(bit, bit, False)

    def _joined(self, one: _Part, two: _Part) -> _Part:
        for i in _bits(two.first):
            self._before[i] |= one.last
        first = one.first | two.first if one.empty else one.first
        last = one.last | two.last if two.empty else two.last
        return _Part(first, last, one.empty and two.empty)


class _Automaton:
    """One key, matched from the end of a name, where most names differ from most keys."""

    def __init__(
        self, atoms: list[re.Pattern[str]], before: list[int], part: _Part, anchored: bool
    ) -> None:
        self._atoms, self._before = atoms, before
        self._part, self._anchored = part, anchored
        self._fitting: dict[str, int] = {}
        self._steps: dict[tuple[int, str], tuple[int, int]] = {}

    def matches(self, name: str) -> tuple[bool, int]:
        """Whether the key matches a name, and the steps it took."""
        possible, work = self._part.last, 1
        for i in range(len(name) - 1, -1, -1):
            step = self._steps.get((possible, name[i]))
            work += 1
            if step is None:
                step = self._step(possible, name[i])
                work += len(self._atoms)
            now, possible = step
            if not now:
                break
            if now & self._part.first and (not i or (name[i - 1] == "." and not self._anchored)):
                return True, work
        return False, work

    def _step(self, possible: int, character: str) -> tuple[int, int]:
        """The positions that a character is at, of the possible ones, and those possible before it."""
        if character not in self._fitting:
            fits = (bool(atom.match(character)) << i for i, atom in enumerate(self._atoms))
            self._fitting[character] = sum(fits)
        now, before = possible & self._fitting[character], 0
        for i in _bits(now):
            before |= self._before[i]
        if len(self._steps) >= _REMEMBERED:
            self._steps.clear()
        self._steps[possible, character] = now, before
        return now, before


def _bits(mask: int) -> Iterator[int]:
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


def ends(name: str) -> Iterator[str]:
    """What follows each dot of a name, shortest first, and the name."""
    at = name.rfind(".")
    while at >= 0:
        yield name[at + 1 :]
        at = name.rfind(".", 0, at)
    yield name
