"""The command that measures captions, answers, text lengths, likelihood and reconstruction."""

import importlib
from typing import TYPE_CHECKING, Any

from multimodal_dlm.commands.loading import (
    RELEASED_PIPELINE,
    load,
    open_source,
    require_folder,
    write_json,
)
from multimodal_dlm.commands.reporting import Report, say
from multimodal_dlm.errors import unknown_name

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

# Task -> module of `multimodal_dlm.evaluation` that has `evaluate_<task>`.
TASKS = {
    "answers": "understanding",
    "captions": "understanding",
    "lengths": "understanding",
    "likelihood": "likelihood",
    "reconstruction": "reconstruction",
}


def add_options(parser: "ArgumentParser", name: str) -> None:
    """Add the options of the command."""
    parser.add_argument("manifest", type=str, help="YAML file")
    parser.add_function_arguments(run_evaluate, skip={"manifest"}, as_group=False)


def run_evaluate(
    manifest: str,
    *,
    source: str,
    split: str = "test",
    task: str = "answers",
    pipeline: str = RELEASED_PIPELINE,
    data_root: str | None = None,
    limit: int | None = None,
    batch_size: int = 64,
    output: str | None = None,
    device: str = "auto",
) -> Report:
    """Measure captions, answers, lengths, likelihood or the image tokenizer on held-out samples.

    Args:
        manifest: YAML file.
        source: dataset of the manifest
        split: held-out split
        task: answers (exact match beside the blind baseline), captions (exact name beside the
            nearest training picture), lengths (captions that do not depend on gen_length),
            likelihood (NELBO of texts and pictures, AUC of matched pairs) or reconstruction
            (PSNR and code usage of the image tokenizer)
        pipeline: folder of a saved pipeline, or `owner/name` on the Hub
        data_root: folder that holds the datasets' folders; null for the manifest's own folder
        limit: questions or pictures at most; null for all
        batch_size: questions or pictures at once
        output: JSON file for the result; null writes none
        device: auto, cpu, cuda, cuda:1, mps
    """
    if task not in TASKS:
        raise unknown_name("task", task, TASKS)
    held_out = open_source(manifest, data_root, source)
    require_folder(pipeline)
    loaded = load("UnifiedImageToTextPipeline", pipeline, device)
    say(f"measuring {task} of {source}, split {split}")
    module = importlib.import_module(f"multimodal_dlm.evaluation.{TASKS[task]}")
    measure = getattr(module, f"evaluate_{task}")
    result = measure(loaded, held_out, split=split, limit=limit, batch_size=batch_size)
    values = {"task": task, "source": source, "split": split, "pipeline": pipeline, **result}
    write_json(output, values)
    return Report(values, _table(values))


def _table(values: dict[str, Any]) -> str:
    lines = [f"{values['task']} of {values['source']}, split {values['split']}"]
    for name, row in values.items():
        if isinstance(row, dict) and "nats" in row:
            lines.append(
                f"  {name:<26}{row['nats']:8.3f} nats a row, {row['low']:.3f} to {row['high']:.3f}"
            )
        elif isinstance(row, dict):
            lines.append(
                f"  {name:<26}{100 * row['accuracy']:6.2f} % ± {100 * row['standard_error']:.2f}"
                f"  of {row['count']:,}"
            )
            lines += [
                f"    {kind:<24}{100 * share:6.2f} %" for kind, share in row["by_type"].items()
            ]
        elif not isinstance(row, str) and name != "seconds":
            lines.append(f"  {name:<26}{row}")
    return "\n".join([*lines, f"{values['seconds']} s"])
