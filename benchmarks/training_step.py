"""Tokens a second and matmul utilisation of one CPU training step of a preset.

utilisation = matmul FLOPs the step really executes (torch.utils.flop_counter, forward, backward and
head) / step time / rate of a 6144 x 384 x 1536 bf16 matmul measured between the steps of this run.
The step: forward, cross-entropy at the masked positions and backward of every micro-batch, then
clipping and fused AdamW; bf16 autocast. Micro-batches of 16 rows stay in the cache.

    OMP_NUM_THREADS=2 python benchmarks/training_step.py --json out/training_step.json
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from reporting import finish
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from multimodal_dlm.models.attention_plan import AttentionPlan
from multimodal_dlm.models.memory import keep_freed_memory
from multimodal_dlm.models.presets import get_preset
from multimodal_dlm.models.transformer import UnifiedTransformerModel
from multimodal_dlm.vocabulary import UnifiedVocabulary

MATMUL = (6144, 384, 1536)
COLUMNS = {"text": 2048, "image": 2560}
MASKED_PER_ROW = 30


def make_model(preset: str, options: dict[str, Any]) -> UnifiedTransformerModel:
    """A model of the released vocabulary's size."""
    vocabulary = UnifiedVocabulary.build(
        segments={"text": [("text", COLUMNS["text"])], "image": [("image.0", COLUMNS["image"])]}
    )
    torch.manual_seed(0)
    return UnifiedTransformerModel(
        vocabulary=vocabulary.to_dict(), **{**get_preset(preset), **options}
    )


def make_batch(model: UnifiedTransformerModel, rows: int, length: int, seed: int) -> dict[str, Any]:
    """Random rows: a third each of image-after-text, text-after-image and joint; some padding."""
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, length)
    boundary = length * 2 // 3
    order = torch.zeros(shape, dtype=torch.long)
    order[0::3, :boundary] = 1
    order[1::3, boundary:] = 1
    is_padding = torch.zeros(shape, dtype=torch.bool)
    is_padding[::4, -length // 12 :] = True
    share = torch.randint(1, 65, (rows, 1), generator=generator) / 64
    is_masked = torch.rand(shape, generator=generator) < MASKED_PER_ROW / length
    targets: dict[str, tuple[Tensor, Tensor]] = {}
    for modality, columns in COLUMNS.items():
        part = torch.zeros(shape, dtype=torch.bool)
        part[:, :boundary] = modality == "image"
        part[:, boundary:] = modality == "text"
        index = (is_masked & part & ~is_padding).flatten().nonzero().flatten()
        targets[modality] = index, torch.randint(columns, index.shape, generator=generator)
    return {
        "inputs": {
            "input_ids": torch.randint(model.vocabulary.vocab_size, shape, generator=generator),
            "noise_levels": share * is_masked,
            "position_ids": torch.randint(32, (*shape, 3), generator=generator),
            "attention_plan": AttentionPlan.build(order=order, is_padding=is_padding),
        },
        "targets": targets,
    }


def make_step(model: UnifiedTransformerModel, batches: list[dict[str, Any]]) -> Callable[[], float]:
    """One whole optimizer step over some micro-batches."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    num_targets = sum(len(target) for batch in batches for _, target in batch["targets"].values())

    def step() -> float:
        total = 0.0
        for batch in batches:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                states = model(**batch["inputs"]).hidden_states.flatten(0, 1)
                losses = []
                for modality, (index, target) in batch["targets"].items():
                    logits = model.compute_logits(states.index_select(0, index), modality)
                    losses.append(F.cross_entropy(logits.float(), target, reduction="sum"))
                loss = torch.stack(losses).sum() / num_targets
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step


def time_call(function: Callable[[], Any]) -> float:
    """Wall seconds of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Run the steps with matmuls in between."""
    keep_freed_memory()
    model = make_model(args.preset, {"noise_conditioning": args.noise_conditioning})
    if args.rows % args.micro_batch:
        raise SystemExit(f"--micro-batch must divide --rows; got {args.micro_batch}, {args.rows}.")
    batches = [
        make_batch(model, args.micro_batch, args.length, seed)
        for seed in range(args.rows // args.micro_batch)
    ]
    step = make_step(model, batches)
    with FlopCounterMode(display=False) as counter:
        step()
    flops = counter.get_total_flops()
    rows, inner, columns = MATMUL
    left, right = torch.randn(rows, inner).bfloat16(), torch.randn(inner, columns).bfloat16()
    for _ in range(2):
        step()
        left @ right
    steps, matmuls = [], []
    for _ in range(args.steps):
        steps.append(time_call(step))
        matmuls += [time_call(lambda: left @ right) for _ in range(10)]
    seconds, matmul = statistics.median(steps), statistics.median(matmuls)
    rate = 2 * rows * inner * columns / matmul
    return {
        "utilisation": round(flops / seconds / rate, 4),
        "tokens_per_second": round(args.rows * args.length / seconds, 1),
        "step_seconds": {"median": round(seconds, 4), "all": [round(s, 4) for s in steps]},
        "matmul_flops_per_step": flops,
        "matmul_gflops_per_second": {
            "median": round(rate / 1e9, 1),
            "fastest": round(2 * rows * inner * columns / min(matmuls) / 1e9, 1),
        },
        "config": {
            "preset": args.preset,
            "noise_conditioning": args.noise_conditioning,
            "rows": args.rows,
            "micro_batch": args.micro_batch,
            "length": args.length,
            "steps": args.steps,
            "parameters": sum(weight.numel() for weight in model.parameters()),
            "dtype": "bfloat16 autocast",
            "matmul": list(MATMUL),
        },
    }


def main() -> None:
    """Parse options, measure, write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="small")
    parser.add_argument("--noise-conditioning", default="ada_norm_single")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--micro-batch", type=int, default=16, help="rows of one forward")
    parser.add_argument("--length", type=int, default=96)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--json", type=Path, help="file to write the report to")
    args = parser.parse_args()
    finish(measure(args), args.json)


if __name__ == "__main__":
    main()
