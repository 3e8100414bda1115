"""Estimating the subspace: both checkpoints are streamed, a pair of weights at a time, the next pair
being read while one is worked on."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import torch
from torch import Tensor

from csulora.adapter import LoraAdapter
from csulora.errors import CsuloraError, UsageError
from csulora.files.checkpoint import EMBEDDINGS, HEADS, Checkpoint
from csulora.files.layouts import in_other_layouts, match_layouts
from csulora.files.names import ends_with
from csulora.files.quantised import REMEDY, kind_of_config
from csulora.files.safetensors import tensor_bytes
from csulora.files.turned import LAYERS, MODELS, by_stack, cannot_be_told, model_type, stack_of
from csulora.method.difference import Difference, energy_of
from csulora.method.krylov import top_triplets
from csulora.pipeline.backend import pick_backend, pick_device
from csulora.subspace import ModuleSubspace, Origin, SafetySubspace
from csulora.text import listed

# Embeddings and output heads, which LoRA rarely targets, by their usual names.
_RARE = EMBEDDINGS | HEADS | {"output", "score"}
_RARE |= {"embed_positions", "wpe", "position_embeddings", "token_type_embeddings"}
# What models tie to their input embeddings, but for lm_head.
_TIED = EMBEDDINGS | HEADS - {"lm_head"} | {"proj_out", "decoder"}
# Of ||D||_F: products of D with its transpose must stay within float32.
LARGEST = 1e15
_Stacks = dict[str, dict[bool, str]]  # see `by_stack`


def estimate(
    base: str | os.PathLike[str],
    aligned: str | os.PathLike[str],
    *,
    rank: int = 64,
    energy: float | None = None,
    modules: list[str] | None = None,
    like: LoraAdapter | str | os.PathLike[str] | None = None,
    seed: int = 0,
    device: str = "auto",
    backend: str = "auto",
    progress: Callable[[int, int, str], None] | None = None,
    warn: Callable[[str], object] = warnings.warn,
) -> SafetySubspace:
    """Leading singular triplets of W_aligned - W_base for each selected module.

    Args:
        base, aligned: checkpoint folders or hub ids (safetensors, float32, bfloat16 or float16).
        rank: directions per module. With `energy` (share of ||D||_F^2 in (0, 1]) as many as hold it.
        modules: names in any layout of transformers, or endings of names at a dot, as in PEFT's
            target_modules. Default: every linear weight except embeddings and the output head.
        like: take the modules (and the orientation of their weights) from this adapter.
        seed: of the randomized SVD; the same seed gives the same bytes.
        backend: "auto", "torch" or "triton", of the products with W_aligned - W_base.
        progress: called with (modules done, modules in all, name of the module just done).
        warn: told where the files of a checkpoint contradict each other, and which were read.

    Raises CsuloraError for missing, quantised or ill-shaped weights, NaN or Inf, or checkpoints that
    do not differ; UsageError for arguments out of range.
    """
    _check_arguments(rank, energy, modules, like)
    first, second = Checkpoint.open(base, warn), Checkpoint.open(aligned, warn)
    adapter = like if isinstance(like, LoraAdapter) or like is None else _load_like(like)
    selected = _select(first, second, modules, adapter)
    pair = first, _named_alike(second, selected)
    for name in selected:
        _check_pair(*pair, name)
    chosen = pick_device(device)
    triton = pick_backend(backend, chosen) == "triton"
    digests = hashlib.sha256(), hashlib.sha256()
    found: dict[str, ModuleSubspace] = {}
    for done, (name, weights) in enumerate(_read_ahead(pair, selected, digests), start=1):
        D = _difference(pair, name, weights, chosen, triton)
        del weights
        transposed = selected[name]
        found[name] = _module_subspace(
            D.mT if transposed else D, name, rank, energy, seed, transposed
        )
        del D  # before the next pair arrives
        if progress is not None:
            progress(done, len(selected), name)
    if not any(module.S.numel() for module in found.values()):
        raise CsuloraError(
            f"{pair[1].folder}: base and aligned are equal on all {len(found)} selected modules; "
            "there is no displacement to estimate a subspace from"
        )
    origin = Origin(
        pair[0].name, pair[1].name, digests[0].hexdigest(), digests[1].hexdigest(), seed
    )
    return SafetySubspace(found, origin)


def _check_arguments(rank: int, energy: float | None, modules: object, like: object) -> None:
    if rank < 1:
        raise UsageError(f"rank must be at least 1, not {rank}")
    if energy is not None and not 0 < energy <= 1:
        raise UsageError(f"energy must be above 0 and at most 1, not {energy}")
    if modules is not None and like is not None:
        raise UsageError("modules and like exclude each other")


def _load_like(folder: str | os.PathLike[str]) -> LoraAdapter:
    return LoraAdapter.load(folder, pass_through=True)


def _select(
    base: Checkpoint, aligned: Checkpoint, endings: list[str] | None, like: LoraAdapter | None
) -> dict[str, bool]:
    """Selected module names in order, each with whether its weight is stored as (d_in, d_out).

    Raises CsuloraError for a name that no weight has.
    """
    if like is not None:
        if not like.modules:
            raise CsuloraError(
                f"{like.source.folder if like.source else 'the adapter'}: none of its tensors is a LoRA "
                "update on a linear weight, so that it names no modules"
            )
        known = base.weights.keys() | base.promised.keys()
        matches = match_layouts(like.modules, known, str(base.folder), _remedy(base, like.modules))
        stacks = _oblong(base, matches, like)
        selected = {
            target: _like_is_transposed(base, target, like, name, stacks)
            for name, target in matches.items()
        }
    else:
        names = _linear_weights(base, aligned) if endings is None else _by_endings(base, endings)
        selected = {name: _is_conv1d(base, name) for name in names}
    if not selected:
        raise CsuloraError(f"{base.folder}: no linear weights found{_method(base)}")
    return dict(sorted(selected.items()))


def _by_endings(base: Checkpoint, endings: Iterable[str]) -> list[str]:
    known = base.weights.keys() | base.promised.keys()
    names: set[str] = set()
    for ending in endings:
        found = [name for name in known if ends_with(name, ending)]
        found = found or list(in_other_layouts([ending], known).values())
        if not found:
            raise CsuloraError(
                f"{base.folder}: no module is named or ends with {ending!r}{_method(base)}"
            )
        names.update(found)
    return sorted(names)


def _linear_weights(base: Checkpoint, aligned: Checkpoint) -> list[str]:
    """The base model's linear weights, with those that its index only promises, if the other has them."""
    promised = {name: aligned.weights[name] for name in base.promised if name in aligned.weights}
    return [
        name
        for name, weight in (base.weights | promised).items()
        if len(weight.shape) == 2 and name.rpartition(".")[2] not in _RARE
    ]


