"""The metrics of a model card: which model they are of, how they were taken, and their tables.

Metrics are of the weights and the scheduler they were taken with. A card says which those are
(`CardInfo.measured`); where it does not, they are of the model that it was saved with.
"""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from multimodal_dlm.pipelines.manifest import remembered_fingerprint, weights_fingerprint

NOT_MEASURED = "not measured"
WEIGHTS = {"model_fingerprint": "transformer", "image_tokenizer_fingerprint": "image_tokenizer"}
SUBJECT = (*WEIGHTS, "scheduler_fingerprint")  # What metrics are of.
_LABELS = {
    "suite": "suite",
    "seed": "seed",
    "manifest": "data",
    "manifest_fingerprint": "data (sha256)",
    "commit": "commit",
    "machine": "machine",
    "model_fingerprint": "weights of the backbone (sha256 in float32)",
    "image_tokenizer_fingerprint": "weights of the image tokenizer (sha256 in float32)",
    "scheduler_fingerprint": "settings of the scheduler (sha256)",
}


@dataclass(frozen=True)
class Origin:
    """The model that metrics without a fingerprint of their own are of.

    Args:
        metrics: The metrics.
        subject: Its fingerprints, by the names of `SUBJECT`; None where it is not known.
    """

    metrics: Mapping[str, Any]
    subject: Mapping[str, str | None]


