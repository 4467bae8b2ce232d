"""Text in blocks with the exact cache against left to right with its cache, and everything between.

Methods take turns within one process: left to right with preallocated keys and values, one
token a forward (`autoregressive`, a bare loop; `autoregressive_pipeline`, the same through the
pipeline); full recompute with one and with four tokens a forward; every approximate cache; blocks
of 8, 16 and 32 with the exact cache. Blocks and approximate caches commit whatever is likelier than
a threshold. Both sides have one dtype, one tokenizer, greedy choice, and stop at `<eos>`; times are
those of whole calls, prompts tokenized and computed in each. Before anything is decoded the report
states how many tokens a forward it takes to be as fast as left to right, from forwards timed alone.

Without `--pipelines` backbones of the configs' size have random weights: timing alone, at four
tokens a forward. Contexts beyond 1,024 tokens lie outside the training of the two configs.

    OMP_NUM_THREADS=2 python benchmarks/text_generation.py --json out/text_generation.json \\
        --pipelines runs/reasoning_block/pipeline runs/reasoning_causal/pipeline --data_root DATA
"""

import argparse
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from decoding import decode, forward_seconds
from live_bytes import peak_bytes
from reasoning_setup import BLOCKS, Work, batches, made_up_items, open_pipelines, read_items
from reporting import finish
from torch import Tensor

from multimodal_dlm.datasets.recipes.reasoning import TASKS
from multimodal_dlm.evaluation.bootstrap import bootstrap_interval
from multimodal_dlm.evaluation.html_report import line_plot
from multimodal_dlm.models.approximate_cache import (
    DelayedCacheConfig,
    DualCacheConfig,
    FeatureCacheConfig,
    PrefixCacheConfig,
)
from multimodal_dlm.models.kv_cache import ExactCacheConfig
from multimodal_dlm.schedulers import ConfidenceScheduler

GEN_LENGTH = 64
HEADLINE = f"block_{BLOCKS[0]}"
ASSUMED_RATE = 4  # Tokens a forward of random weights, which are never sure of anything.
MAX_COLUMNS = 700_000  # A call that would compute more columns is left out, and the report says so.
APPROXIMATE = {
    "prefix_cache": PrefixCacheConfig,
    "dual_cache": DualCacheConfig,
    "delayed_cache": DelayedCacheConfig,
    "feature_cache": FeatureCacheConfig,
}


@dataclass(frozen=True)
class Cell:
    """One row of the grid.

    Args:
        dtype: `float32` or `bfloat16`.
        context: Tokens of a prompt.
        batch: Rows of a call.
    """

    dtype: str
    context: int
    batch: int


@dataclass
class Counts:
    """What a backbone computed during a call.

    Args:
        forwards: Forwards whose logits were read; one over the prompt alone is none.
        columns: Tokens computed, rows added up.
        first_logits: When logits were read for the first time: the prompt had been computed.
    """

    forwards: int = 0
    columns: int = 0
    first_logits: float | None = None

    @contextmanager
    def watching(self, model: Any) -> Iterator[None]:
        """Count within the block."""
        compute_logits = model.compute_logits

        def read(*arguments: Any, **options: Any) -> Tensor:
            self.forwards += 1
            if self.first_logits is None:
                self.first_logits = time.perf_counter()
            return compute_logits(*arguments, **options)

        def begins(_: Any, inputs: Any) -> None:
            self.columns += inputs[0].shape[0] * inputs[0].shape[1]

        hook = model.blocks[0].register_forward_pre_hook(begins)
        model.compute_logits = read
        try:
            yield
        finally:
            del model.compute_logits
            hook.remove()


@dataclass
class Result:
    """What the calls of one method left in one cell."""

    seconds: list[float] = field(default_factory=list)
    decode_seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    forwards: list[int] = field(default_factory=list)
    columns: list[int] = field(default_factory=list)
    texts: dict[int, list[str]] = field(default_factory=dict)
    kv_bytes: int = 0
    peak_mebibytes: float = 0.0


@dataclass(frozen=True)
class Method:
    """A way to write a batch of texts.

    Args:
        name: In the report.
        pipe: Its pipeline.
        write: Prompts -> text codes (batch, positions).
        num_full: Forwards over the whole row that a call may take, for its estimated cost.
        has_cache: It keeps keys and values.
    """

    name: str
    pipe: Any
    write: Callable[[list[str]], Tensor]
    num_full: int = 1
    has_cache: bool = True

    def kv_bytes(self, length: int, batch: int) -> int:
        """Bytes of the keys and values it keeps for rows of some length."""
        config = self.pipe.transformer.config
        heads = config["num_key_value_heads"] or config["num_attention_heads"]
        width = heads * config["hidden_size"] // config["num_attention_heads"]
        size = width * self.pipe.transformer.dtype.itemsize
        return 2 * config["num_layers"] * size * length * batch * self.has_cache