def _method(checkpoint: Checkpoint) -> str:
    """What an error adds where config.json tells of quantised weights, under whatever names."""
    method = kind_of_config(checkpoint.config)
    return f"; the checkpoint is quantised ({method}): {REMEDY}" if method else ""


def _remedy(base: Checkpoint, wanted: Collection[str]) -> str:
    """What to do about an adapter's modules that the base model has no weights for."""
    if kind_of_config(base.config):
        return _method(base).removeprefix("; ")
    head = ""
    if "lm_head" not in base.weights and any(ends_with(name, "lm_head") for name in wanted):
        head = "no lm_head.weight is stored, nor one that config.json ties it to; "
    tied = [name for name in wanted if _may_be_tied(base, name)]
    if tied:
        return (
            f"{listed(tied)} is not stored, as where a model ties it to another weight, and of such "
            "csulora knows lm_head alone: give it a weight of its own in both checkpoints (a clone, and "
            "tie_word_embeddings false in config.json), or train without it"
        )
    return (
        f"{head}the adapter is of another model, or transformers renames these weights on loading: "
        "then load both models and write them with save_pretrained(..., save_original_format=False)"
    )


def _may_be_tied(base: Checkpoint, name: str) -> bool:
    """Whether a module that no weight is stored for, under any beginning, is called as tied ones are."""
    leaf = name.rpartition(".")[2]
    stored = any(ends_with(other, leaf) for other in base.weights)
    said = base.config.get("tie_word_embeddings", True)
    return bool(said) and leaf in _TIED and not stored


def _named_alike(aligned: Checkpoint, names: Collection[str]) -> Checkpoint:
    """The aligned checkpoint with the selected weights under the names they have in the base model."""
    renamed = in_other_layouts(names, aligned.weights)
    weights = {name: aligned.weights[other] for name, other in renamed.items()}
    return replace(aligned, weights=aligned.weights | weights)


def _is_conv1d(base: Checkpoint, name: str) -> bool:
    return model_type(base.config, name) in MODELS and name.rpartition(".")[2] in LAYERS


def _oblong(base: Checkpoint, matches: Mapping[str, str], like: LoraAdapter) -> _Stacks:
    """The adapter's oblong modules by their stacks, without output heads: those are linear everywhere."""
    found = {}
    for name, target in matches.items():
        module, weight = like.modules[name], base.weights.get(target)
        shape = module.B.shape[0], module.A.shape[1]
        tells = shape[0] != shape[1] and not module.embedding and not ends_with(name, "lm_head")
        if tells and weight is not None:
            found[name] = weight.shape != shape
    return by_stack(found)


def _like_is_transposed(
    base: Checkpoint, target: str, like: LoraAdapter, name: str, stacks: _Stacks
) -> bool:
    module = like.modules[name]
    shape = (module.B.shape[0], module.A.shape[1])
    _check_stored(base, target)
    if module.embedding:
        shape = shape[::-1]
    weight = base.weights[target]
    if weight.shape != shape and (module.embedding or weight.shape != shape[::-1]):
        raise CsuloraError(
            f"{weight.file}: tensor {weight.name} is {weight.shape}, but the "
            f"adapter updates {name} with {shape}"
        )
    if module.embedding:
        return False  # estimated as it is stored, so that `modules` gives the same
    if shape[0] != shape[1]:
        return weight.shape != shape
    if ends_with(name, "lm_head"):
        return False
    seen = stacks.get(stack_of(name), {})
    if model_type(base.config, target) in MODELS:
        return _is_conv1d(base, target) or (True in seen and False not in seen)
    # Without the flag there is none that is stored so, unless another module shows that it is untrue.
    flag = bool(like.config.get("fan_in_fan_out"))
    doubted = flag or any(True in others for others in stacks.values())
    if len(seen) == 2 or (doubted and not seen):
        raise CsuloraError(cannot_be_told(f"{weight.file}: tensor {weight.name}", seen, flag))
    return True in seen


