"""What an adapter of a PEFT model consists of; everything that is no plain LoRA is refused by name."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import peft
from peft.tuners.lora import LoraLayer, LoraModel
from torch import Tensor, nn

from csulora import CsuloraError, LoraAdapter, LoraModule
from csulora.files.peft_config import IN_MEMORY, plain_config
from csulora.files.peft_ranks import Rules, scaling
from csulora.files.peft_tensors import PREFIX, factor_name
from csulora.text import listed

# Fields of a configuration that add something which is not the update of a weight.
_BESIDE = {
    "use_dora": "DoRA",
    "modules_to_save": "modules that are trained whole",
    "trainable_token_indices": "trained tokens",
    "target_parameters": "LoRA on parameters, such as those of experts",
}
_FLOAT32 = 1e-6  # relative; a scaling that is a tensor has this type


@dataclass(frozen=True, eq=False)
class Slot:
    """Where one module of an adapter lies in the model."""

    layer: LoraLayer
    A: nn.Parameter  # (r, d_in), in a padded model with more rows
    B: nn.Parameter  # (d_out, r)
    embedding: bool
    scaling: float
    fixed: bool  # prepared for hot swap: shapes have to stay, and `scaling` is a tensor

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B without the padding of a prepared model, on the CPU: a model may be on many devices."""
        A, B = self.A.detach().cpu(), self.B.detach().cpu()
        if not self.fixed or A.shape[0] != B.shape[1]:
            return A, B
        used = ((A != 0).any(1) | (B != 0).any(0)).nonzero().flatten().tolist()
        rank = max(used, default=0) + 1
        return A[:rank], B[:, :rank]


@dataclass(frozen=True, eq=False)
class Found:
    """One adapter of a model."""

    name: str
    configs: dict[str, Any]  # PEFT's, of all adapters; the model's own
    # That of this adapter, as its file would hold it, with `fan_in_fan_out` if any layer has that.
    config: dict[str, Any]
    slots: dict[str, Slot]
    adapter: LoraAdapter  # its tensors may be the model's own memory


def read(model: nn.Module, adapter_name: str | None) -> Found:
    """The adapter of that name, or the active one.

    Raises CsuloraError for anything that `correct_model` refuses.
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile
    if not isinstance(model, peft.PeftModel):
        raise CsuloraError(
            f"a peft.PeftModel is needed, not a {type(model).__name__}; of a model that was wrapped for "
            "training, give what was wrapped"
        )
    name = _pick(model, adapter_name)
    where = f"adapter {name!r}"
    config = plain_config(model.peft_config[name].to_dict())
    for field, meaning in _BESIDE.items():
        if config.get(field):
            raise CsuloraError(f"{where}: {field} is set ({meaning}); this cannot be corrected")
    if not isinstance(model.base_model, LoraModel):
        raise CsuloraError(
            f"{where}: belongs to a {type(model.base_model).__name__}, not plain LoRA"
        )
    slots = _slots(where, model, name)
    _check_biases(where, model, config.get("bias") or "none")
    _check_alone(where, slots)
    _check_complete(where, model, name, slots)
    # PEFT leaves in it what the last layer wanted.
    turned = any(getattr(slot.layer, "fan_in_fan_out", False) for slot in slots.values())
    config = config | {"fan_in_fan_out": turned}
    adapter = _adapter(where, config, slots)
    return Found(name, model.peft_config, config, slots, adapter)


def stated_config(config: Mapping[str, Any], modules: Mapping[str, LoraModule]) -> dict[str, Any]:
    """The configuration under which the modules have their ranks and alphas.

    This one where it says so. Otherwise most modules have the plain `r` and `lora_alpha`: PEFT does not
    keep the configuration of a model for hot swaps in step, and its patterns may be of another adapter.
    """
    rules = Rules(IN_MEMORY, config)
    if all(
        rules.rank(name) == module.rank and math.isclose(rules.alpha(name), module.alpha)
        for name, module in modules.items()
    ):
        return dict(config)
    (rank, alpha), _ = Counter((m.rank, m.alpha) for m in modules.values()).most_common(1)[0]
    plain = {**config, "r": rank, "rank_pattern": {}, "lora_alpha": alpha, "alpha_pattern": {}}
    return LoraAdapter(dict(modules), plain).written_config()


def _pick(model: peft.PeftModel, name: str | None) -> str:
    known = listed(sorted(model.peft_config))
    if name is None:
        active = list(model.active_adapters)
        if len(active) != 1:
            raise CsuloraError(
                f"{len(active)} adapters are active: {listed(active)}; give adapter_name, one of {known}"
            )
        name = active[0]
    if name not in model.peft_config:
        raise CsuloraError(f"the model has no adapter {name!r}; there are {known}")
    return name


def _slots(where: str, model: peft.PeftModel, name: str) -> dict[str, Slot]:
    """Every module that the adapter updates, by its name without PEFT's prefix."""
    slots = {}
    for path, layer in model.named_modules():
        if not isinstance(layer, LoraLayer) or name not in _adapters(layer):
            continue
        module = path.removeprefix(PREFIX)
        _check_layer(where, module, layer, name)
        embedding = name in layer.lora_embedding_A
        if embedding:
            A, B = layer.lora_embedding_A[name], layer.lora_embedding_B[name]
        else:
            A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
        factor = layer.scaling[name]
        fixed = isinstance(factor, Tensor)
        slots[module] = Slot(layer, A, B, embedding, float(factor), fixed)
        _check_slot(where, module, slots[module], name)
    if not slots:
        raise CsuloraError(f"{where}: updates no layer of the model")
    return slots


