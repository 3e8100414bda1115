"""Mutations of a file's bytes, from a seeded generator: what damage and malice make of it."""

from __future__ import annotations

import random
import re

NUMBERS = ["0", "-1", "-0", "1e999", "-1e999", "NaN", "Infinity", "1.5", "1e2", "1e-400", "null"]
NUMBERS += [str(2**31), str(2**63), str(2**64), "9" * 400, "9" * 5000, "true", '"1"', "[]", "{}"]
TOKENS = [
    b"\x00",
    b"\xff",
    b"\xf0\x9f\x98\x80",
    b"\\ud800",
    b"\\u0000",
    b'"',
    b"{",
    b"}",
    b"[",
    b"]",
]
TOKENS += [b",", b":", b"\n", b"null", b"NaN", b"__metadata__", b"F32", b"F4", b"data_offsets"]
NUMBER = re.compile(rb"-?\d+(\.\d+)?([eE][+-]?\d+)?")
STRING = re.compile(rb'"[^"\\]*"')


def flip(data: bytearray, chance: random.Random) -> None:
    for _ in range(chance.choice([1, 1, 2, 8])):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)


def cut(data: bytearray, chance: random.Random) -> None:
    del data[chance.randrange(len(data)) :]


def grow(data: bytearray, chance: random.Random) -> None:
    data += chance.randbytes(chance.choice([1, 8, 64]))


def splice(data: bytearray, chance: random.Random) -> None:
    """A piece of it in another place, over what was there or between."""
    begin, size = chance.randrange(len(data)), chance.choice([1, 4, 16, 64])
    place = chance.randrange(len(data))
    data[place : place + chance.choice([0, size])] = data[begin : begin + size]


def drop(data: bytearray, chance: random.Random) -> None:
    begin = chance.randrange(len(data))
    del data[begin : begin + chance.choice([1, 2, 16])]


def insert(data: bytearray, chance: random.Random) -> None:
    place = chance.randrange(len(data))
    data[place:place] = chance.choice(TOKENS)


def number(data: bytearray, chance: random.Random) -> None:
    _replace(data, chance, NUMBER, lambda found: chance.choice(NUMBERS).encode())


def nest(data: bytearray, chance: random.Random) -> None:
    depth = chance.choice([1, 2, 50, 3000])
    open_, close = chance.choice([(b"[", b"]"), (b'{"a":', b"}")])
    either = chance.choice([NUMBER, STRING])
    _replace(data, chance, either, lambda found: open_ * depth + found + close * depth)


def swap(data: bytearray, chance: random.Random) -> None:
    """A text or a number from elsewhere in it."""
    other = [match[0] for match in chance.choice([NUMBER, STRING]).finditer(data)]
    if other:
        _replace(data, chance, chance.choice([NUMBER, STRING]), lambda _: chance.choice(other))


def _replace(data, chance, pattern, new) -> None:
    found = list(pattern.finditer(data))
    if found:
        match = chance.choice(found)
        data[match.start() : match.end()] = new(match[0])


WAYS = [flip, cut, grow, splice, drop, insert, number, number, nest, swap, swap]


def mutated(data: bytes, chance: random.Random) -> bytes:
    """The bytes after one to three mutations."""
    new = bytearray(data)
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        if new:
            chance.choice(WAYS)(new, chance)
    return bytes(new)


def mutated_safetensors(data: bytes, chance: random.Random) -> bytes:
    """The same of header or body alone, with the length of the header set right, or of all of it."""
    size = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + size], data[8 + size :]
    part = chance.choice(["header", "header", "header", "body", "all"])
    if part == "all":
        return mutated(data, chance)
    if part == "body":
        body = bytearray(body)
        flip(body, chance)
        return data[: 8 + size] + bytes(body)
    header = mutated(header, chance)
    return len(header).to_bytes(8, "little") + header + body
