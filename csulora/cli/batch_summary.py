"""The table at the end of `csulora correct`."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from csulora.batch.summary import Summary
from csulora.text import one_line

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
    rate = summary.counts["corrected"] / (summary.seconds or 1)
    rows = [("time", f"{summary.seconds:.1f} s" + f", {rate:.1f} adapters a second" * (rate > 0))]
    if summary.bytes_out:
        sizes = f"{_size(summary.bytes_in)} read, {_size(summary.bytes_out)} written"
        rows.append(("weights", f"{sizes}, {_size(summary.bytes_per_second)} a second"))
    if summary.copy_speed is not None and summary.bytes_out:
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
    far = {outlier.adapter: outlier for outlier in summary.outliers()}
    for outlier in list(far.values())[:NAMED]:
        figures = f"{labels['off']} {outlier.off:.3f}, {labels['change']} {outlier.change:.3f}"
        rows.append(("far from the others", f"{outlier.adapter}: {figures}"))
    for seconds, adapter in summary.slowest()[:NAMED]:
        rows.append(("slowest", f"{adapter}: {seconds:.2f} s"))
    return rows


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