def _adapters(layer: LoraLayer) -> set[str]:
    """The adapters that a layer has parameters of."""
    holders = (getattr(layer, holder, {}) for holder in layer.adapter_layer_names)
    return {name for holder in holders for name in holder}


def _check_layer(where: str, module: str, layer: LoraLayer, name: str) -> None:
    """Raise CsuloraError for a layer that does more, or other things, than add B A to its weight."""
    if name in layer.merged_adapters:
        raise CsuloraError(
            f"{where}: is merged into the base weights; call model.unmerge_adapter() first"
        )
    # Which of PEFT's versions has which of these differs.
    variant = getattr(layer, "lora_variant", {}).get(name)
    if name in getattr(layer, "lora_magnitude_vector", {}):
        raise CsuloraError(f"{where}: {module} has a magnitude (DoRA); this cannot be corrected")
    if variant is not None:
        raise CsuloraError(
            f"{where}: {module} is {type(variant).__name__}, a variant of LoRA that cannot be corrected"
        )
    base = layer.get_base_layer()
    factors = [holder[name] for holder in (layer.lora_A, layer.lora_B) if name in holder]
    if (
        any(type(factor) is not nn.Linear for factor in factors)
        or isinstance(base, nn.MultiheadAttention)
        or hasattr(layer, "parameter_name")  # of target_parameters
    ):
        raise CsuloraError(
            f"{where}: {module} is a {type(layer).__name__} of LoRA on a {type(base).__name__}, and "
            "neither linear nor an embedding; this cannot be corrected"
        )


def _adapter(where: str, config: dict[str, Any], slots: Mapping[str, Slot]) -> LoraAdapter:
    """The slots' factors as an adapter. Raises CsuloraError where its update is not what they add."""
    if any(slot.fixed for slot in slots.values()):
        stated = stated_config(config, {n: _in_padding(n, s, config) for n, s in slots.items()})
    else:
        stated = config
    tensors = {}
    for module, slot in slots.items():
        for side, X in zip("AB", slot.factors(), strict=True):
            tensors[factor_name(module, side, slot.embedding)] = X
    adapter = LoraAdapter.from_tensors(tensors, stated)
    rslora = bool(config.get("use_rslora"))
    for module, slot in slots.items():
        given = scaling(adapter.modules[module].alpha, adapter.modules[module].rank, rslora)
        if not math.isclose(given, slot.scaling, rel_tol=_FLOAT32):
            raise CsuloraError(
                f"{where}: {module} has the scaling {slot.scaling:g}, but its configuration gives "
                f"{given:g}; undo set_scale, or load what was swapped in as an adapter of its own"
            )
    return adapter


def _check_biases(where: str, model: peft.PeftModel, bias: str) -> None:
    """Raise CsuloraError where biases of the model are trained with the adapter."""
    biases = [name for name, _ in model.named_parameters() if name.endswith(".bias")]
    trained = [name for name in biases if bias == "all" or ".base_layer." in name]
    if bias != "none" and trained:
        raise CsuloraError(
            f"{where}: bias is {bias!r}, and biases cannot be corrected: {listed(trained)}"
        )


def _check_alone(where: str, slots: Mapping[str, Slot]) -> None:
    """Raise CsuloraError where two modules share a factor: one would be written over the other."""
    owners: dict[int, str] = {}
    for module, slot in slots.items():
        for X in (slot.A, slot.B):
            other = owners.setdefault(X.data_ptr(), module) if X.numel() else module
            if other != module:
                raise CsuloraError(
                    f"{where}: {other} and {module} share a factor, as ensure_weight_tying has it; "
                    "correct the saved folder instead"
                )


def _check_complete(
    where: str, model: peft.PeftModel, name: str, slots: Mapping[str, Slot]
) -> None:
    """Raise CsuloraError where PEFT would save more of the adapter than the factors that were found."""
    saved = peft.get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    known = {
        factor_name(module, side, slot.embedding) for module, slot in slots.items() for side in "AB"
    }
    others = sorted(saved.keys() - known)
    if others:
        raise CsuloraError(
            f"{where}: {len(others)} tensor(s) are not a LoRA update on a linear weight or embedding and "
            f"cannot be corrected: {listed(others)}"
        )


def _check_slot(where: str, module: str, slot: Slot, name: str) -> None:
    """Raise CsuloraError for factors that are not where, or not what, the layer takes them for."""
    known = slot.layer.r[name]
    # A hot swap leaves the rank as it was, and may leave a tensor where the parameter was.
    if not slot.fixed and slot.A.dim() == 2 and slot.rank not in (0, known):
        raise CsuloraError(
            f"{where}: {module} has rank {slot.rank}, but the model takes it for {known}, as after a hot "
            "swap; load what was swapped in as an adapter of its own"
        )
    for X in (slot.A, slot.B):
        if not isinstance(X, nn.Parameter) or type(X.data) is not Tensor or X.is_meta:
            raise CsuloraError(
                f"{where}: a factor of {module} is no plain parameter in memory, as sharding, offloading "
                "or a hot swap leaves it; gather, or load, the adapter first"
            )


def _in_padding(module: str, slot: Slot, config: Mapping[str, Any]) -> LoraModule:
    """A module of a prepared model, with the alpha that its scaling stands for."""
    A, B = slot.factors()
    rules, rslora = Rules(IN_MEMORY, config), bool(config.get("use_rslora"))
    alpha = rules.alpha(module)
    if not math.isclose(scaling(alpha, A.shape[0], rslora), slot.scaling, rel_tol=_FLOAT32):
        # A scaling in float32 has no more digits than these.
        alpha = float(f"{slot.scaling / scaling(1, A.shape[0], rslora):.7g}")
        alpha = int(alpha) if alpha.is_integer() else alpha
    return LoraModule(A, B, alpha, slot.scaling, slot.embedding)
