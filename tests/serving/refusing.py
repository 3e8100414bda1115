"""A refusal by name, and tensors that are reason for one."""

import pytest
import torch

from csulora.serving.guard import RefusedError


def refused(g, folder, **options):
    with pytest.raises(RefusedError) as caught:
        g.admit(folder, "name", **options)
    return caught.value


def add(name, shape=(4,)):
    return lambda tensors: tensors.update({name: torch.ones(shape)})
