"""Tokens a second, matmul utilisation and memory of one CPU training step of a preset.

utilisation = matmul FLOPs the step really executes (torch.utils.flop_counter, forward, backward and
head) / step time / rate of a 6144 x 384 x 1536 matmul measured between the steps of this run. The
step: forward, cross-entropy at the masked positions and backward of every micro-batch, then
clipping and fused AdamW. Step and matmul are in bf16 (autocast) where this CPU has instructions for
it, else in float32 (`--dtype auto`); `config.dtype` of the report says which, and why. In the same
rounds run, on the same batches:

research_loop             the same backbone in float32, plain PyTorch, logits of all positions over
                          the whole vocabulary
research_loop_same_dtype  the same in the dtype of ours: what dtype alone does not explain
bert                      transformers' BertForMaskedLM of equal depth, width, heads, vocabulary,
                          length and batch, in the dtype of ours

`ratios` are their median seconds a step over ours. `--memory` counts the bytes of live tensors.

    OMP_NUM_THREADS=2 python benchmarks/training_step.py --memory --json out/training_step.json
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from live_bytes import held_tensors, peak_bytes
from reporting import finish
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertForMaskedLM

from multimodal_dlm.diffusion.losses import token_nll
from multimodal_dlm.models.attention_plan import AttentionPlan
from multimodal_dlm.models.fused import plain_functions
from multimodal_dlm.models.memory import keep_freed_memory
from multimodal_dlm.models.native import kernels
from multimodal_dlm.models.presets import get_preset
from multimodal_dlm.models.transformer import UnifiedTransformerModel
from multimodal_dlm.precision import bf16_support, resolve_precision
from multimodal_dlm.training.optimizer import build_optimizer
from multimodal_dlm.vocabulary import UnifiedVocabulary

MATMUL = (6144, 384, 1536)
COLUMNS = {"text": 2048, "image": 2560}
MASKED_PER_ROW = 30
MEMORY_LENGTH = 128
DTYPES = {"auto": "auto", "bfloat16": "bf16", "float32": "no"}

Loss = Callable[[Any, dict[str, Any], int], Tensor]


def make_model(
    preset: str, options: dict[str, Any], columns: dict[str, int] = COLUMNS
) -> UnifiedTransformerModel:
    """A model of the released vocabulary's size, or with other columns."""
    vocabulary = UnifiedVocabulary.build(
        segments={"text": [("text", columns["text"])], "image": [("image.0", columns["image"])]}
    )
    torch.manual_seed(0)
    return UnifiedTransformerModel(
        vocabulary=vocabulary.to_dict(), **{**get_preset(preset), **options}
    )


def make_batch(
    model: UnifiedTransformerModel,
    rows: int,
    length: int,
    seed: int,
    columns: dict[str, int] = COLUMNS,
    masked_per_row: int = MASKED_PER_ROW,
) -> dict[str, Any]:
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
    is_masked = torch.rand(shape, generator=generator) < masked_per_row / length
    targets: dict[str, tuple[Tensor, Tensor]] = {}
    labels = torch.full((rows * length,), -100)
    for modality, count in columns.items():
        part = torch.zeros(shape, dtype=torch.bool)
        part[:, :boundary] = modality == "image"
        part[:, boundary:] = modality == "text"
        index = (is_masked & part & ~is_padding).flatten().nonzero().flatten()
        targets[modality] = index, torch.randint(count, index.shape, generator=generator)
        labels[index] = targets[modality][1] + model.vocabulary.columns(modality).start
    return {
        "inputs": {
            "input_ids": torch.randint(model.vocabulary.vocab_size, shape, generator=generator),
            "noise_levels": share * is_masked,
            "position_ids": torch.randint(32, (*shape, 3), generator=generator),
            "attention_plan": AttentionPlan.build(order=order, is_padding=is_padding),
        },
        "targets": targets,
        "labels": labels.view(shape),
    }


