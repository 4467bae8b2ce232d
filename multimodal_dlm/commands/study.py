"""The commands that measure how a model denoises, and the one that fits what judges it."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from multimodal_dlm.commands.evaluate import measure_suite
from multimodal_dlm.commands.loading import (
    RELEASED_PIPELINE,
    load,
    open_source,
    require_folder,
    write_json,
)
from multimodal_dlm.commands.reporting import Report, say

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


def add_options(parser: "ArgumentParser", name: str) -> None:
    """Add the options of a command."""
    if name == "noise-spectrum":
        parser.add_argument(
            "pipeline", nargs="?", type=str, default=RELEASED_PIPELINE,
            help="folder of a saved pipeline, or `owner/name` on the Hub",
        )  # fmt: skip
        parser.add_function_arguments(run_noise_spectrum, skip={"pipeline"}, as_group=False)
        return
    parser.add_argument("manifest", type=str, help="YAML file")
    if name == "scorer":
        parser.add_function_arguments(run_scorer, skip={"manifest"}, as_group=False)
        return
    parser.add_function_arguments(run_step_plan, skip={"manifest"}, as_group=False)


def run_noise_spectrum(
    pipeline: str = RELEASED_PIPELINE,
    *,
    manifest: str,
    source: str,
    split: str = "test",
    attributes: str = "group,style,background",
    data_root: str | None = None,
    levels: int = 9,
    limit: int = 1000,
    seed: int = 0,
    output: str = "out/noise_spectrum",
    device: str = "auto",
) -> Report:
    """Measure what is decided at which noise level; writes report.json and report.html.

    Args:
        pipeline: folder of a saved pipeline, or `owner/name` on the Hub
        manifest: YAML file
        source: dataset of the manifest
        split: split to measure
        attributes: entries of the records' meta to probe, with commas between them
        data_root: folder that holds the datasets' folders; null for the manifest's own folder
        levels: noise levels from 0 to 1
        limit: pictures at most
        seed: of masks and folds
        output: folder of the report
        device: auto, cpu, cuda, cuda:1
    """
    from multimodal_dlm.datasets.manifest import open_manifest
    from multimodal_dlm.evaluation.suites import Suite, SuiteEntry

    options = {"limit": limit, "num_levels": levels, "attributes": attributes.split(",")}
    entry = SuiteEntry("noise_spectrum", "noise_spectrum", source, split, options)
    return measure_suite(
        pipeline,
        open_manifest(manifest, data_root),
        Suite("noise_spectrum", (entry,)),
        output,
        seed=seed,
        batch_size=64,
        device=device,
    )


def run_step_plan(
    manifest: str,
    *,
    source: str,
    split: str = "val",
    task: str = "text_to_image",
    pipeline: str = RELEASED_PIPELINE,
    data_root: str | None = None,
    points: int = 17,
    limit: int = 256,
    skip: int = 0,
    seed: int = 0,
    check_split: str | None = None,
    output: str | None = None,
    save_scheduler: str | None = None,
    device: str = "auto",
) -> Report:
    """Measure the information profile of a modality and predict what step plans cost.

    Args:
        manifest: YAML file.
        source: dataset of the manifest
        split: held-out split; not one that pictures drawn by the plan are judged on
        task: whose window is scored: text_to_image, caption, vqa, unconditional_image or
            unconditional_text
        pipeline: folder of a saved pipeline, or `owner/name` on the Hub
        data_root: folder that holds the datasets' folders; null for the manifest's own folder
        points: shares of known tokens at which to measure
        limit: rows at most
        skip: rows passed over first, such as those that pictures drawn by the plan are judged on
        seed: of the orders
        check_split: held-out split on whose rows what plans lose is measured, those after the
            measured ones if it is the same; null for the prediction alone. One forward for each
            token of a window
        output: JSON file for the result; null writes none
        save_scheduler: folder for the pipeline's scheduler with this profile; null writes none
        device: auto, cpu, cuda, cuda:1
    """
    held_out = open_source(manifest, data_root, source)
    require_folder(pipeline)
    loaded = load("UnifiedTextToImagePipeline", pipeline, device)
    from multimodal_dlm.evaluation.step_profile import measure_step_profile

    profile = measure_step_profile(
        loaded,
        held_out,
        split=split,
        task=task,
        num_points=points,
        limit=limit,
        skip=skip,
        seed=seed,
        progress=lambda done, total: say(f"share {done} of {total}"),
    )
    values = {"source": source, "split": split, "pipeline": pipeline, "seed": seed, "skip": skip}
    values |= asdict(profile)
    if check_split is not None:
        from multimodal_dlm.evaluation.plan_errors import measure_plan_errors

        errors = measure_plan_errors(
            loaded,
            held_out,
            profile.values,
            split=check_split,
            task=task,
            limit=limit,
            skip=skip + limit if check_split == split else 0,
            seed=seed,
            progress=lambda done, total: say(f"checked {done} of {total} batches"),
        )
        values["check"] = {"split": check_split, **asdict(errors)}
    write_json(output, values)
    if save_scheduler is not None:
        _with_profile(loaded.scheduler, profile.modality, profile.values).save_pretrained(
            save_scheduler
        )
    return Report(values, _table(values))


def run_scorer(
    manifest: str,
    *,
    source: str = "emoji",
    judged_split: str = "unseen_combinations",
    data_root: str | None = None,
    limit: int | None = None,
    epochs: int | None = None,
    seed: int = 0,
    output: str = "out/scorer",
) -> Report:
    """Fit the image-text scorer that judges drawings, and write its folder with its accuracy.

    Args:
        manifest: YAML file.
        source: dataset of the manifest, pictures with names
        judged_split: split whose pictures it is to judge; nothing of it is fitted to
        data_root: folder that holds the datasets' folders; null for the manifest's own folder
        limit: training pictures at most
        epochs: passes over the pictures; null takes the default
        seed: of weights and batches
        output: folder of the scorer
    """
    named = open_source(manifest, data_root, source)
    from multimodal_dlm.evaluation.scorer_fitting import fit_to_source

    options: dict[str, Any] = {} if epochs is None else {"num_epochs": epochs}
    fitted = fit_to_source(
        named, judged_split=judged_split, limit=limit, seed=seed, progress=say, **options
    )
    fitted.scorer.save(output)
    values = {
        "source": source,
        "num_names": fitted.num_names,
        "num_pictures": fitted.num_pictures,
        "seed": seed,
        "accuracy": {name: dict(found) for name, found in fitted.accuracy.items()},
    }
    write_json(f"{output}/accuracy.json", values)
    lines = [f"{output}: {fitted.num_pictures} pictures of {fitted.num_names} names"]
    lines += [
        f"  {name}: R@1 {found['name_at_1']:.3f} (chance {found['chance_at_1']:.4f}), R@5"
        f" {found['name_at_5']:.3f} (chance {found['chance_at_5']:.4f}), AUC {found['auc']:.3f}"
        f" (chance 0.5) of {found['pictures']:.0f} pictures"
        for name, found in fitted.accuracy.items()
    ]
    return Report(values, "\n".join(lines))


def _with_profile(scheduler: Any, modality: str, profile: list[float]) -> Any:
    """The same scheduler, one modality planned by a profile."""
    modalities = {name: dict(options) for name, options in scheduler.config.modalities.items()}
    modalities[modality]["step_profile"] = profile
    return type(scheduler).from_config(scheduler.config, modalities=modalities)


def _table(values: dict[str, Any]) -> str:
    last = len(values["values"]) - 1
    lines = [
        f"{values['task']} of {values['source']}, split {values['split']}:"
        f" {values['num_rows']} rows, up to {values['num_tokens']} {values['modality']} tokens",
        "  known   nats a token",
    ]
    lines += [
        f"  {100 * place / last:4.0f} %   {value:6.3f} ± {error:.3f}"
        for place, (value, error) in enumerate(
            zip(values["values"], values["standard_errors"], strict=True)
        )
    ]
    if values["predictions"]:
        counts = list(next(iter(values["predictions"].values())))
        lines.append("  predicted nats lost by drawing in parallel, random order")
        lines.append("  steps     " + "".join(f"{count:>10}" for count in counts))
        lines += [
            f"  {name:<10}" + "".join(f"{row[count]:10.3f}" for count in counts)
            for name, row in values["predictions"].items()
        ]
    if "check" in values:
        lines += _check_lines(values["check"])
    return "\n".join(lines)


def _check_lines(check: dict[str, Any]) -> list[str]:
    counts = list(next(iter(check["plans"].values())))
    return [
        f"  measured on {check['num_rows']} rows of split {check['split']}",
        "  steps     " + "".join(f"{count:>16}" for count in counts),
        *(
            f"  {name:<10}"
            + "".join(
                f"{row[count]['measured']:9.3f} ± {row[count]['standard_error']:.2f}"
                for count in counts
            )
            for name, row in check["plans"].items()
        ),
        *(
            f"  {pair['plan']} against {pair['against']}: {pair['difference']:+.3f} ±"
            f" {pair['standard_error']:.3f} nats (predicted {pair['predicted']:+.3f})"
            for pair in check["comparisons"]
        ),
    ]
