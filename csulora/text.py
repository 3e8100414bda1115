"""How names and numbers are put into messages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

LONGEST = 4000  # characters of a message: names in files may be of any length


def listed(names: Iterable[str]) -> str:
    """The first few names in order, and how many more there are."""
    names = sorted(names)
    return ", ".join(names[:6]) + (f", and {len(names) - 6} more" if len(names) > 6 else "")


def span(values: Sequence[Any]) -> str:
    """ "4", or "4 to 8", from sorted values."""
    return f"{values[0]}" if values[0] == values[-1] else f"{values[0]} to {values[-1]}"


def one_line(error: object) -> str:
    """An error's message on one line, control characters made visible."""
    text = str(error)
    if len(text) > LONGEST:  # the beginning names the file, the end tells why
        text = f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"
    text = " ".join(text.split())
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def encodable(name: str) -> str:
    """A file's name as text that any file can hold: bytes that are no UTF-8 are spelt out."""
    return name.encode(errors="backslashreplace").decode()