def masked_loss(model: Any, batch: dict[str, Any], num_targets: int) -> Tensor:
    """Ours: logits exist for the masked positions and the columns of their modality, in chunks."""
    states = model(**batch["inputs"]).hidden_states.flatten(0, 1)
    losses = []
    for modality, (index, target) in batch["targets"].items():

        def head(chosen: Tensor, name: str = modality) -> Tensor:
            return model.compute_logits(chosen, name)

        columns = model.vocabulary.num_columns(modality)
        chosen = states.index_select(0, index)
        losses.append(token_nll(chosen, head, target, num_columns=columns).sum())
    return torch.stack(losses).sum() / num_targets


def full_logits_loss(model: Any, batch: dict[str, Any], num_targets: int) -> Tensor:
    """The usual research loop: logits of every position over the whole vocabulary."""
    with plain_functions():
        states = model(**batch["inputs"]).hidden_states
    logits = F.linear(states, model.embed_tokens.weight)
    labels = batch["labels"].flatten()
    return F.cross_entropy(logits.flatten(0, 1).float(), labels, reduction="sum") / num_targets


def bert_loss(model: Any, batch: dict[str, Any], num_targets: int) -> Tensor:
    """transformers' own loss, a mean over the micro-batch."""
    inputs = batch["inputs"]
    mask = ~inputs["attention_plan"].is_padding
    out = model(input_ids=inputs["input_ids"], attention_mask=mask, labels=batch["labels"])
    return out.loss * int((batch["labels"] >= 0).sum()) / num_targets


def make_bert(model: UnifiedTransformerModel, length: int) -> Any:
    """BertForMaskedLM of the same depth, width, heads and vocabulary; its MLP is 4 widths."""
    config = model.config
    width = config["hidden_size"]
    return BertForMaskedLM(
        BertConfig(
            vocab_size=model.vocabulary.vocab_size,
            hidden_size=width,
            num_hidden_layers=config["num_layers"],
            num_attention_heads=config["num_attention_heads"],
            intermediate_size=4 * width,
            max_position_embeddings=length,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    ).train()


class Step:
    """One whole optimizer step of a model over some micro-batches.

    Args:
        model: What is trained.
        batches: Its micro-batches.
        loss: (model, micro-batch, targets of the step) -> scalar.
        is_bf16: Under bf16 autocast; float32 throughout otherwise.
    """

    def __init__(
        self, model: Any, batches: list[dict[str, Any]], loss: Loss, is_bf16: bool
    ) -> None:
        self.model, self.batches, self.loss, self.is_bf16 = model, batches, loss, is_bf16
        self.optimizer = build_optimizer(
            model, lr=3e-4, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.03
        )
        self.num_targets = sum(int((batch["labels"] >= 0).sum()) for batch in batches)

    def __call__(self) -> float:
        total = 0.0
        for batch in self.batches:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.is_bf16):
                loss = self.loss(self.model, batch, self.num_targets)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total


