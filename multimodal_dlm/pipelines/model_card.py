"""The model card: written from the components, with nothing left to fill in by hand.

What the components cannot know (data, training, metrics, limits) comes from a `CardInfo`, stored as
`model_card.json` beside them; what nobody has measured is said to be not measured.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from multimodal_dlm.errors import CheckpointError, DataError, unknown_name
from multimodal_dlm.pipelines.card_metrics import (
    NOT_MEASURED,
    conditions,
    metrics_section,
    table,
)
from multimodal_dlm.pipelines.card_tasks import CardTasks
from multimodal_dlm.pipelines.manifest import hash_shared, is_shared
from multimodal_dlm.tasks import TASKS

CARD_NAME = "model_card.json"
_OPTIONAL = ("tasks", "measured")  # Entries that are written only where they say something.
SECTIONS = (
    "Tasks",
    "Usage",
    "Vocabulary layout",
    "Components",
    "Sampler defaults",
    "Training data",
    "Training",
    "Metrics",
    "Limits",
    "Licence",
    "Files",
)


@dataclass(frozen=True)
class CardInfo:
    """What the card says beyond the components.

    Args:
        title: Name of the model.
        license: Identifier of the Hub, such as `apache-2.0`.
        language: Language codes.
        datasets: Data sets on the Hub.
        base_model: Model it was made from.
        base_model_relation: `finetune`, `adapter`, `quantized` or `merge`.
        summary: One paragraph at the top.
        data: Data, with counts and licences; Markdown.
        training: How it was trained, with command, hardware and cost; Markdown.
        limits: What it cannot do; Markdown.
        metrics: Name -> value, or group -> name -> value, nested at will.
        measured: How the metrics were taken: suite, seed, fingerprint of the data, commit, machine,
            and the fingerprints of the networks and the scheduler they are of. Without any of these
            they are of the model that the card is saved with.
        tasks: What it was trained for, of `tasks.TASKS`; none when that is not known, which stands
            for all.
    """

    title: str = "Unified multimodal diffusion model"
    license: str = "apache-2.0"
    language: tuple[str, ...] = ("en",)
    datasets: tuple[str, ...] = ()
    base_model: str | None = None
    base_model_relation: str | None = None
    summary: str = ""
    data: str = ""
    training: str = ""
    limits: str = ""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    measured: Mapping[str, Any] = field(default_factory=dict)
    tasks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse unknown tasks."""
        for task in self.tasks:
            if task not in TASKS:
                raise unknown_name("task of a model card", str(task), TASKS)

    def save(self, folder: str | Path) -> None:
        """Write `model_card.json`."""
        entries = asdict(self).items()
        values = {name: value for name, value in entries if value or name not in _OPTIONAL}
        text = json.dumps(values, indent=2, ensure_ascii=False, sort_keys=True)
        (Path(folder) / CARD_NAME).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> "CardInfo":
        """Read `model_card.json`; defaults when there is none.

        Raises:
            CheckpointError: When it is no JSON object.
            ConfigError: When an entry or a task is unknown.
        """
        path = Path(folder) / CARD_NAME
        if not path.is_file():
            return cls()
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise CheckpointError(f"`{path}` is not valid JSON: {error}.") from error
        if not isinstance(values, dict):
            raise CheckpointError(f"`{path}` must hold a JSON object.")
        known = [part.name for part in fields(cls)]
        for name in values:
            if name not in known:
                raise unknown_name(f"entry of {CARD_NAME}", name, known)
        for name in ("language", "datasets", "tasks"):
            if name in values:
                values[name] = tuple(values[name])
        return cls(**values)


