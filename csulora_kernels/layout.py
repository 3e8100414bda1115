"""The packed layout: many adapters and many modules of any shape in one flat buffer a kind.

Symbols as in docs/method.md. For adapter i and module m, with everything row-major:

    B (d_out, r), A (r, d_in)     in `Table.data`, one type (float32, bfloat16 or float16) for all
    U^T (k, d_out), V^T (k, d_in) in `Basis.data`, float32, shared by all adapters of a batch

Offsets are int64 counts of elements, and each is a multiple of 16 bytes, checked here and told to the
compiler in the kernels: an offset read from a table would otherwise be loaded two bytes at a time.
The basis is kept transposed, one row a direction: then its 16-byte loads ask for d, which real models
have in multiples of 64, and not for k, which may be 7.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from csulora_kernels.settings import Kind, kind_of

ALIGNMENT = 16  # bytes
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Shape(NamedTuple):
    """Sizes of one module's weight and of its subspace."""

    d_out: int
    d_in: int
    k: int

    @property
    def wide_side(self) -> int:
        """0 (B) or 1 (A), the longer one: `exact` has its cores on the other, where they cost less."""
        return 0 if self.d_out >= self.d_in else 1


class Slot(NamedTuple):
    """Rank and place of one adapter's factors of one module; rank 0 where it has none."""

    r: int
    o_B: int
    o_A: int


@dataclass(frozen=True, eq=False)
class Basis:
    """The subspaces of M modules."""

    names: tuple[str, ...]
    shapes: tuple[Shape, ...]
    offsets: tuple[tuple[int, int], ...]  # (o_U, o_V) of each module
    data: Tensor  # float32, flat
    modules: Tensor  # (M, 5) int64 on the device: d_out, d_in, k, o_U, o_V

    def __repr__(self) -> str:
        return f"Basis({len(self.names)} modules, {self.data.nbytes} bytes on {self.data.device})"

    def U(self, m: int) -> Tensor:
        """(d_out, k), a view."""
        d_out, _, k = self.shapes[m]
        return _view(self.data, self.offsets[m][0], k, d_out).mT

    def V(self, m: int) -> Tensor:
        """(d_in, k), a view."""
        _, d_in, k = self.shapes[m]
        return _view(self.data, self.offsets[m][1], k, d_in).mT

    def take(self, wanted: Mapping[str, tuple[str, bool]]) -> Basis:
        """A basis of some modules over the same memory, from {new name: (name, transposed)}.

        transposed: U and V change places, as the update of a weight stored as (d_in, d_out) asks.
        """
        place = {name: m for m, name in enumerate(self.names)}
        rows = []
        for name, transposed in wanted.values():
            (d_out, d_in, k), (o_U, o_V) = self.shapes[place[name]], self.offsets[place[name]]
            rows.append((d_in, d_out, k, o_V, o_U) if transposed else (d_out, d_in, k, o_U, o_V))
        return _basis(tuple(wanted), rows, self.data)


@dataclass(frozen=True, eq=False)
class Table:
    """The factors of N adapters for the M modules of a basis."""

    shapes: tuple[Shape, ...]  # of the M modules
    slots: tuple[tuple[Slot, ...], ...]  # N x M
    data: Tensor  # flat
    entries: Tensor  # (N, M, 3) int64 on the device: r, o_B, o_A
    max_rank: int
    vec_r: int  # elements, at most 16 bytes of them, that every rank is a multiple of
    vec_d: int  # the same of every d_out and d_in
    key: int  # hash of all ranks
    made_for: tuple[int, Kind] | None = None  # key and kind of empty_like
    kept: Table | None = None  # whose B this one's modules have, where it holds A alone

    def __repr__(self) -> str:
        size = f"{len(self.slots)} adapters, {len(self.shapes)} modules"
        dtype = str(self.data.dtype).removeprefix("torch.")
        return f"Table({size}, ranks to {self.max_rank}, {dtype} on {self.data.device})"

    def B(self, i: int, m: int) -> Tensor:
        """(d_out, r) of adapter i and module m, a view."""
        if self.kept is not None:
            return self.kept.B(i, m)
        slot = self.slots[i][m]
        return _view(self.data, slot.o_B, self.shapes[m].d_out, slot.r)

    def A(self, i: int, m: int) -> Tensor:
        """(r, d_in) of adapter i and module m, a view."""
        slot = self.slots[i][m]
        return _view(self.data, slot.o_A, slot.r, self.shapes[m].d_in)

    def beside(self, table: Table | None) -> Table:
        """The same A with the B of another table, for a result that holds A alone."""
        return replace(self, kept=table)

    def to(self, device: torch.device | str) -> Table:
        """The same table on another device; one copy for all factors, and none of a B that it only shows."""
        return replace(self, data=self.data.to(device), entries=self.entries.to(device))