def through(pipe: Any, cache: Any, steps: int, rule: dict[str, Any], **options: Any) -> Any:
    """Writing through the pipeline with a cache, a number of steps and a commit rule."""
    scheduler = ConfidenceScheduler(modalities={"text": rule})

    def write(prompts: list[str]) -> Tensor:
        pipe.transformer.disable_cache()
        if cache is not None:
            pipe.transformer.enable_cache(cache)
        pipe.scheduler = scheduler
        return pipe(
            prompts,
            gen_length=GEN_LENGTH,
            num_inference_steps=steps,
            output_type="seq",
            **options,
        ).sequences

    return write


def methods(block: Any, causal: Any, threshold: float | None) -> list[Method]:
    """All methods, those to compare first.

    Args:
        block: Pipeline that writes blocks.
        causal: Pipeline that writes from left to right.
        threshold: Of the commit rule; None for `ASSUMED_RATE` tokens a forward.
    """
    plain: dict[str, Any] = {"eos_column": 0, "fill_column": 1}
    if threshold is None:
        plain = {}  # Random weights write on to the end.
        steps, rule = GEN_LENGTH // ASSUMED_RATE, plain
    else:
        options = {"threshold": threshold}
        steps, rule = (
            GEN_LENGTH,
            plain
            | {
                "commit_rule": "threshold",
                "commit_rule_options": options,
            },
        )

    def left_to_right(prompts: list[str]) -> Tensor:
        return decode(causal, prompts, GEN_LENGTH, may_end=threshold is not None)

    exact = ExactCacheConfig()  # Enabled anew in each call: no prompt is kept from the last.
    quarter = GEN_LENGTH // 4
    return [
        Method("autoregressive", causal, left_to_right),
        *(
            Method(f"block_{n}", block, through(block, exact, steps, rule, block_length=n))
            for n in BLOCKS
        ),
        Method("autoregressive_pipeline", causal, through(causal, exact, GEN_LENGTH, plain)),
        *(
            Method(name, block, through(block, config(), steps, rule), quarter)
            for name, config in APPROXIMATE.items()
        ),
        Method(
            "full_recompute_n", block, through(block, None, GEN_LENGTH, plain), GEN_LENGTH, False
        ),
        Method("full_recompute_n/4", block, through(block, None, quarter, plain), quarter, False),
    ]


def call(method: Method, prompts: list[str], result: Result, number: int) -> None:
    """One timed call."""
    counts = Counts()
    with counts.watching(method.pipe.transformer):
        begun = time.perf_counter()
        codes = method.write(prompts)
        ended = time.perf_counter()
    fill = method.pipe.transformer.vocabulary.column_of("fill", "text")
    length = method.pipe.processor.text(prompts[:1], gen_length=1).length - 1
    result.seconds.append(ended - begun)
    result.decode_seconds.append(ended - (counts.first_logits or begun))
    result.tokens.append(int((codes != fill).sum()))
    result.forwards.append(counts.forwards)
    result.columns.append(counts.columns - length * len(prompts))
    result.kv_bytes = method.kv_bytes(length + GEN_LENGTH, len(prompts))
    result.texts[number] = method.pipe.processor.decode_sequences(codes)


def measure(
    cell: Cell, found: Sequence[Method], work: Work, args: Any
) -> tuple[dict[str, Result], dict[str, str]]:
    """Every method on the same batches in turn; the first round warms up.

    A method that has used up its seconds in a cell sits out, after `min_rounds` of it.
    """
    results = {method.name: Result() for method in found}
    skipped = {}
    length = cell.context + GEN_LENGTH
    for method in found:
        columns = method.num_full * length * cell.batch
        if columns > MAX_COLUMNS:
            skipped[method.name] = f"{columns:,} columns a call; {MAX_COLUMNS:,} at most"
    running = [method for method in found if method.name not in skipped]
    for method in running:
        prompts = work[0][0]
        call(method, prompts, Result(), 0)
        model = method.pipe.transformer
        peak = peak_bytes(lambda m=method, p=prompts: m.write(p), list(model.parameters()))
        results[method.name].peak_mebibytes = peak / 2**20
    for number, (prompts, _) in enumerate(work):
        for method in running:
            result = results[method.name]
            is_over = sum(result.seconds) > args.seconds and number >= args.min_rounds
            if not is_over:
                call(method, prompts, result, number)
    return {name: result for name, result in results.items() if result.seconds}, skipped


def spread(values: Sequence[float] | np.ndarray) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = np.percentile(values, [25, 50, 75])
    return {"median": float(middle), "q1": float(low), "q3": float(high)}