def read_report(path: str | Path, folder: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metrics of an evaluation of a pipeline, and how they were taken.

    Args:
        path: `report.json` of the evaluation.
        folder: Folder of the pipeline.

    Returns:
        `metrics` and `measured` of a `CardInfo`, the latter without fingerprints of the model.

    Raises:
        DataError: When the file is missing, no report, or one of another pipeline.
    """
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"`{path}` must be a readable JSON report: {error}.") from error
    if not isinstance(report, dict):
        raise DataError(f"`{path}` must hold a JSON object; got {type(report).__name__}.")
    metrics, pipeline = report.get("metrics"), report.get("pipeline")
    if not isinstance(metrics, dict) or not isinstance(pipeline, dict):
        raise DataError(
            f"`{path}` must hold the entries `metrics` and `pipeline` of a `report.json`; got"
            f" {sorted(report)}. {_evaluate(folder)}"
        )
    _check_files(path, pipeline.get("files"), folder)
    return metrics, conditions(report)


def _check_files(path: str | Path, files: Any, folder: str | Path) -> None:
    """Refuse a report of other files than a folder's, the card's own left aside.

    Raises:
        DataError: Naming the files.
    """
    if not isinstance(files, dict) or not files:
        raise DataError(
            f"`report` must list the files of the pipeline it is of; `{path}` lists none: what was"
            f" measured came from the Hub or from memory. {_evaluate(folder)}"
        )
    then = {name: digest for name, digest in files.items() if _is_measured(name)}
    now = {name: digest for name, digest in hash_shared(folder).items() if _is_measured(name)}
    differing = sorted(name for name in {*then, *now} if then.get(name) != now.get(name))
    if differing:
        named = "; ".join(
            f"`{name}` is {_short(then.get(name))} there and {_short(now.get(name))} here"
            for name in differing[:4]
        )
        more = f"; and {len(differing) - 4} more" if len(differing) > 4 else ""
        raise DataError(
            f"`report` must be of the pipeline in `{folder}`; `{path}` is of another one, or of an"
            f" earlier state: {named}{more}. {_evaluate(folder)}"
        )


def _is_measured(name: str) -> bool:
    """Whether a file is one that loading reads: shared, and not the card."""
    return is_shared(name) and name != CARD_NAME and not name.endswith(".md")


def _short(digest: str | None) -> str:
    return "missing" if digest is None else f"{digest[:12]}..."


def _evaluate(folder: str | Path) -> str:
    return (
        f"Measure this one, `multimodal-dlm evaluate {folder} --output OUTPUT`, and give"
        " `OUTPUT/report.json`."
    )


def render_card(pipeline: Any, hashes: Mapping[str, str]) -> str:
    """The text of README.md: YAML front matter for the Hub, then the sections.

    Args:
        pipeline: A pipeline of ours; its `card` is the `CardInfo`.
        hashes: SHA-256 of each file of the folder.
    """
    info: CardInfo = pipeline.card
    tasks = CardTasks(info.tasks, pipeline.processor.layout)
    bodies = {
        "Tasks": tasks.table(),
        "Usage": tasks.usage(),
        "Vocabulary layout": _vocabulary(pipeline),
        "Components": _components(pipeline),
        "Sampler defaults": _sampler(pipeline, tasks),
        "Training data": info.data or NOT_MEASURED.replace("measured", "described"),
        "Training": info.training or NOT_MEASURED.replace("measured", "described"),
        "Metrics": metrics_section(info.metrics, info.measured),
        "Limits": info.limits or _limits(pipeline, tasks),
        "Licence": f"{info.license}. The licences of the training data are listed above.",
        "Files": table(
            ("file", "sha256"), [(f"`{name}`", f"`{value}`") for name, value in hashes.items()]
        )
        + "\n\nCheck them with `sha256sum -c SHA256SUMS`; loading does so by itself.",
    }
    summary = info.summary or tasks.summary()
    sections = "\n\n".join(f"## {name}\n\n{bodies[name]}" for name in SECTIONS)
    front = _front_matter(info, tasks.tags())
    return f"---\n{front}---\n\n# {info.title}\n\n{summary}\n\n{sections}\n"


def _front_matter(info: CardInfo, tags: Sequence[str]) -> str:
    entries: dict[str, Any] = {
        "license": info.license,
        "library_name": "diffusers",
        "pipeline_tag": tags[0],
        "tags": list(tags),
        "language": list(info.language),
    }
    if info.datasets:
        entries["datasets"] = list(info.datasets)
    if info.base_model:
        entries["base_model"] = info.base_model
    if info.base_model_relation:
        entries["base_model_relation"] = info.base_model_relation
    return yaml.safe_dump(entries, sort_keys=False, allow_unicode=True)


def _vocabulary(pipeline: Any) -> str:
    vocabulary = pipeline.transformer.vocabulary
    segments = sorted(vocabulary.segments, key=lambda part: part.offset)
    ranges = table(
        ("segment", "modality", "first id", "last id", "ids"),
        [(f"`{s.name}`", s.modality or "-", s.offset, s.stop - 1, s.size) for s in segments],
    )
    tokens = [(f"`{name}`", value, "special") for name, value in vocabulary.special_ids.items()]
    tokens += [(f"`{state.name}`", state.id, "mask state") for state in vocabulary.states]
    tokens.sort(key=lambda token: token[1])
    prints = [(name, f"`{value}`") for name, value in sorted(vocabulary.fingerprints.items())]
    prints.append(("whole layout", f"`{vocabulary.fingerprint}`"))
    grids = ", ".join(f"{h} x {w}" for h, w in pipeline.processor.image_grids)
    layout = pipeline.processor.layout
    text = (
        f"A row is `<boi>` image `<eoi>` instruction answer. Picture grids: {grids} tokens"
        f" ({pipeline.image_size} x {pipeline.image_size} pixels); longest text:"
        f" {layout['max_window']['text']} tokens; attention: {layout['condition_attention']}."
    )
    tables = (ranges, table(("token", "id", "kind"), tokens))
    return "\n\n".join([text, *tables, table(("tokenizer", "fingerprint (sha256)"), prints)])


def _components(pipeline: Any) -> str:
    rows = []
    for name, component in pipeline.components.items():
        size = "-"
        if hasattr(component, "num_parameters"):
            size = f"{component.num_parameters():,} parameters, {component.dtype}"
        rows.append((f"`{name}`", f"`{type(component).__name__}`", size))
    config = pipeline.transformer.config
    names = ("hidden_size", "num_layers", "num_attention_heads", "noise_conditioning")
    shape = ", ".join(f"{name} {config[name]}" for name in names if name in config)
    fingerprint = f"Weights of the backbone (sha256 in float32): `{pipeline.model_fingerprint}`."
    listed = table(("component", "class", "size"), rows)
    return f"{listed}\n\nBackbone: {shape}.\n\n{fingerprint}"


def _sampler(pipeline: Any, tasks: CardTasks) -> str:
    scheduler = pipeline.scheduler
    rows = [
        (modality, f"`{name}`", value)
        for modality, options in sorted(scheduler.config["modalities"].items())
        for name, value in options.items()
        if value not in (None, {})
    ]
    defaults = f"`{type(scheduler).__name__}`. {tasks.sampling(scheduler.config)}".rstrip()
    return f"{defaults}\n\n{table(('modality', 'option', 'value'), rows)}"


def _limits(pipeline: Any, tasks: CardTasks) -> str:
    longest = f"at most {pipeline.processor.layout['max_window']['text']} tokens"
    if not tasks.knows_pictures():
        return (
            f"Texts are {longest}. What lies outside the training data is not written reliably."
            f" Bias and safety: {NOT_MEASURED}."
        )
    return (
        f"Pictures are {pipeline.image_size} x {pipeline.image_size} pixels and texts {longest}."
        " What lies outside the training data is not drawn or described reliably. Bias and safety:"
        f" {NOT_MEASURED}."
    )
