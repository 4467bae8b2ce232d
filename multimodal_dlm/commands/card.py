"""The command that writes a model card."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from multimodal_dlm.commands.loading import RELEASED_PIPELINE
from multimodal_dlm.commands.reporting import Report
from multimodal_dlm.errors import CheckpointError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


def add_options(parser: "ArgumentParser", name: str) -> None:
    """Add the options of the command."""
    parser.add_argument(
        "pipeline", nargs="?", type=str, default=RELEASED_PIPELINE, help="folder of a pipeline"
    )
    parser.add_function_arguments(run_card, skip={"pipeline"}, as_group=False)


def run_card(
    pipeline: str = RELEASED_PIPELINE, *, report: str | None = None, output: str | None = None
) -> Report:
    """Write the model card of a saved pipeline, from its model_card.json, which you may edit.

    Args:
        pipeline: Folder of the pipeline.
        report: report.json of an evaluation of this pipeline, whose metrics go into the card; null
            keeps those there
        output: file; null writes README.md into the folder
    """
    if not Path(pipeline).is_dir():
        raise CheckpointError(
            f"`pipeline` must be a folder on this machine; there is no folder `{pipeline}`."
        )
    from multimodal_dlm.pipelines import load_pipeline
    from multimodal_dlm.pipelines.card_metrics import subject_of
    from multimodal_dlm.pipelines.manifest import hash_shared, verify_manifest, write_manifest
    from multimodal_dlm.pipelines.model_card import CARD_NAME, read_report, render_card

    if verify_manifest(pipeline, but=(CARD_NAME,)):
        write_manifest(pipeline)
    read = None if report is None else read_report(report, pipeline)
    loaded = load_pipeline(pipeline)
    before = loaded.card
    if read is None:
        loaded.drop_foreign_metrics()
    else:
        metrics, measured = read
        measured |= subject_of(loaded)
        loaded.card = replace(before, metrics=metrics, measured=measured)
    if loaded.card != before:
        loaded.card.save(pipeline)
        write_manifest(pipeline)
    card = render_card(loaded, hash_shared(pipeline))
    path = Path(pipeline) / "README.md" if output is None else Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(card, encoding="utf-8")
    return Report({"card": str(path), "lines": len(card.splitlines())}, str(path))
