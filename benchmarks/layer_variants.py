"""Whether int8 layers or compiled blocks make a picture faster on this machine, and what they cost.

Text-to-image by a saved pipeline, the same prompt and steps, in interleaved rounds of one process:
float32 and bf16 as the pipeline runs them (native kernels included where the CPU has them), the
repeated blocks compiled by Inductor, and torchao's int8 layers with and without compilation. A
variant that cannot run is left out, with the reason, and so is bf16 where a CPU computes it in
software, unless it is named. `nats` is the bound on held-out pictures of the committed sample given
their captions (the same masks for all), `difference` what a variant adds to float32's, with its
95 % bootstrap interval over pictures.

    pip install torchao
    OMP_NUM_THREADS=2 python benchmarks/layer_variants.py --json out/layer_variants.json
"""

import argparse
import importlib
import importlib.metadata
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from reporting import finish
from text_to_image import DEFAULT_STEPS, PROMPT, load, quartiles, seeded, time_runs

from multimodal_dlm.datasets.manifest import open_manifest
from multimodal_dlm.datasets.reading import first_samples
from multimodal_dlm.evaluation.bootstrap import bootstrap_interval
from multimodal_dlm.precision import software_bf16

ROOT = Path(__file__).parents[1]
SAMPLE = ROOT / "datasets" / "sample"
CAPTION = 1  # The caption that names concept and artist.
BASE = "float32"
INT8 = {
    "int8_weights": "Int8WeightOnlyConfig",
    "int8_weights_and_activations": "Int8DynamicActivationInt8WeightConfig",
}


def as_loaded(_: Any) -> None:
    """Nothing is changed."""


def compiled(pipe: Any) -> None:
    """The repeated blocks compiled, for any number of rows.

    All pipelines share the compiled code of a block: at the usual limit later ones would run as
    they are, without a word.
    """
    torch._dynamo.config.recompile_limit = 256
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    pipe.transformer.compile_repeated_blocks(dynamic=True)


def quantized(pipe: Any, config: str, *, compiles: bool = False) -> None:
    """The linear layers of the blocks in int8."""
    torchao: Any = importlib.import_module("torchao.quantization")
    for block in pipe.transformer.blocks:
        torchao.quantize_(block, getattr(torchao, config)())
    if compiles:
        compiled(pipe)


def variants() -> dict[str, tuple[torch.dtype, Callable[[Any], None]]]:
    """What is timed: the dtype a pipeline is loaded in, and what is then done to it."""
    found: dict[str, tuple[torch.dtype, Callable[[Any], None]]] = {}
    for name, dtype in ((BASE, torch.float32), ("bfloat16", torch.bfloat16)):
        found[name] = dtype, as_loaded
        found[f"{name}_compiled"] = dtype, compiled
        for label, config in INT8.items():
            found[f"{name}_{label}"] = dtype, partial(quantized, config=config)
            found[f"{name}_{label}_compiled"] = (
                dtype, partial(quantized, config=config, compiles=True)
            )  # fmt: skip
    return found


def open_variants(folder: str, names: Sequence[str] | None) -> tuple[dict[str, Any], dict]:
    """Pipelines by variant, and why others are left out; each has drawn one picture."""
    pipes, left_out = {}, {}
    for name, (dtype, change) in variants().items():
        if names and name not in {BASE, *names}:
            continue
        reason = software_bf16(torch.device("cpu")) if dtype == torch.bfloat16 else None
        if reason and not names:
            left_out[name] = reason
            continue
        pipe = load(folder, dtype)
        try:
            change(pipe)
            pipe([PROMPT], num_inference_steps=2, generator=seeded())
        except Exception as error:  # noqa: BLE001  Whatever stops a foreign library is a result.
            left_out[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        else:
            pipes[name] = pipe
    return pipes, left_out


def nats(pipe: Any, count: int) -> list[float]:
    """Of each held-out picture, with the same masks whoever is asked."""
    source = open_manifest(str(SAMPLE / "emoji.yaml"), str(SAMPLE)).sources["emoji"]
    samples = list(first_samples(source, "test", count))
    estimates = pipe.score(
        "text_to_image",
        image=[sample.image for sample in samples],
        text=[sample.record.captions[CAPTION] for sample in samples],
        num_draws=8,
        generator=seeded(),
    )
    return [estimate.value for estimate in estimates]


def main() -> None:
    """Parse options, measure, write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--pipeline", default=str(ROOT / "pipelines" / "emoji-small"), help="saved pipeline")
    add("--variants", nargs="+", choices=list(variants()), help="some of them; all without")
    add("--steps", type=int, default=DEFAULT_STEPS)
    add("--batches", type=int, nargs="+", default=[1, 16])
    add("--repeats", type=int, default=5, help="rounds")
    add("--pictures", type=int, default=64, help="held-out pictures to score, at most")
    add("--json", type=Path, help="file to write the report to")
    args = parser.parse_args()
    pipes, left_out = open_variants(args.pipeline, args.variants)

    def draw(pipe: Any, batch: int) -> None:
        pipe([PROMPT] * batch, num_inference_steps=args.steps, generator=seeded())

    runs = {name: partial(draw, pipe) for name, pipe in pipes.items()}
    seconds = time_runs(runs, args.batches, args.repeats)
    scores = {name: nats(pipe, args.pictures) for name, pipe in pipes.items()}
    rows = []
    for name in pipes:
        added = [a - b for a, b in zip(scores[name], scores[BASE], strict=True)]
        low, high = bootstrap_interval(added) if name != BASE else (0.0, 0.0)
        rows.append(
            {
                "variant": name,
                "seconds_per_picture": {
                    str(batch): {
                        "median": round(statistics.median(seconds[name, batch]), 5),
                        "quartiles": [round(v, 5) for v in quartiles(seconds[name, batch])],
                    }
                    for batch in args.batches
                },
                "times_float32": {
                    str(batch): round(
                        statistics.median(seconds[name, batch])
                        / statistics.median(seconds[BASE, batch]),
                        3,
                    )
                    for batch in args.batches
                },
                "nats": round(statistics.fmean(scores[name]), 3),
                "difference": [round(v, 4) for v in (statistics.fmean(added), low, high)],
            }
        )
    finish(
        {
            "pipeline": Path(args.pipeline).name,
            "steps": args.steps,
            "repeats": args.repeats,
            "pictures": len(scores[BASE]),
            "torchao": _version("torchao"),
            "variants": rows,
            "left_out": left_out,
        },
        args.json,
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