def _check_stored(checkpoint: Checkpoint, name: str) -> None:
    """Raise CsuloraError for a weight that no file holds, or only quantised."""
    if name in checkpoint.promised and name not in checkpoint.weights:
        raise CsuloraError(
            f"{checkpoint.promised[name]}: the index promises tensor {name}.weight, which no shard holds"
        )
    weight = checkpoint.weights.get(name)
    if weight is not None and weight.quantised:
        raise CsuloraError(
            f"{weight.file}: tensor {weight.name} is {weight.dtype}, quantised ({weight.quantised}); "
            f"{REMEDY}"
        )


def _check_pair(base: Checkpoint, aligned: Checkpoint, name: str) -> None:
    _check_stored(base, name)
    _check_stored(aligned, name)
    weight = base.weights[name]
    other = aligned.weights.get(name)
    if other is None:
        raise CsuloraError(f"{aligned.folder}: tensor {weight.name} of the base model is missing")
    if other.shape != weight.shape:
        raise CsuloraError(
            f"{other.file}: tensor {other.name} is {other.shape}, but {weight.shape} in the base model"
        )
    if len(weight.shape) != 2:
        raise CsuloraError(
            f"{weight.file}: tensor {weight.name} is {weight.shape}; a linear weight has 2 dimensions"
        )


def _read_ahead(
    pair: tuple[Checkpoint, Checkpoint], names: Iterable[str], digests: tuple
) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """Each name with both weights as stored, read by a second thread one module ahead.

    Both digests are updated, in the order of the names.
    """

    def read(name: str) -> tuple[Tensor, Tensor]:
        base, aligned = (
            _read(checkpoint, name, digest)
            for checkpoint, digest in zip(pair, digests, strict=True)
        )
        return base, aligned

    ahead: deque[tuple[str, Future[tuple[Tensor, Tensor]]]] = deque()
    with ThreadPoolExecutor(1) as reader:
        for name in names:
            ahead.append((name, reader.submit(read, name)))
            if len(ahead) > 1:
                yield _waited(*ahead.popleft())
        while ahead:
            yield _waited(*ahead.popleft())


def _waited(name: str, weights: Future[tuple[Tensor, Tensor]]) -> tuple[str, tuple[Tensor, Tensor]]:
    return name, weights.result()


def _read(checkpoint: Checkpoint, name: str, digest: hashlib._Hash) -> Tensor:
    stored = checkpoint.read(name)
    entry = checkpoint.weights[name]
    digest.update(f"{entry.name}\0{entry.dtype}\0{tuple(entry.shape)}\0".encode())
    digest.update(tensor_bytes(stored))
    return stored


def _difference(
    pair: tuple[Checkpoint, Checkpoint],
    name: str,
    weights: tuple[Tensor, Tensor],
    device: torch.device,
    triton: bool,
) -> Tensor | Difference:
    """D of one module in the orientation of the checkpoint: in float32, or as its two weights."""
    base, aligned = (W.to(device) if triton else W.to(device, torch.float32) for W in weights)
    for checkpoint, W in zip(pair, (base, aligned), strict=True):
        # A sum is one cheap pass; only a suspicious one is worth looking at entry by entry.
        if not bool(torch.isfinite(W.sum(dtype=torch.float32)) or torch.isfinite(W).all()):
            entry = checkpoint.weights[name]
            raise CsuloraError(f"{entry.file}: tensor {entry.name} holds NaN or Inf")
    D: Tensor | Difference
    if triton:
        if base.dtype != aligned.dtype:
            base, aligned = base.float(), aligned.float()
        D = Difference(base, aligned)
    else:
        D = aligned.sub_(base)
    if float(energy_of(D)) > LARGEST**2:
        entry = pair[1].weights[name]
        raise CsuloraError(
            f"{entry.file}: tensor {entry.name} is further than {LARGEST:g} from the base model's; "
            "no fine-tuning moves a weight that far"
        )
    return D


def _module_subspace(
    D: Tensor | Difference,
    name: str,
    rank: int,
    energy: float | None,
    seed: int,
    transposed: bool,
) -> ModuleSubspace:
    # Seeded by name, so that a module's subspace does not depend on which others are selected.
    key = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
    U, S, V, total = top_triplets(D, generator, rank=rank, energy_share=energy)
    share = float(S.double().square().sum()) / total if total else 0.0
    return ModuleSubspace(U.cpu(), S.cpu(), V.cpu(), min(share, 1.0), transposed)
