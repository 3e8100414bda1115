"""Random problems for the method, and one way through its stages."""

import torch
from hypothesis import settings

from csulora.method import stages

# The same examples in every run: a red test must be red again. Search for new ones with a larger
# max_examples and derandomize off.
quick = settings(max_examples=60, deadline=None, derandomize=True)


def factors(d_out, d_in, r, k, dtype=torch.float64, seed=0, inside=0.0):
    """B, A, U, V; `inside` adds that much of the subspace to the factors. U, V exact in float32."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    U, V = (torch.linalg.qr(randn(d, k))[0] if k else randn(d, 0) for d in (d_out, d_in))
    B = randn(d_out, r) + inside * U @ randn(k, r)
    A = randn(r, d_in) + inside * randn(r, k) @ V.mT
    return tuple(X.to(dtype) for X in (B, A, U, V))


def run(B, A, U, V, correction):
    """B', A' and what is known about them."""
    projection = stages.project(B, A, U, V)
    cores, figures = stages.solve(projection, correction)
    return (*stages.recompose(B, A, U, V, projection, cores), figures)