def scheduler_fingerprint(name: str, config: Mapping[str, Any]) -> str:
    """SHA-256 of the class and the settings of a scheduler.

    What is None or empty does not count: a setting that a later version adds changes nothing.

    Args:
        name: Name of the class.
        config: Its config; entries that begin with `_` are Diffusers' own.
    """
    settings = {key: value for key, value in config.items() if not key.startswith("_")}
    text = json.dumps([name, _filled(settings)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def subject_of(pipeline: Any) -> dict[str, str]:
    """What is measured when this pipeline is: fingerprints of its networks and its scheduler."""
    scheduler = pipeline.scheduler
    return {
        **{name: weights_fingerprint(getattr(pipeline, part)) for name, part in WEIGHTS.items()},
        "scheduler_fingerprint": scheduler_fingerprint(type(scheduler).__name__, scheduler.config),
    }


def origin_of(pipeline: Any, folder: Path, options: Collection[str]) -> Origin | None:
    """What the metrics of a pipeline that has just been loaded are of; None without metrics.

    Args:
        pipeline: The pipeline, with the card of its folder.
        folder: Folder it was loaded from.
        options: Names of the options it was loaded with: components that were handed in, and
            weights that were quantized, are not those of the folder.
    """
    card = pipeline.card
    if not card.metrics:
        return None
    own = {name: card.measured[name] for name in SUBJECT if name in card.measured}
    subject: dict[str, str | None] = {}
    for name in [name for name in WEIGHTS if name not in own]:
        network = getattr(pipeline, WEIGHTS[name])
        is_own = not {WEIGHTS[name], "quantization_config"} & set(options)
        is_there = not any(part.is_meta for part in network.state_dict().values())
        subject[name] = remembered_fingerprint(network) if is_own and is_there else None
    if "scheduler_fingerprint" not in own:
        config = pipeline.scheduler.config
        name = type(pipeline.scheduler).__name__
        if "scheduler" in options:
            path = folder / "scheduler" / "scheduler_config.json"
            config = json.loads(path.read_text(encoding="utf-8"))
            name = str(config.get("_class_name"))
        subject["scheduler_fingerprint"] = scheduler_fingerprint(name, config)
    return Origin(card.metrics, {**subject, **own})


def changed_subject(card: Any, origin: Origin | None, now: Mapping[str, str]) -> list[str]:
    """Names of the fingerprints in which the model of a card's metrics differs from another one.

    A card that says some of them, and was not loaded with its model, is not known to be of the
    other one in the rest: those differ.

    Args:
        card: A `CardInfo`.
        origin: What the metrics of a loaded card are of.
        now: The other model's, as `subject_of` gives them.
    """
    is_said = any(name in card.measured for name in SUBJECT)
    then: dict[str, Any] = dict.fromkeys(SUBJECT) if is_said else dict(now)
    if origin is not None and origin.metrics == card.metrics:
        then.update(origin.subject)
    then.update({name: card.measured[name] for name in SUBJECT if name in card.measured})
    return [name for name in SUBJECT if then[name] != now[name]]


def conditions(report: Mapping[str, Any]) -> dict[str, Any]:
    """How the metrics of a `report.json` were taken, for `CardInfo.measured`.

    What the report does not say is left out.
    """
    settings, made = _part(report, "settings"), _part(report, "environment")
    manifest = _part(settings, "manifest")
    machine = made.get("cuda") or made.get("processor")
    if machine and made.get("num_cpus"):
        machine = f"{machine}, {made['num_cpus']} CPU cores"
    found = {
        "suite": settings.get("suite"),
        "seed": settings.get("seed"),
        "manifest": manifest.get("name"),
        "manifest_fingerprint": manifest.get("fingerprint"),
        "commit": made.get("commit"),
        "machine": machine,
    }
    return {name: value for name, value in found.items() if value is not None}


def metrics_section(metrics: Mapping[str, Any], measured: Mapping[str, Any]) -> str:
    """The tables of a card's metrics, and how they were taken."""
    if not metrics:
        return f"Quality, speed and likelihood: {NOT_MEASURED}."
    tables = []
    if measured:
        rows = [(_LABELS.get(name, name), f"`{value}`") for name, value in measured.items()]
        tables.append(table(("taken with", ""), sorted(rows, key=_place)))
    groups = {n: m for n, m in metrics.items() if isinstance(m, Mapping) and "baselines" in m}
    others = _flatten({name: value for name, value in metrics.items() if name not in groups})
    if others:
        tables.append(table(("metric", "value"), others))
    if groups:
        rows = [(name, *_measured(metric)) for name, metric in groups.items()]
        head = ("metric", "value", "95 % interval", "n", "baselines")
        tables.append(table(head, rows))
    return "\n\n".join(tables)


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table in Markdown."""
    lines = ["| " + " | ".join(header) + " |", "| " + " | ".join("---" for _ in header) + " |"]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def _filled(value: Any) -> Any:
    """A JSON value without entries that are None or empty."""
    if isinstance(value, Mapping):
        filled = {name: _filled(part) for name, part in value.items()}
        return {name: part for name, part in filled.items() if part not in (None, {}, [])}
    if isinstance(value, (list, tuple)):
        return [_filled(part) for part in value]
    return value


def _part(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """An entry that is an object; an empty one where it is none."""
    part = values.get(name)
    return part if isinstance(part, Mapping) else {}


def _place(row: tuple[str, str]) -> int:
    """Place of a condition in its table: JSON files come back sorted by name."""
    labels = list(_LABELS.values())
    return labels.index(row[0]) if row[0] in labels else len(labels)


def _measured(metric: Mapping[str, Any]) -> tuple[str, ...]:
    """Value, interval, rows and baselines of a metric of `report.json`."""
    interval = ""
    if metric["low"] is not None:
        interval = f"{metric['low']:.4g} to {metric['high']:.4g}"
    baselines = ", ".join(f"{name} {value:.4g}" for name, value in metric["baselines"].items())
    return f"{metric['value']:.4g}", interval, f"{metric['n']:,}", baselines


def _flatten(metrics: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            rows += _flatten(value, f"{prefix}{name} / ")
        elif value is None:
            rows.append((prefix + str(name), NOT_MEASURED))
        else:
            shown = f"{value:.4g}" if isinstance(value, float) else str(value)
            rows.append((prefix + str(name), shown.replace("|", "\\|").replace("\n", " ")))
    return rows
