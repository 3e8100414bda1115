"""Packing adapters and bases: order, alignment, shared memory, and what is refused."""

import pytest
import torch

import csulora_kernels as kernels


def bases(**shapes):
    return {
        name: tuple(torch.linalg.qr(torch.randn(d, k))[0] for d in (o, i))
        for name, (o, i, k) in shapes.items()
    }


def factors(o, r, i, dtype=torch.float32):
    return torch.randn(o, r).to(dtype), torch.randn(r, i).to(dtype)


def test_one_body_is_one_copy_and_keeps_its_order():
    """Tensors that lie in one storage, as those of a safetensors file do, are packed as they lie."""
    basis = kernels.pack_basis(bases(a=(8, 16, 2), b=(16, 8, 2)))
    body = torch.randn(4 * (8 + 16) * 2)
    A1, B1, A2, B2 = (
        body[start : start + size].view(shape)
        for start, size, shape in (
            (0, 64, (4, 16)),
            (64, 32, (8, 4)),
            (96, 32, (4, 8)),
            (128, 64, (16, 4)),
        )
    )
    table = kernels.pack([{"a": (B1, A1), "b": (B2, A2)}], basis)
    assert torch.equal(table.data, body)
    for m, (B, A) in enumerate(((B1, A1), (B2, A2))):
        assert torch.equal(table.B(0, m), B) and torch.equal(table.A(0, m), A)


def test_every_offset_is_a_whole_vector():
    basis = kernels.pack_basis(bases(a=(7, 5, 3), b=(9, 11, 1)))
    adapters = [{"a": factors(7, 3, 5, torch.bfloat16)}, {"b": factors(9, 1, 11, torch.bfloat16)}]
    table = kernels.pack(adapters, basis)
    for tensor in (table, kernels.empty_like(table, kernels.Penalties())):
        offsets = [o for row in tensor.slots for slot in row for o in slot[1:]]
        assert all(o * 2 % 16 == 0 for o in offsets) and tensor.data.data_ptr() % 16 == 0
    assert table.slots[0][1].r == 0 and table.max_rank == 3 and table.vec_r == 1


def test_a_part_of_a_basis_shares_its_memory_and_may_be_transposed():
    whole = kernels.pack_basis(bases(a=(8, 5, 3), b=(9, 11, 1)))
    part = whole.take({"x": ("b", True), "a": ("a", False)})
    assert part.data is whole.data and part.shapes == ((11, 9, 1), (8, 5, 3))
    assert torch.equal(part.U(0), whole.V(1)) and torch.equal(part.V(0), whole.U(1))
    assert torch.equal(part.U(1), whole.U(0))


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"a": (torch.ones(8, 2), torch.ones(3, 5))}, r"adapter 0, a: B and A are \(8, 2\)"),
        ({"z": (torch.ones(8, 2), torch.ones(2, 5))}, "module z is not in the basis"),
        ({"a": (torch.ones(8, 2), torch.ones(2, 5).half())}, "must share one of"),
    ],
)
def test_what_does_not_fit_is_refused(adapter, message):
    basis = kernels.pack_basis(bases(a=(8, 5, 3)))
    with pytest.raises(ValueError, match=message):
        kernels.pack([adapter], basis)
