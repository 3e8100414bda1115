"""The kernels by themselves: many adapters packed into one table, corrected in three launches.

python examples/packed_kernels.py                       on a CUDA device
TRITON_INTERPRET=1 python examples/packed_kernels.py    on a CPU, slowly, to see it work
"""

import torch

import csulora_kernels as kernels

MODULES = {"q_proj": (64, 48, 8), "down_proj": (48, 96, 8)}  # d_out, d_in, directions
RANKS = (4, 8)  # one adapter each


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reason = kernels.unavailable(device)
    if reason is not None:
        print(f"the kernels cannot run here: {reason}")
        return
    torch.manual_seed(0)
    basis = kernels.pack_basis(
        {
            name: (
                torch.linalg.qr(torch.randn(d_out, k))[0],
                torch.linalg.qr(torch.randn(d_in, k))[0],
            )
            for name, (d_out, d_in, k) in MODULES.items()
        },
        device,
    )
    adapters = [
        {
            n: (torch.randn(d_out, r), torch.randn(r, d_in))
            for n, (d_out, d_in, _) in MODULES.items()
        }
        for r in RANKS
    ]
    table = kernels.pack(adapters, basis)  # one flat buffer for every factor of every adapter
    penalties = kernels.Penalties(lambda_off=100)
    # The workspace holds all memory of a call; keep it for further tables of this layout.
    workspace = kernels.workspace(table, basis, penalties)
    found = kernels.correct(table, basis, penalties, workspace=workspace)

    print(f"{device}: {len(adapters)} adapters of {len(MODULES)} modules, one launch a stage")
    for i, r in enumerate(RANKS):
        for m, name in enumerate(basis.names):
            B, A = found.table.B(i, m), found.table.A(i, m)  # views; the update is B @ A
            change, kept = found.cores.relative_change[i, m], found.cores.after[i, m].sum()
            print(
                f"adapter {i}, {name}: rank {r} -> {B.shape[1]}, relative change {change:.3f}, "
                f"energy kept {100 * kept:.1f} %, ||B A|| {float((B @ A).norm()):.2f}"
            )


if __name__ == "__main__":
    main()
