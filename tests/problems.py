"""Random problems for the method, and one way through its stages."""

import oracle
import torch
from builders import orthonormal
from hypothesis import settings

from csulora import (
    Correction,
    LoraAdapter,
    LoraModule,
    ModuleSubspace,
    Origin,
    SafetySubspace,
    correct,
)
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


# d_out, d_in, r, k of an adapter with modules of several shapes, ranks and numbers of directions.
SEVERAL = {
    "model.layers.0.self_attn.q_proj": (40, 32, 4, 6),
    "model.layers.0.mlp.up_proj": (48, 40, 4, 6),
    "model.layers.1.self_attn.q_proj": (32, 40, 4, 6),
    "model.layers.1.mlp.up_proj": (36, 52, 3, 9),
}


def several(dtype=torch.float32, seed=0, size=20.0, inside=1.0, scaling=2.0):
    """An adapter of the modules in SEVERAL, and their subspace with a D of about its size."""
    modules, bases = {}, {}
    for i, (name, shape) in enumerate(SEVERAL.items()):
        B, A, U, V = factors(*shape, seed=seed + i, inside=inside)
        r, k = shape[2:]
        modules[name] = LoraModule(A.to(dtype), B.to(dtype), alpha=scaling * r, scaling=scaling)
        S = size / (1 + torch.arange(k, dtype=torch.float64))
        bases[name] = ModuleSubspace(U.float(), S.float(), V.float(), 0.9)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": scaling * 4, "rank_pattern": {}}
    config |= {"alpha_pattern": {}, "target_modules": ["q_proj", "up_proj"]}
    config["rank_pattern"] = {"layers.1.mlp.up_proj": 3}
    config["alpha_pattern"] = {"layers.1.mlp.up_proj": scaling * 3}
    return LoraAdapter(modules, config), SafetySubspace(bases, Origin("base", "aligned", "", "", 0))


def subspace_of(shapes):
    """The subspace of modules {name: (d_out, d_in, k)}."""
    modules = {
        name: ModuleSubspace(
            orthonormal(d_out, k, 1).float().contiguous(),
            torch.linspace(2, 1, k),
            orthonormal(d_in, k, 2).float().contiguous(),
            0.2,
        )
        for name, (d_out, d_in, k) in shapes.items()
    }
    return SafetySubspace(modules, Origin("base", "aligned", "0", "1", 0))


def adapter_of(shapes, seed, names, r, dtype):
    """A random adapter of some of these modules."""
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for name in names:
        d_out, d_in, _ = shapes[name]
        A, B = (torch.randn(s, generator=generator) for s in ((r, d_in), (d_out, r)))
        modules[name] = LoraModule(A.to(dtype), B.to(dtype), alpha=2 * r, scaling=2.0)
    return LoraAdapter(modules, {"peft_type": "LORA", "r": r, "lora_alpha": 2 * r})


def corrected(B, A, U, V, correction, **options):
    """Corrected factors of one module, and its report."""
    module = LoraModule(A=A, B=B, alpha=4, scaling=1.0)
    basis = ModuleSubspace(U.float(), torch.ones(U.shape[1]), V.float(), 0.5)
    subspace = SafetySubspace({"m": basis}, Origin("base", "aligned", "", "", 0))
    adapter = LoraAdapter({"m": module}, {"peft_type": "LORA", "r": 4, "lora_alpha": 4})
    new, report = correct(adapter, subspace, correction, **options)
    return new.modules["m"], report.modules["m"]


def update(module):
    """dW in float64."""
    return module.scaling * module.B.double() @ module.A.double()


def truth(module, basis, method):
    """What one method without patterns makes of a module's update, by the dense oracle."""
    dW = update(module)
    if isinstance(method, Correction):
        return oracle.correct(dW, basis.U, basis.V, method.strengths, method.granularity)
    return oracle.realign(
        dW,
        basis.U,
        basis.S,
        basis.V,
        strength=method.strength,
        gamma=method.gamma,
        edge=basis.noise_edge if method.edge else 0.0,
        opposed=method.opposed,
        B=module.B if method.form == "same" else None,
    )