def pack_basis(
    subspaces: Mapping[str, tuple[Tensor, Tensor]], device: torch.device | str | None = None
) -> Basis:
    """One basis from {module name: (U (d_out, k), V (d_in, k))}, columns orthonormal to float32."""
    shapes, offsets, end = [], [], 0
    for name, (U, V) in subspaces.items():
        if U.ndim != 2 or V.ndim != 2 or U.shape[1] != V.shape[1]:
            raise ValueError(
                f"{name}: U and V must be (d_out, k) and (d_in, k), not {_sizes(U)} and {_sizes(V)}"
            )
        shapes.append(Shape(U.shape[0], V.shape[0], U.shape[1]))
        o_U, end = end, _aligned(end + U.numel(), torch.float32)
        o_V, end = end, _aligned(end + V.numel(), torch.float32)
        offsets.append((o_U, o_V))
    device = _device(device, (U for U, _ in subspaces.values()))
    data = torch.zeros(end, dtype=torch.float32, device=device)
    rows = [(*s, *o) for s, o in zip(shapes, offsets, strict=True)]
    basis = _basis(tuple(subspaces), rows, data)
    for m, (U, V) in enumerate(subspaces.values()):
        basis.U(m).copy_(U)
        basis.V(m).copy_(V)
    return basis


def pack(
    adapters: Sequence[Mapping[str, tuple[Tensor, Tensor]]],
    basis: Basis,
    device: torch.device | str | None = None,
) -> Table:
    """One table from a mapping {module name: (B (d_out, r), A (r, d_in))} for each adapter.

    An adapter may lack modules of the basis, and none may have others. An adapter whose tensors lie in
    one storage at 16-byte steps, as the body of a safetensors file does, is one copy; any other is
    one copy a tensor.
    """
    tensors = [X for adapter in adapters for pair in adapter.values() for X in pair]
    dtype = _one_dtype(tensors)
    device = _device(device if device is not None else basis.data.device, iter(tensors))
    slots: list[tuple[Slot, ...]] = []
    moves: list[tuple[int, Tensor]] = []
    end = 0
    for i, adapter in enumerate(adapters):
        _check_adapter(i, adapter, basis)
        body = _one_body(adapter)
        if body is not None:
            moves.append((end, body))
            first = int(body.storage_offset())
            place = {
                id(X): end + int(X.storage_offset()) - first for p in adapter.values() for X in p
            }
            end = _aligned(end + body.numel(), dtype)
        else:
            place = {}
            for X in (X for pair in adapter.values() for X in pair):
                place[id(X)] = end
                moves.append((end, X))
                end = _aligned(end + X.numel(), dtype)
        slots.append(
            tuple(
                Slot(adapter[n][0].shape[1], place[id(adapter[n][0])], place[id(adapter[n][1])])
                if n in adapter
                else Slot(0, 0, 0)
                for n in basis.names
            )
        )
    data = torch.empty(end, dtype=dtype, device=device)
    for start, X in moves:
        _view(data, start, *X.shape).copy_(X, non_blocking=True)
    return _table(basis.shapes, slots, data)


def empty_like(table: Table, settings: Any) -> Table:
    """An unwritten table for the result of these settings, or of their `Kind`, for the same adapters.

    Of a realignment of form `same` it has room for A alone and shows the B of `table`.
    """
    kind = settings if isinstance(settings, Kind) else kind_of(settings)
    slots, end = [], 0
    for row in table.slots:
        placed = []
        for shape, slot in zip(table.shapes, row, strict=True):
            r = kind.rank(slot.r, shape.k)
            o_B = end
            if kind.writes_B:
                end = _aligned(end + shape.d_out * r, table.data.dtype)
            o_A, end = end, _aligned(end + r * shape.d_in, table.data.dtype)
            placed.append(Slot(r, o_B, o_A))
        slots.append(tuple(placed))
    made = _table(table.shapes, slots, table.data.new_empty(end))
    kept = None if kind.writes_B else table
    return replace(made, made_for=(table.key, kind), kept=kept)