def accuracy(result: Result, work: Work) -> dict[str, Any]:
    """Share of the timed texts that are right to the word, and whose result is right, by task."""
    whole: dict[str, list[float]] = defaultdict(list)
    final: dict[str, list[float]] = defaultdict(list)
    for number, texts in result.texts.items():
        for text, item in zip(texts, work[number][1], strict=True):
            task = TASKS[item.task]
            whole[item.task].append(float(text == item.answer))
            final[item.task].append(float(task.result(text) == task.result(item.answer)))
    report: dict[str, Any] = {}
    for name, values in (("exact", whole), ("result", final)):
        everything = [value for part in values.values() for value in part]
        report[name] = {
            "mean": statistics.fmean(everything),
            "interval": bootstrap_interval(everything),
            "by_task": {task: statistics.fmean(part) for task, part in values.items()},
        }
    return report | {"num_texts": len(everything)}


def row(cell: Cell, name: str, result: Result, work: Work) -> dict[str, Any]:
    """One line of the report."""
    tokens = np.asarray(result.tokens, dtype=float)
    is_real = work[0][1][0].task in TASKS
    return {
        "dtype": cell.dtype,
        "context": cell.context,
        "batch": cell.batch,
        "method": name,
        "tokens_per_second": spread(tokens / result.seconds),
        "tokens_per_second_after_prompt": spread(tokens / result.decode_seconds),
        "seconds": spread(result.seconds),
        "forwards": statistics.fmean(result.forwards),
        "tokens_per_forward": float(tokens.sum() / sum(result.forwards) / cell.batch),
        "recompute_factor": float(sum(result.columns) / tokens.sum()),
        "peak_mebibytes": round(result.peak_mebibytes, 1),
        "kv_mebibytes": round(result.kv_bytes / 2**20, 2),
        "accuracy": accuracy(result, work) if is_real else None,
        "calls": len(result.seconds),
    }


def ratios(results: dict[str, Result], name: str, work: Work) -> dict[str, Any]:
    """The headline beside a method, call by call on the same prompts, and task by task.

    Returns:
        Tokens a second over those of the method, and the difference in the share of answers that
        are right to the word.
    """
    ours, theirs = results[HEADLINE], results[name]
    count = min(len(ours.seconds), len(theirs.seconds))
    tokens = np.asarray(ours.tokens[:count]) / np.asarray(theirs.tokens[:count])
    whole, after = (
        tokens * np.asarray(times[:count]) / np.asarray(own[:count])
        for own, times in (
            (ours.seconds, theirs.seconds),
            (ours.decode_seconds, theirs.decode_seconds),
        )
    )
    differences: dict[str, list[float]] = defaultdict(list)
    calls: dict[str, list[int]] = defaultdict(list)
    for number in range(count):
        items = work[number][1]
        task = items[0].task
        calls[task].append(number)
        for one, other, item in zip(ours.texts[number], theirs.texts[number], items, strict=True):
            differences[task].append(float(one == item.answer) - float(other == item.answer))
    every = [value for part in differences.values() for value in part]
    return {
        "whole_call": spread(whole),
        "after_prompt": spread(after),
        "exact": difference(every),
        "by_task": {
            task: {"whole_call": spread(whole[calls[task]]), "exact": difference(values)}
            for task, values in differences.items()
        },
    }


def difference(values: Sequence[float]) -> dict[str, Any]:
    """Mean over questions of ours less theirs, with its interval."""
    return {
        "difference": statistics.fmean(values),
        "interval": bootstrap_interval(values),
        "num_texts": len(values),
    }


def theory(block: Any, cell: Cell, repeats: int) -> dict[str, Any]:
    """Tokens a forward at which blocks are as fast as left to right, from forwards timed alone.

    S forwards write a block of B. With a forward of its own to store the block's keys that is
    c(B) / c(1) x (1 + 1 / S); fused with the first forward of the next block, (c(2 B) + (S - 1)
    c(B)) / (S c(1)).
    """
    counts = sorted({1, *BLOCKS, *(2 * length for length in BLOCKS)})
    cost = forward_seconds(block.transformer, cell.batch, cell.context, counts, repeats)
    needed = {}
    for length in sorted(BLOCKS):
        relative, fused = cost[length] / cost[1], cost[2 * length] / cost[1]
        needed[f"block_{length}"] = {
            f"{steps}_forwards": {
                "own_commit_forward": relative * (1 + 1 / steps),
                "fused": (fused + (steps - 1) * relative) / steps,
                "offered": length / steps,
            }
            for steps in (2, 4, 8)
        }
    return {
        "dtype": cell.dtype,
        "context": cell.context,
        "batch": cell.batch,
        "milliseconds": {str(count): 1000 * value for count, value in cost.items()},
        "relative_to_one": {str(count): value / cost[1] for count, value in cost.items()},
        "tokens_per_forward_needed": needed,
    }


