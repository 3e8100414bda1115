"""A pair of checkpoints of any model, PEFT adapters on it, and the update that PEFT makes of a folder."""

import copy

import oracle
import peft
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

K = 4
DEFAULT = (0, 10, 10, 10)


class Pair:
    """Checkpoints `base` and `aligned` of a model; what is asked of it is asked of the aligned one."""

    def __init__(self, folder, model):
        self.folder = folder
        model.save_pretrained(folder / "base")
        base = copy.deepcopy(model.state_dict())
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() >= 2:
                    parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(folder / "aligned")
        self.aligned = model
        self.D = {name: (W - base[name]).double() for name, W in model.state_dict().items()}

    @property
    def checkpoints(self):
        return self.folder / "base", self.folder / "aligned"

    def model(self):
        return copy.deepcopy(self.aligned)

    def adapter(self, name="adapter", **options):
        """A folder that PEFT writes, with random factors."""
        options = {"r": 3, "lora_alpha": 5} | options
        model = randomize(peft.get_peft_model(self.model(), peft.LoraConfig(**options)))
        model.save_pretrained(self.folder / name, save_embedding_layers=False)
        return self.folder / name

    def updates(self, folder):
        """What PEFT adds to each weight, by parameter, and the layer that has it."""
        return updates_of(peft.PeftModel.from_pretrained(self.model(), folder))

    def check(self, before, after, strengths=DEFAULT, turned_over=(), tolerance=2e-5):
        """Whether the updates after are what the dense oracle makes of those before.

        turned_over: the parameters for which left and right are each other.
        """
        assert before.keys() == after.keys()
        for name, (dW, layer) in before.items():
            turned = isinstance(layer, (nn.Embedding, Conv1D))
            D, dW, found = (X.mT if turned else X for X in (self.D[name], dW, after[name][0]))
            U, _, Vt = torch.linalg.svd(D, full_matrices=False)
            own = [strengths[i] for i in (0, 2, 1, 3)] if name in turned_over else strengths
            wanted = oracle.correct(dW, U[:, :K], Vt[:K].mT, own, "direction")
            assert float((found - wanted).norm()) <= tolerance * float(dW.norm()), name


def randomize(model):
    generator, seen = torch.Generator().manual_seed(1), set()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and id(parameter) not in seen:
                seen.add(id(parameter))
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def updates_of(model):
    found = {}
    for path, layer in copy.deepcopy(model).double().named_modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            name = path.removeprefix("base_model.model.").replace(".base_layer", "")
            name = f"{name}.{getattr(layer, 'parameter_name', 'weight')}"
            if "default" in layer.lora_A or "default" in layer.lora_embedding_A:
                update = layer.get_delta_weight("default").detach().clone()
                found[name] = update, layer.get_base_layer()
    return found