def power_of_two_divisor(sizes: Sequence[int], limit: int) -> int:
    """The largest power of two, at most `limit`, that divides every size."""
    return math.gcd(limit, *sizes)


def _basis(names: tuple[str, ...], rows: Sequence[tuple[int, ...]], data: Tensor) -> Basis:
    """rows: d_out, d_in, k, o_U, o_V of each module."""
    modules = torch.tensor(rows, dtype=torch.int64).reshape(-1, 5)
    offsets = tuple((row[3], row[4]) for row in rows)
    _check_alignment(data, (o for pair in offsets for o in pair))
    shapes = tuple(Shape(*row[:3]) for row in rows)
    return Basis(names, shapes, offsets, data, modules.to(data.device))


def _table(shapes: tuple[Shape, ...], slots: Sequence[tuple[Slot, ...]], data: Tensor) -> Table:
    entries = torch.tensor(slots, dtype=torch.int64).reshape(len(slots), len(shapes), 3)
    _check_alignment(data, (o for row in slots for slot in row for o in slot[1:]))
    ranks = [slot.r for row in slots for slot in row]
    limit = ALIGNMENT // data.element_size()
    return Table(
        shapes,
        tuple(slots),
        data,
        entries.to(data.device),
        max(ranks, default=0),
        power_of_two_divisor(ranks, limit),
        power_of_two_divisor([d for s in shapes for d in (s.d_out, s.d_in)], limit),
        hash(tuple(ranks)),
    )


def _view(data: Tensor, offset: int, *shape: int) -> Tensor:
    return data[offset : offset + math.prod(shape)].view(shape)


def _aligned(count: int, dtype: torch.dtype) -> int:
    step = ALIGNMENT // dtype.itemsize
    return -(-count // step) * step


def _check_alignment(data: Tensor, offsets: object) -> None:
    size = data.element_size()
    bad = [o for o in offsets if o * size % ALIGNMENT]  # type: ignore[attr-defined]
    if bad or data.data_ptr() % ALIGNMENT:
        raise ValueError(f"buffer at {data.data_ptr():#x}, offsets {bad[:3]}: not 16-byte aligned")


def _one_body(adapter: Mapping[str, tuple[Tensor, Tensor]]) -> Tensor | None:
    """The flat span of storage that holds all tensors of an adapter, or None if a copy each is due."""
    tensors = [X for pair in adapter.values() for X in pair]
    if not tensors or not all(X.is_contiguous() for X in tensors):
        return None
    storage = tensors[0].untyped_storage()
    if any(X.untyped_storage().data_ptr() != storage.data_ptr() for X in tensors):
        return None
    step = ALIGNMENT // tensors[0].element_size()
    starts = [X.storage_offset() for X in tensors]
    first = min(starts)
    last = max(start + X.numel() for start, X in zip(starts, tensors, strict=True))
    used = sum(X.numel() for X in tensors)
    # A span with other things in it is no gain, and foreign bytes have no business in the batch.
    if any((start - first) % step for start in starts) or last - first != used:
        return None
    return torch.as_strided(tensors[0], (used,), (1,), first)


def _one_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    found = {X.dtype for X in tensors} or {torch.float32}
    if len(found) > 1 or not found <= set(DTYPES):
        raise ValueError(
            f"factors of one batch must share one of {DTYPES}, not {sorted(map(str, found))}"
        )
    return found.pop()


def _device(device: torch.device | str | None, tensors: object) -> torch.device:
    if device is not None:
        return torch.device(device)
    first = next(tensors, None)  # type: ignore[call-overload]
    return first.device if first is not None else torch.device("cpu")


def _check_adapter(i: int, adapter: Mapping[str, tuple[Tensor, Tensor]], basis: Basis) -> None:
    shapes = dict(zip(basis.names, basis.shapes, strict=True))
    for name, (B, A) in adapter.items():
        if name not in shapes:
            raise ValueError(f"adapter {i}: module {name} is not in the basis")
        d_out, d_in, _ = shapes[name]
        if B.ndim != 2 or A.ndim != 2 or B.shape != (d_out, A.shape[0]) or A.shape[1] != d_in:
            raise ValueError(
                f"adapter {i}, {name}: B and A are {_sizes(B)} and {_sizes(A)}, "
                f"expected ({d_out}, r) and (r, {d_in})"
            )


def _sizes(X: Tensor) -> tuple[int, ...]:
    return tuple(X.shape)
