"""The sum of a run: counts, bytes, rates, failures by kind, and which adapters to look at.

Outcomes are added one by one and not kept. What grows with their number is eight bytes each, the two
figures whose distribution is shown.
"""

from __future__ import annotations

import contextlib
import heapq
import os
import statistics
import tempfile
import time
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from csulora.batch.sources import Item
from csulora.errors import CsuloraError
from csulora.files.plain import PIECE, open_regular, reading, sync
from csulora.outcome import Outcome
from csulora.output import WEIGHTS

SLOWEST = 5
EXTREMES = 5  # outliers named at each end of each figure
# An adapter is an outlier this many standard deviations, robustly estimated, from the median; of a few
# adapters none is.
FAR = 3.5
FEW = 20
ROUNDING = 1e-6
LARGEST = 3.4e38  # of a figure that is kept: what is made of several stays finite
PROBE_BYTES = 1 << 30
PROBE_FILES = 32


class Figure(NamedTuple):
    """How one figure is spread over the adapters."""

    low: float  # 5 % lie below
    median: float
    high: float  # 5 % lie above


class Outlier(NamedTuple):
    """An adapter far from the others in one figure, `off` or `change`, with both of its figures."""

    adapter: str
    figure: str
    off: float
    change: float


class Summary:
    """Adds up outcomes as they come. copy_speed: bytes read and written a second, from `probe`."""

    def __init__(self, total: int, copy_speed: float | None = None) -> None:
        self.total, self.copy_speed = total, copy_speed
        self.counts: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()
        self.examples: dict[str, str] = {}  # the first error of each kind of failure
        self.bytes_in = self.bytes_out = 0
        self.off, self.change = array("d"), array("d")
        self._slowest: list[tuple[float, str]] = []
        self._extremes: dict[tuple[str, int], list[tuple[float, Outlier]]] = {}
        self._start = self._end = time.monotonic()

    def add(self, outcome: Outcome) -> None:
        self._end = time.monotonic()
        self.counts[outcome.status] += 1
        self.bytes_in += outcome.bytes_in
        self.bytes_out += outcome.bytes_out
        if outcome.kind is not None:
            self.failures[outcome.kind] += 1
            self.examples.setdefault(outcome.kind, outcome.error or "")
        if outcome.seconds:
            _keep(self._slowest, SLOWEST, (outcome.seconds, outcome.adapter))
        if outcome.totals is not None:
            off = outcome.totals.relative_energy_before["off"]
            change = outcome.totals.relative_change
            self.off.append(min(off, LARGEST))
            self.change.append(min(change, LARGEST))
            for figure, value in (("off", off), ("change", change)):
                outlier = Outlier(outcome.adapter, figure, off, change)
                for sign in (1, -1):
                    heap = self._extremes.setdefault((figure, sign), [])
                    _keep(heap, EXTREMES, (sign * value, outlier))

    @property
    def seconds(self) -> float:
        """From the start to the last outcome."""
        return self._end - self._start

    @property
    def bytes_per_second(self) -> float:
        """Weights read and written."""
        return (self.bytes_in + self.bytes_out) / self.seconds if self.seconds else 0.0

    @property
    def share_of_copy_speed(self) -> float | None:
        return self.bytes_per_second / self.copy_speed if self.copy_speed else None

    def spread(self) -> dict[str, Figure]:
        """The distributions of `off` (share of the energy before) and `change` (relative change)."""
        return {name: _figure(getattr(self, name)) for name in ("off", "change") if self.off}

    def slowest(self) -> list[tuple[float, str]]:
        """(seconds, adapter), slowest first."""
        return sorted(self._slowest, reverse=True)

    def outliers(self) -> list[Outlier]:
        """Adapters far from the median, farthest first; at most a few at each end of each figure."""
        found: dict[Outlier, float] = {}
        for figure in self.spread() if len(self.off) >= FEW else ():
            values = getattr(self, figure)
            middle = statistics.median(values)
            # 1.4826 times the median distance is the standard deviation of a normal distribution.
            unit = 1.4826 * statistics.median(abs(value - middle) for value in values)
            rounding = ROUNDING * max(1.0, abs(middle))
            for sign in (1, -1):
                for value, outlier in self._extremes[figure, sign]:
                    distance = abs(sign * value - middle)
                    if distance > max(FAR * unit, rounding):
                        far = distance / max(unit, rounding)
                        found[outlier] = max(far, found.get(outlier, 0.0))
        return sorted(found, key=lambda outlier: -found[outlier])

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "total": self.total,
            **{status: self.counts[status] for status in ("corrected", "skipped", "failed")},
            "seconds": self.seconds,
            "adapters_per_second": self.counts["corrected"] / self.seconds if self.seconds else 0.0,
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
            "bytes_per_second": self.bytes_per_second,
            "copy_bytes_per_second": self.copy_speed,
            "share_of_copy_speed": self.share_of_copy_speed,
            "failures": dict(self.failures),
            "slowest": [{"adapter": name, "seconds": s} for s, name in self.slowest()],
            "spread": {name: figure._asdict() for name, figure in self.spread().items()},
            "outliers": [outlier._asdict() for outlier in self.outliers()],
        }


def probe(items: Sequence[Item], out_dir: Path) -> float | None:
    """Bytes read and written a second when plainly copying a sample of these files to that place.

    The copy, at most 1 GiB of 32 adapters' weights, goes to a file without a name, fsynced and gone
    afterwards. None where no sample can be read, as with hub ids.
    """
    folder = next(p for p in (out_dir, *out_dir.absolute().parents) if p.is_dir())
    copied = 0
    try:
        with tempfile.TemporaryFile(dir=folder) as target:
            start = time.perf_counter()
            for item in items[:: max(1, len(items) // PROBE_FILES)][:PROBE_FILES]:
                source = os.path.join(item.source, WEIGHTS)
                for piece in _pieces(source, PROBE_BYTES - copied):
                    target.write(piece)
                    copied += len(piece)
                sync(target)
                if copied >= PROBE_BYTES:
                    break
            seconds = time.perf_counter() - start
    except OSError as error:
        raise CsuloraError(f"{folder}: cannot be probed ({error.strerror or error})") from None
    return 2 * copied / seconds if copied else None


def _pieces(source: str, limit: int) -> Iterator[bytes]:
    """At most `limit` bytes of a file, none of one that cannot be read: it fails in its turn."""
    with contextlib.suppress(CsuloraError), reading(source), open_regular(source) as file:
        while piece := file.read(min(PIECE, limit)):
            limit -= len(piece)
            yield piece


def _keep(heap: list[Any], size: int, entry: tuple[float, Any]) -> None:
    """Keep the `size` largest."""
    if len(heap) < size:
        heapq.heappush(heap, entry)
    elif entry > heap[0]:
        heapq.heapreplace(heap, entry)


def _figure(values: Sequence[float]) -> Figure:
    ordered = sorted(values)
    last = len(ordered) - 1
    return Figure(
        ordered[round(0.05 * last)], statistics.median(ordered), ordered[round(0.95 * last)]
    )
