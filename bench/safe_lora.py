"""Safe LoRA's arithmetic (arXiv 2405.16833) as its public code does it, to time it.

The method itself, without these matrices, is `csulora.baselines.safe_lora`.

Per module: C = D D^T / ||D||_F with D = W_aligned - W_base; the update is replaced by C dW where the
cosine of dW and C dW is below a threshold. It forms two dense matrices per module, d_out x d_out and
d_out x d_in.
"""

from __future__ import annotations

import torch
from torch import Tensor


def safe_lora(B: Tensor, A: Tensor, D: Tensor, threshold: float = 0.5) -> Tensor:
    """The corrected update (d_out, d_in) of B (d_out, r), A (r, d_in) and D (d_out, d_in)."""
    C = D @ D.mT / torch.linalg.matrix_norm(D)
    dW = B @ A
    projected = C @ dW
    cosine = torch.nn.functional.cosine_similarity(projected.flatten(), dW.flatten(), dim=0)
    return projected if float(cosine) < threshold else dW
