"""One table of tolerances: relative Frobenius error of the effective update, by storage dtype."""

import torch

# float32: 1e-5 for strengths to 1e4. Half types: 2 ulp of the storage type.
TOLERANCES = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.bfloat16: 2 * 2.0**-8,
    torch.float16: 2 * 2.0**-11,
}

# Relative Frobenius error of one kernel alone against float64, given the same input. Recompose rounds to
# the storage type besides.
STAGES = {"project": 2e-6, "solve": 5e-6, "recompose": 2e-6}
