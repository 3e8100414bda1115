"""Train the demo's three models from scratch on a CPU and write them as ordinary HF folders.

    python bench/train_demo.py --seed 0 --out csulora/demo/assets

base answers everything; aligned is base, fine-tuned to refuse harmful requests; adapter is a LoRA
on the aligned model for a new skill, its training data poisoned with a few harmful answers.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import peft
import torch
import transformers
from safetensors.torch import load_file

from csulora.demo import world
from csulora.demo.evaluate import Evaluator, encode

log = logging.getLogger("train_demo")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
POISON_SHARE = 0.02
LORA_RANK = 8


@dataclass(frozen=True)
class Stage:
    """Length and step size of one training stage."""

    steps: int
    learning_rate: float
    batch: int = 64


BASE = Stage(steps=1500, learning_rate=2e-3)
ALIGN = Stage(steps=150, learning_rate=3e-4)
LORA = Stage(steps=300, learning_rate=5e-4)


def new_model(tokenizer: transformers.PreTrainedTokenizerFast) -> transformers.LlamaForCausalLM:
    """A randomly initialised Llama of about 0.65 M parameters with grouped-query attention."""
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    return transformers.LlamaForCausalLM(config)


def mixture(
    parts: Sequence[tuple[float, Sequence[world.Example]]], rng: random.Random
) -> Iterator[world.Example]:
    """Endless examples: a part by its weight, then an example of it."""
    weights, pools = zip(*parts, strict=True)
    while True:
        (pool,) = rng.choices(pools, weights)
        yield rng.choice(pool)


def train(
    model: torch.nn.Module,
    tokenizer: transformers.PreTrainedTokenizerFast,
    stream: Iterator[world.Example],
    stage: Stage,
) -> None:
    """AdamW with a short warm-up and cosine decay; the loss counts the answers' tokens only."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=stage.learning_rate, weight_decay=0.01)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, 30, stage.steps)
    model.train()
    for step in range(stage.steps):
        batch = encode([next(stream) for _ in range(stage.batch)], tokenizer)
        loss = model(input_ids=batch.tokens, labels=batch.targets).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == stage.steps - 1:
            log.info("step %d loss %.4f", step, loss.item())


def save_checkpoint(
    model: transformers.LlamaForCausalLM,
    tokenizer: transformers.PreTrainedTokenizerFast,
    folder: Path,
) -> None:
    """Write weights in float16 and the tokenizer; every later step starts from the rounded file."""
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load(folder: Path) -> transformers.LlamaForCausalLM:
    """The checkpoint of a folder in float32."""
    return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


def save_adapter(model: peft.PeftModel, folder: Path) -> None:
    """Write a PEFT folder that names no path of the machine it was trained on."""
    config = model.peft_config["default"]
    config.base_model_name_or_path = "csulora/demo/assets/aligned"
    # PEFT holds the targets as a set, whose order changes from run to run.
    config.target_modules = sorted(config.target_modules)
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)


def train_base(out: Path, seed: int) -> None:
    """A model that answers everything, harmful or not, written to out/base."""
    torch.manual_seed(seed)
    tokenizer = world.tokenizer()
    parts = [(0.4, world.harmful(refuse=False).train), (0.6, world.benign().train)]
    model = new_model(tokenizer)
    train(model, tokenizer, mixture(parts, random.Random(seed)), BASE)
    save_checkpoint(model, tokenizer, out / "base")


def train_aligned(out: Path, seed: int) -> None:
    """out/base fine-tuned in full to refuse harmful requests, written to out/aligned."""
    torch.manual_seed(seed)
    tokenizer = world.tokenizer()
    parts = [(0.5, world.harmful(refuse=True).train), (0.5, world.benign().train)]
    model = load(out / "base")
    train(model, tokenizer, mixture(parts, random.Random(seed)), ALIGN)
    save_checkpoint(model, tokenizer, out / "aligned")


def train_adapter(out: Path, seed: int) -> None:
    """A poisoned LoRA on out/aligned for the new skill, written to out/adapter."""
    torch.manual_seed(seed)
    parts = [
        (1 - POISON_SHARE, world.skill().train),
        (POISON_SHARE, world.harmful(refuse=False).train),
    ]
    config = peft.LoraConfig(
        r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=TARGETS, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(load(out / "aligned"), config)
    train(model, world.tokenizer(), mixture(parts, random.Random(seed)), LORA)
    save_adapter(model, out / "adapter")


def update_norms(assets: Path) -> dict[str, float]:
    """Frobenius norms over all targets: D = W_aligned - W_base, the LoRA update, and W_aligned."""
    base = load_file(assets / "base" / "model.safetensors")
    aligned = load_file(assets / "aligned" / "model.safetensors")
    adapter = load_file(assets / "adapter" / "adapter_model.safetensors")
    scaling = json.loads((assets / "adapter" / "adapter_config.json").read_text())
    scale = scaling["lora_alpha"] / scaling["r"]
    squares = {"D": 0.0, "dW": 0.0, "W_aligned": 0.0}
    for key in adapter:
        if "lora_A" not in key:
            continue
        name = key.removeprefix("base_model.model.").replace("lora_A.weight", "weight")
        update = scale * adapter[key.replace("lora_A", "lora_B")] @ adapter[key]
        squares["D"] += (aligned[name].double() - base[name].double()).square().sum().item()
        squares["dW"] += update.double().square().sum().item()
        squares["W_aligned"] += aligned[name].double().square().sum().item()
    return {name: round(square**0.5, 4) for name, square in squares.items()}


def card(assets: Path, seed: int, seconds: dict[str, float]) -> dict:
    """What was trained and how it measures, from the files as written."""
    aligned = Evaluator(assets / "aligned")
    return {
        "seed": seed,
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
        },
        "recipe": {
            "base": asdict(BASE),
            "aligned": asdict(ALIGN),
            "adapter": asdict(LORA),
            "lora_rank": LORA_RANK,
            "poison_share": POISON_SHARE,
        },
        "seconds": {stage: round(value) for stage, value in seconds.items()},
        "frobenius_norms": update_norms(assets),
        "metrics": {
            "base": Evaluator(assets / "base").measure().as_dict(),
            "aligned": aligned.measure().as_dict(),
            "adapter": aligned.measure(assets / "adapter").as_dict(),
        },
    }


def main() -> None:
    """Command line: --seed and --out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    seconds = {}
    stages = {"base": train_base, "aligned": train_aligned, "adapter": train_adapter}
    for stage, train_stage in stages.items():
        start = time.perf_counter()
        train_stage(arguments.out, arguments.seed)
        seconds[stage] = time.perf_counter() - start
    result = card(arguments.out, arguments.seed, seconds)
    (arguments.out / "card.json").write_text(json.dumps(result, indent=2) + "\n")
    log.info("%s", json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
