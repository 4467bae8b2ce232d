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

CARD_NAME = "model_card.json"
NOT_MEASURED = "not measured"
TAGS = (
    "any-to-any",
    "text-to-image",
    "image-to-text",
    "visual-question-answering",
    "masked-diffusion",
    "discrete-diffusion",
    "multimodal_dlm",
)
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

    def save(self, folder: str | Path) -> None:
        """Write `model_card.json`."""
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False, sort_keys=True)
        (Path(folder) / CARD_NAME).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> "CardInfo":
        """Read `model_card.json`; defaults when there is none.

        Raises:
            CheckpointError: When it is no JSON object.
            ConfigError: When an entry is unknown.
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
        for name in ("language", "datasets"):
            if name in values:
                values[name] = tuple(values[name])
        return cls(**values)


def read_report(path: str | Path) -> dict[str, Any]:
    """Metrics from the `report.json` of an evaluation, for `CardInfo.metrics`.

    Raises:
        DataError: When the file is missing or no JSON object.
    """
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"`{path}` must be a readable JSON report: {error}.") from error
    if not isinstance(report, dict):
        raise DataError(f"`{path}` must hold a JSON object; got {type(report).__name__}.")
    metrics = report.get("metrics", report)
    return dict(metrics)


def render_card(pipeline: Any, hashes: Mapping[str, str]) -> str:
    """The text of README.md: YAML front matter for the Hub, then the sections.

    Args:
        pipeline: A pipeline of ours; its `card` is the `CardInfo`.
        hashes: SHA-256 of each file of the folder.
    """
    info: CardInfo = pipeline.card
    bodies = {
        "Tasks": _tasks(),
        "Usage": _usage(),
        "Vocabulary layout": _vocabulary(pipeline),
        "Components": _components(pipeline),
        "Sampler defaults": _sampler(pipeline),
        "Training data": info.data or NOT_MEASURED.replace("measured", "described"),
        "Training": info.training or NOT_MEASURED.replace("measured", "described"),
        "Metrics": _metrics(info.metrics),
        "Limits": info.limits or _limits(pipeline),
        "Licence": f"{info.license}. The licences of the training data are listed above.",
        "Files": _table(
            ("file", "sha256"), [(f"`{name}`", f"`{value}`") for name, value in hashes.items()]
        )
        + "\n\nCheck them with `sha256sum -c SHA256SUMS`; loading does so by itself.",
    }
    summary = info.summary or (
        "One discrete diffusion transformer for text and pictures: the same weights draw pictures,"
        " describe them, answer questions, fill gaps and invent pairs."
    )
    sections = "\n\n".join(f"## {name}\n\n{bodies[name]}" for name in SECTIONS)
    return f"---\n{_front_matter(info)}---\n\n# {info.title}\n\n{summary}\n\n{sections}\n"


def _front_matter(info: CardInfo) -> str:
    entries: dict[str, Any] = {
        "license": info.license,
        "library_name": "diffusers",
        "pipeline_tag": "any-to-any",
        "tags": list(TAGS),
        "language": list(info.language),
    }
    if info.datasets:
        entries["datasets"] = list(info.datasets)
    if info.base_model:
        entries["base_model"] = info.base_model
    if info.base_model_relation:
        entries["base_model_relation"] = info.base_model_relation
    return yaml.safe_dump(entries, sort_keys=False, allow_unicode=True)


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "| " + " | ".join("---" for _ in header) + " |"]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def _tasks() -> str:
    return _table(
        ("task", "pipeline", "known", "written"),
        [
            ("text-to-image", "`UnifiedTextToImagePipeline`", "caption", "picture"),
            ("captioning", "`UnifiedImageToTextPipeline`", "picture", "caption"),
            ("question answering", "`UnifiedImageToTextPipeline`", "picture, question", "answer"),
            ("text, infilling", "`UnifiedTextGenerationPipeline`", "instruction, gaps", "text"),
            ("joint generation", "`UnifiedJointPipeline`", "nothing", "picture and caption"),
            ("inpainting", "`UnifiedInpaintPipeline`", "caption, rest of picture", "holes"),
        ],
    )


_USAGES = (
    (
        "Text to image",
        "UnifiedTextToImagePipeline",
        'pipe("a red apple", generator=torch.Generator().manual_seed(0)).images[0].save("out.png")',
    ),
    (
        "Image to text",
        "UnifiedImageToTextPipeline",
        'print(pipe(image).texts[0], pipe(image, "what is this?").texts[0])',
    ),
    (
        "Text",
        "UnifiedTextGenerationPipeline",
        'print(pipe(template="a red [MASK] on a white background").texts[0])',
    ),
    (
        "Joint",
        "UnifiedJointPipeline",
        "output = pipe(num_samples=4); print(output.texts, output.images)",
    ),
    (
        "Inpainting",
        "UnifiedInpaintPipeline",
        'pipe("a red apple", image, mask_image).images[0].save("inpainted.png")',
    ),
)


def _usage() -> str:
    parts = []
    for title, name, call in _USAGES:
        code = (
            f"import torch\nfrom PIL import Image\nfrom multimodal_dlm.pipelines import {name}\n"
            f'pipe = {name}.from_pretrained("<this repository or folder>")\n{call}'
        )
        parts.append(f"{title}:\n\n```python\n{code}\n```")
    notes = "`image` and `mask_image` are PIL images: `Image.open(path)`; white is masked."
    return "\n\n".join([*parts, notes])


def _vocabulary(pipeline: Any) -> str:
    vocabulary = pipeline.transformer.vocabulary
    segments = sorted(vocabulary.segments, key=lambda part: part.offset)
    ranges = _table(
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
    tables = (ranges, _table(("token", "id", "kind"), tokens))
    return "\n\n".join([text, *tables, _table(("tokenizer", "fingerprint (sha256)"), prints)])


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
    table = _table(("component", "class", "size"), rows)
    return f"{table}\n\nBackbone: {shape}.\n\n{fingerprint}"


def _sampler(pipeline: Any) -> str:
    scheduler = pipeline.scheduler
    rows = [
        (modality, f"`{name}`", value)
        for modality, options in sorted(scheduler.config["modalities"].items())
        for name, value in options.items()
        if value not in (None, {})
    ]
    defaults = (
        "Text-to-image and inpainting: 16 steps, guidance 2.0. Captions: 24 positions, answers: 8,"
        " one step per position, guidance off. Joint: 32 steps, the caption first."
    )
    table = _table(("modality", "option", "value"), rows)
    return f"`{type(scheduler).__name__}`. {defaults}\n\n{table}"


def _metrics(metrics: Mapping[str, Any]) -> str:
    if not metrics:
        return f"Quality, speed and likelihood: {NOT_MEASURED}."
    measured = {n: m for n, m in metrics.items() if isinstance(m, Mapping) and "baselines" in m}
    others = _flatten({name: value for name, value in metrics.items() if name not in measured})
    tables = [_table(("metric", "value"), others)] if others else []
    if measured:
        rows = [(name, *_measured(metric)) for name, metric in measured.items()]
        head = ("metric", "value", "95 % interval", "n", "baselines")
        tables.append(_table(head, rows))
    return "\n\n".join(tables)


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


def _limits(pipeline: Any) -> str:
    return (
        f"Pictures are {pipeline.image_size} x {pipeline.image_size} pixels and texts at most"
        f" {pipeline.processor.layout['max_window']['text']} tokens. What lies outside the training"
        f" data is not drawn or described reliably. Bias and safety: {NOT_MEASURED}."
    )