def time_call(function: Callable[[], Any]) -> float:
    """Wall seconds of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def make_steps(args: argparse.Namespace) -> dict[str, Step]:
    """Our step and those it is compared with, each on its own weights and the same batches."""
    options = {"noise_conditioning": args.noise_conditioning}
    model = make_model(args.preset, options)
    if args.rows % args.micro_batch:
        raise SystemExit(f"--micro-batch must divide --rows; got {args.micro_batch}, {args.rows}.")
    batches = [
        make_batch(model, args.micro_batch, args.length, seed)
        for seed in range(args.rows // args.micro_batch)
    ]
    same = args.precision.value == "bf16"
    steps = {"ours": Step(model, batches, masked_loss, same)}
    if not args.alone:
        for name, is_bf16 in (("research_loop", False), ("research_loop_same_dtype", same)):
            other = make_model(args.preset, options)
            steps[name] = Step(other, batches, full_logits_loss, is_bf16)
        steps["bert"] = Step(make_bert(model, args.length), batches, bert_loss, same)
    return steps


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Rounds of every step, with matmuls around ours."""
    keep_freed_memory()
    steps = make_steps(args)
    ours = steps["ours"]
    with FlopCounterMode(display=False) as counter:
        ours()
    flops = counter.get_total_flops()
    rows, inner, columns = MATMUL
    dtype = torch.bfloat16 if args.precision.value == "bf16" else torch.float32
    left, right = torch.randn(rows, inner).to(dtype), torch.randn(inner, columns).to(dtype)
    for step in steps.values():
        step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    matmuls = []
    for _ in range(args.steps):
        for name, step in steps.items():
            matmuls += [time_call(lambda: left @ right) for _ in range(5)]
            seconds[name].append(time_call(step))
    median = {name: statistics.median(times) for name, times in seconds.items()}
    matmul = statistics.median(matmuls)
    rate = 2 * rows * inner * columns / matmul
    tokens = args.rows * args.length
    return {
        "utilisation": round(flops / median["ours"] / rate, 4),
        "tokens_per_second": round(tokens / median["ours"], 1),
        "ratios": {k: round(v / median["ours"], 3) for k, v in median.items() if k != "ours"},
        "native_kernels": kernels("amx") is not None,
        "step_seconds": {
            name: {"median": round(median[name], 4), "all": [round(s, 4) for s in times]}
            for name, times in seconds.items()
        },
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
            "parameters": sum(weight.numel() for weight in ours.model.parameters()),
            "dtype": "bfloat16 autocast" if dtype == torch.bfloat16 else "float32",
            "dtype_reason": args.precision.reason or "--dtype",
            "matmul": list(MATMUL),
        },
    }


def measure_memory(args: argparse.Namespace) -> dict[str, Any]:
    """Peak of live tensor bytes of a second step, with chunked and with full logits."""
    columns = {"text": args.memory_vocabulary - 64 - 2 * 8, "image": 16}
    model = make_model(args.preset, {"noise_conditioning": args.noise_conditioning}, columns)
    rows = args.memory_tokens // MEMORY_LENGTH
    batch = make_batch(model, rows, MEMORY_LENGTH, 0, columns, MEMORY_LENGTH // 2)
    peaks = {}
    for name, loss in (("ours", masked_loss), ("full_logits", full_logits_loss)):
        step = Step(model, [batch], loss, args.precision.value == "bf16")
        step()
        peaks[name] = peak_bytes(step, held_tensors(model, step.optimizer))
    return {
        "ratio": round(peaks["ours"] / peaks["full_logits"], 4),
        "peak_mebibytes": {name: round(peak / 2**20, 1) for name, peak in peaks.items()},
        "vocabulary": model.vocabulary.vocab_size,
        "tokens": rows * MEMORY_LENGTH,
        "mask_share": 0.5,
        "targets": step.num_targets,
    }


def main() -> None:
    """Parse options, measure, write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="small")
    parser.add_argument("--noise-conditioning", default="ada_norm_single")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--micro-batch", type=int, default=64, help="rows of one forward")
    parser.add_argument("--length", type=int, default=96)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--dtype", choices=DTYPES, default="auto")
    parser.add_argument("--alone", action="store_true", help="leave out the comparisons")
    parser.add_argument("--memory", action="store_true", help="also count live tensor bytes")
    parser.add_argument("--memory-vocabulary", type=int, default=126_464)
    parser.add_argument("--memory-tokens", type=int, default=4096)
    parser.add_argument("--json", type=Path, help="file to write the report to")
    args = parser.parse_args()
    args.precision = resolve_precision(DTYPES[args.dtype], bf16_support(torch.device("cpu")))
    report = measure(args)
    if args.memory:
        report["memory"] = measure_memory(args)
    finish(report, args.json)


if __name__ == "__main__":
    main()