def against_theory(theory: dict[str, Any], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Tokens a forward that the forwards' costs ask for at the measured number of forwards a block.

    Args:
        theory: Of the headline cell.
        rows: Its rows.

    Returns:
        A curve over block lengths for `line_plot`.
    """
    cost = {int(count): value for count, value in theory["relative_to_one"].items()}
    measured = {r["method"]: r["tokens_per_forward"] for r in rows}
    lines: dict[str, list[float]] = defaultdict(list)
    lengths = [n for n in sorted(BLOCKS) if f"block_{n}" in measured]
    for length in lengths:
        per_forward = measured[f"block_{length}"]
        steps = length / per_forward
        lines["measured"].append(per_forward)
        lines["needed"].append((cost[2 * length] + (steps - 1) * cost[length]) / steps)
        lines["needed, own commit"].append(cost[length] * (1 + 1 / steps))
    return {
        "x": lengths,
        "x_label": "tokens of a block",
        "y_label": "tokens a forward; above what is needed, blocks are faster",
        "lines": dict(lines),
    }


def main() -> None:
    """Parse options, state the theory, measure, write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pipelines", nargs=2, metavar=("BLOCK", "CAUSAL"), help="two folders")
    parser.add_argument("--data_root", type=Path, help="folder of the built recipe `reasoning`")
    parser.add_argument("--preset", default="small", help="size of random backbones")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"])
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--methods", nargs="+", help="some of the methods; all without")
    parser.add_argument("--samples", type=int, default=64, help="questions of every task")
    parser.add_argument("--threshold", type=float, default=0.9)
    parser.add_argument("--seconds", type=float, default=20.0, help="of a method in a cell")
    parser.add_argument("--min_rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one context, one batch, few calls")
    parser.add_argument("--plot", type=Path, help="SVG of tokens a forward, needed and measured")
    parser.add_argument("--json", type=Path, help="file to write the report to")
    args = parser.parse_args()
    if args.quick:
        args.contexts, args.batches, args.samples, args.min_rounds = [256], [1], 3, 2
    block, causal = open_pipelines(args.pipelines, args.preset, max(args.contexts) + GEN_LENGTH)
    items = read_items(args.data_root) or made_up_items()
    threshold = args.threshold if args.pipelines else None
    report: dict[str, Any] = {"theory": [], "rows": [], "skipped": [], "ratios": {}}
    for dtype in args.dtypes:
        for pipe in (block, causal):
            pipe.transformer.to(getattr(torch, dtype))
        for context in args.contexts:
            for batch in args.batches:
                cell = Cell(dtype, context, batch)
                stated = theory(block, cell, 3 if args.quick else 20)
                print(
                    f"{cell}: needed {stated['tokens_per_forward_needed']}",
                    file=sys.stderr,
                    flush=True,
                )
                report["theory"].append(stated)
                found = methods(block, causal, threshold)
                if args.methods:
                    found = [m for m in found if m.name in {*args.methods, HEADLINE}]
                work = batches(items, context, batch, args.samples)
                results, skipped = measure(cell, found, work, args)
                report["skipped"] += [
                    vars(cell) | {"method": n, "why": w} for n, w in skipped.items()
                ]
                report["rows"] += [row(cell, n, r, work) for n, r in results.items()]
                key = f"{dtype}/{context}/{batch}"
                report["ratios"][key] = {
                    name: ratios(results, name, work) for name in results if name != HEADLINE
                }
    found = summary(report, args)
    if args.plot:
        args.plot.write_text(line_plot(found["tokens_per_forward"]) + "\n", encoding="utf-8")
    finish(found, args.json)


def summary(report: dict[str, Any], args: Any) -> dict[str, Any]:
    """The report, its headline first: batch 1 at 1,024 tokens, or what is nearest to it."""
    context = min(args.contexts, key=lambda value: abs(value - 1024))
    cell = {"dtype": args.dtypes[0], "context": context, "batch": min(args.batches)}
    key = "/".join(map(str, cell.values()))
    cells = report.pop("ratios")
    (stated,) = [t for t in report["theory"] if t.items() >= cell.items()]
    rows = [r for r in report["rows"] if r.items() >= cell.items()]
    headline = {name: pair["whole_call"]["median"] for name, pair in cells[key].items()}
    return {
        "ratios": headline,
        "headline": f"tokens a second of {HEADLINE} over each method, whole calls, {key}",
        "tokens_per_forward": against_theory(stated, rows),
        "ratios_by_cell": cells,
        **report,
        "gen_length": GEN_LENGTH,
        "threshold": args.threshold if args.pipelines else None,
        "pipelines": args.pipelines,
    }


if __name__ == "__main__":
    main()
