"""The table at the end of `csulora correct`."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from csulora.batch.summary import Summary
from csulora.cli import one_line

NAMED = 5  # slowest adapters and outliers that get a line


def print_summary(console: Console, summary: Summary) -> None:
    """One line for one adapter; for more, the whole table."""
    counts = {name: summary.counts[name] for name in ("corrected", "skipped", "failed")}
    console.print(", ".join(f"{n} {status}" for status, n in counts.items() if n))
    if summary.total < 2:
        return
    table = Table(show_header=False, box=None, padding=(0, 3, 0, 0))
    for name, value in _rows(summary):
        table.add_row(name, one_line(value))
    console.print(table)


def _rows(summary: Summary) -> list[tuple[str, str]]:
    rows = [
        (
            "time",
            f"{summary.seconds:.1f} s, {summary.counts['corrected'] / (summary.seconds or 1):.1f} "
            "adapters a second",
        ),
        (
            "weights",
            f"{_size(summary.bytes_in)} read, {_size(summary.bytes_out)} written, "
            f"{_size(summary.bytes_per_second)} a second",
        ),
    ]
    if summary.copy_speed is not None:
        rows.append(
            (
                "copying",
                f"{_size(summary.copy_speed)} a second, measured before; this run went at "
                f"{summary.share_of_copy_speed or 0:.0%} of it",
            )
        )
    labels = {"off": "off-subspace share", "change": "relative change"}
    for name, figure in summary.spread().items():
        rows.append(
            (
                labels[name],
                f"median {figure.median:.3f}, nine in ten between {figure.low:.3f} and {figure.high:.3f}",
            )
        )
    for kind, count in summary.failures.most_common():
        rows.append((f"failed: {kind}", f"{count}, the first: {summary.examples[kind]}"))
    for outlier in summary.outliers()[:NAMED]:
        value = f"{getattr(outlier, outlier.figure):.3f}"
        rows.append(("far from the others", f"{outlier.adapter}: {labels[outlier.figure]} {value}"))
    for seconds, adapter in summary.slowest()[:NAMED]:
        rows.append(("slowest", f"{adapter}: {seconds:.2f} s"))
    return rows


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
