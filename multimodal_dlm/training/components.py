"""Config -> the parts of a run. A new trainable component is one builder here.

The loop receives a model, an objective, batches and an export function, and knows no more.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from multimodal_dlm.datasets.manifest import Manifest, open_manifest
from multimodal_dlm.datasets.mixture import MixtureReader
from multimodal_dlm.datasets.tokenizing import TokenizerFolders, TokenizerPair
from multimodal_dlm.errors import CheckpointError, ConfigError, DataError
from multimodal_dlm.layout import make_layout
from multimodal_dlm.models.presets import get_preset
from multimodal_dlm.models.transformer import UnifiedTransformerModel
from multimodal_dlm.pipelines.model_card import CARD_NAME, CardInfo
from multimodal_dlm.pipelines.text_to_image import UnifiedTextToImagePipeline
from multimodal_dlm.processing import UnifiedProcessor
from multimodal_dlm.schedulers import ConfidenceScheduler
from multimodal_dlm.tasks import TASKS
from multimodal_dlm.tokenizers.image import ImageTokenizer
from multimodal_dlm.tokenizers.text import load_text_tokenizer, text_fingerprint
from multimodal_dlm.training.averaging import average, check_same
from multimodal_dlm.training.batches import BatchSource, CanvasBatches, PixelBatches
from multimodal_dlm.training.config import ModelConfig, TrainConfig, plain
from multimodal_dlm.training.initialisation import start_from_features
from multimodal_dlm.training.lora import add_lora, has_lora, merged_copy, save_lora
from multimodal_dlm.training.objectives import OBJECTIVES, build_objective
from multimodal_dlm.training.objectives.base import Objective
from multimodal_dlm.training.randomness import EVALUATION_SEED
from multimodal_dlm.training.tokenized_data import (
    BlankRows,
    TokenizedRows,
    check_lengths,
    check_tokenized,
    tokenized_manifest,
)
from multimodal_dlm.vocabulary import UnifiedVocabulary


@dataclass(frozen=True)
class Job:
    """What the loop needs.

    Args:
        model: Trained component, float32, on the CPU.
        objective: What is minimised.
        source: Batches by step.
        held_out: Its batch 0 is what the run is evaluated on; None without evaluation.
        manifest: Data of the run.
        export: (model with the weights to save, folder) -> None.
        components: Everything a callback may need, by name.
    """

    model: nn.Module
    objective: Objective
    source: BatchSource
    manifest: Manifest
    export: Callable[[nn.Module, Path], None]
    components: Mapping[str, Any] = field(default_factory=dict)
    held_out: BatchSource | None = None


@dataclass(frozen=True)
class Portion:
    """What is read of a manifest.

    Args:
        split: Split.
        seed: Of the order.
        batch_size: Rows of the global batch.
        rank: This process.
        world_size: All processes.
        max_skipped: Unusable samples that may be skipped, a share or a number.
    """

    split: str
    seed: int
    batch_size: int
    rank: int
    world_size: int
    max_skipped: float = 0.0

    def read(self, manifest: Manifest) -> MixtureReader:
        """The reader of a manifest."""
        return MixtureReader(manifest, **asdict(self))


def build_job(
    config: TrainConfig,
    *,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | None = None,
    is_dry_run: bool = False,
) -> Job:
    """Build the parts of a run.

    Args:
        config: The run.
        rank: This process.
        world_size: All processes.
        device: Where pictures are encoded; None for the CPU.
        is_dry_run: Do not tokenize raw shards.

    Raises:
        ConfigError: When the parts do not fit each other.
    """
    _check_parts(config)
    manifest = open_manifest(config.data.manifest, config.data.data_root)
    portion = Portion(
        config.data.split,
        config.seed,
        config.data.batch_size,
        rank,
        world_size,
        config.data.max_skipped,
    )
    held_out = _held_out(config, rank, world_size)
    objective = build_objective(config.objective.name, **config.objective.options)
    if config.model.component == "image_tokenizer":
        job = _image_tokenizer_job(config, manifest, portion, held_out, objective)
    else:
        job = _transformer_job(config, manifest, portion, held_out, objective, device, is_dry_run)
    freeze(job.model, config.model.frozen)
    return job


def freeze(model: nn.Module, names: Sequence[str]) -> None:
    """Keep modules as they are: their parameters get no gradients.

    Args:
        model: Component.
        names: Names of modules, as in `named_modules`.

    Raises:
        ConfigError: When a name is no module's, or nothing is left to train.
    """
    modules = dict(model.named_modules())
    for name in names:
        if not name or name not in modules:
            children = [f"`{child}`" for child, _ in model.named_children()]
            raise ConfigError(
                f"`model.frozen` must name modules of the component; got `{name}`. It has"
                f" {', '.join(children)} and what is in them."
            )
        modules[name].requires_grad_(False)
    if names and not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(
            f"`model.frozen` must leave something to train; got {list(names)}. Name fewer modules."
        )


def _check_parts(config: TrainConfig) -> None:
    """Refuse an objective or a setting that the component has no use for."""
    component, name = config.model.component, config.objective.name
    if name in OBJECTIVES and OBJECTIVES[name].component != component:
        fitting = [f"`{key}`" for key, kind in OBJECTIVES.items() if kind.component == component]
        raise ConfigError(
            f"`objective.name` must fit `model.component` `{component}`; got `{name}`. Use"
            f" {' or '.join(fitting)}."
        )
    for setting in ("gradient_checkpointing", "compile_blocks"):
        if getattr(config, setting) and component != "transformer":
            raise ConfigError(
                f"`{setting}` needs the repeated blocks of `model.component` `transformer`; got"
                f" `{component}`. Leave it out."
            )


def _held_out(config: TrainConfig, rank: int, world_size: int) -> Portion | None:
    """The rows of the evaluation are its batch 0; None without evaluation."""
    evaluation = config.evaluation
    if not evaluation.every_steps:
        return None
    if evaluation.num_rows % world_size:
        raise ConfigError(
            "`evaluation.num_rows` must be a multiple of the number of processes; got"
            f" {evaluation.num_rows} and {world_size}."
        )
    return Portion(
        evaluation.split,
        EVALUATION_SEED,
        evaluation.num_rows,
        rank,
        world_size,
        config.data.max_skipped,
    )


def build_vocabulary(tokenizer: Any, image_tokenizer: ImageTokenizer) -> UnifiedVocabulary:
    """The unified vocabulary of a text and an image tokenizer."""
    levels = [(f"image.{i}", size) for i, size in enumerate(image_tokenizer.codebook_sizes)]
    return UnifiedVocabulary.build(
        {"text": [("text", len(tokenizer))], "image": levels},
        {"eos": ("text", 0), "fill": ("text", 1)},
        {"text": text_fingerprint(tokenizer), "image": image_tokenizer.fingerprint},
    )


def _transformer_job(
    config: TrainConfig,
    manifest: Manifest,
    portion: Portion,
    held_out: Portion | None,
    objective: Objective,
    device: torch.device | None,
    is_dry_run: bool,
) -> Job:
    given = config.tokenizers
    folders = TokenizerFolders.find(given.text, given.image, pipeline=config.model.init_from)
    tokenizer = load_text_tokenizer(folders.text)
    image_tokenizer: Any = ImageTokenizer.from_pretrained(folders.image)
    image_tokenizer.eval().requires_grad_(False)
    vocabulary = build_vocabulary(tokenizer, image_tokenizer)
    height, width = image_tokenizer.grid_size
    levels = len(image_tokenizer.codebook_sizes)
    layout = make_layout(
        max_text=config.model.max_text,
        num_image_tokens=height * width * levels,
        unconditional_text=config.model.unconditional_text,
        condition_attention=config.model.condition_attention,
        block_lengths=config.model.block_lengths,
    )
    model = _build_transformer(config, vocabulary, layout)
    if config.model.init_from is None:
        start_from_features(model, "image", image_tokenizer.code_features(), seed=config.seed)
    if config.lora.rank:
        add_lora(model, config.lora, seed=config.seed)
    processor = UnifiedProcessor(
        vocabulary=vocabulary,
        layout=model.layout or layout,
        tokenizer=tokenizer,
        image_grids=((height, width),) * levels,
    )
    pair = TokenizerPair.of(tokenizer, image_tokenizer)
    check_tokenized(manifest, pair.codebooks)
    if not is_dry_run:
        image_tokenizer.to(device or torch.device("cpu"))

    def batches(portion: Portion) -> CanvasBatches:
        if is_dry_run:
            reader = portion.read(manifest)
            row_of = BlankRows(reader, pair.codebooks)
        else:
            folder = Path(config.data.cache_dir)
            may_skip = portion.max_skipped > 0
            made = tokenized_manifest(manifest, portion.split, pair, folder, may_skip=may_skip)
            check_lengths(made, portion.split, processor.layout["max_window"]["text"])
            reader = portion.read(made)
            row_of = TokenizedRows(reader)
        return CanvasBatches(
            reader,
            row_of,
            processor,
            micro_batch_size=config.data.micro_batch_size,
            pack_length=config.data.pack_length,
        )

    tasks = trained_tasks(manifest, config.model.init_from)
    components = {
        "tokenizer": tokenizer,
        "image_tokenizer": image_tokenizer,
        "processor": processor,
        "scheduler": ConfidenceScheduler(),
    }

    average_weights = _averaging(config, model)

    def export(trained: Any, path: Path) -> None:
        if has_lora(trained) and not config.lora.merge:
            save_lora(trained, path)
            return
        transformer = merged_copy(trained)
        average_weights(transformer)
        UnifiedTextToImagePipeline(
            transformer=transformer.to(getattr(torch, config.export.dtype)).eval(),
            scheduler=components["scheduler"],
            tokenizer=tokenizer,
            image_tokenizer=image_tokenizer,
        ).save_pretrained(path, card=CardInfo(tasks=tasks))

    return Job(
        model,
        objective,
        batches(portion),
        manifest,
        export,
        components,
        batches(held_out) if held_out else None,
    )


def trained_tasks(manifest: Manifest, init_from: str | None = None) -> tuple[str, ...]:
    """Tasks that a model knows after a run, for its card; none where that is not known.

    Args:
        manifest: Data of the run.
        init_from: Pipeline the run started from, whose tasks, as its card has them, count too.
    """
    found = {task for source in manifest.sources.values() for task, n in source.tasks.items() if n}
    if init_from is not None:
        known = CardInfo.load(init_from).tasks if (Path(init_from) / CARD_NAME).is_file() else ()
        if not known:
            return ()
        found |= set(known)
    return tuple(task for task in TASKS if task in found)


def _build_transformer(
    config: TrainConfig, vocabulary: UnifiedVocabulary, layout: Mapping[str, Any]
) -> UnifiedTransformerModel:
    """New weights from the run's seed, or those of a saved backbone over the same vocabulary."""
    if config.model.init_from is not None:
        folder = backbone_folder("model.init_from", config.model.init_from)
        model = UnifiedTransformerModel.from_pretrained(folder)
        if model.vocabulary.fingerprint != vocabulary.fingerprint:
            raise CheckpointError(
                "`model.init_from` must have been trained with the run's tokenizers;"
                f" `{config.model.init_from}` has another vocabulary. Set `tokenizers` to those"
                " saved with it."
            )
        _check_start(config.model, model.config, model.layout)
        return model.float()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        options = {**get_preset(config.model.preset), **config.model.options}
        try:
            return UnifiedTransformerModel(
                vocabulary=vocabulary.to_dict(), layout=dict(layout), **options
            )
        except TypeError as error:
            raise ConfigError(f"`model.options`: {error}.") from error


def backbone_folder(name: str, path: str) -> Path:
    """The folder of a saved backbone.

    Args:
        name: Of the setting, for the error.
        path: That folder, or its pipeline's.

    Raises:
        ConfigError: When there is no such folder.
    """
    folder = _folder(name, path)
    inner = folder / "transformer"
    return inner if inner.is_dir() else folder


def _averaging(
    config: TrainConfig, model: UnifiedTransformerModel
) -> Callable[[UnifiedTransformerModel], None]:
    """What `export` does to the weights that are saved; what it needs is checked now."""
    path, share = config.export.average_with, config.export.average_share
    if path is None:
        return lambda transformer: None
    folder = backbone_folder("export.average_with", path)
    if Path(path).resolve() == config.export_folder.resolve():
        raise ConfigError(
            f"`export.average_with` must not be the folder of the export; got `{path}`, which this"
            " run would overwrite. Set another `export.folder`."
        )
    saved: Any = UnifiedTransformerModel.load_config(folder)
    with torch.device("meta"):  # Its config with the defaults of entries that came later.
        other: Any = UnifiedTransformerModel.from_config(saved)
    check_same(model.config, other.config)

    def replace_weights(transformer: UnifiedTransformerModel) -> None:
        other = UnifiedTransformerModel.from_pretrained(folder)
        average(transformer, other.float(), share)

    return replace_weights


def _check_start(
    model: ModelConfig, found: Mapping[str, Any], layout: Mapping[str, Any] | None
) -> None:
    """Refuse options that differ from a loaded component's: they would be ignored.

    Args:
        model: What the run asks for; defaults ask for nothing.
        found: Config of the component in `init_from`.
        layout: Its layout, if it has one.
    """
    default = ModelConfig()
    asked = [(f"options.{name}", value, found.get(name)) for name, value in model.options.items()]
    if model.preset != default.preset:
        sizes = get_preset(model.preset).items()
        asked += [
            (f"preset` (`{name}`) of `{model.preset}", value, found.get(name))
            for name, value in sizes
            if name not in model.options
        ]
    if layout is not None:
        own = {
            "max_text": layout["max_window"]["text"],
            "unconditional_text": layout["unconditional_window"]["text"],
            "condition_attention": layout["condition_attention"],
            "block_lengths": layout.get("block_lengths", {}).get("text", []),
        }
        asked += [
            (name, getattr(model, name), value)
            for name, value in own.items()
            if getattr(model, name) != getattr(default, name)
        ]
    for name, value, has in asked:
        if plain(value) != plain(has):
            raise ConfigError(
                f"`model.{name}` must be that of the component in `model.init_from`; got"
                f" {plain(value)} and {plain(has)} in `{model.init_from}`. Leave it out, or train"
                " new weights without `init_from`."
            )


def _image_tokenizer_job(
    config: TrainConfig,
    manifest: Manifest,
    portion: Portion,
    held_out: Portion | None,
    objective: Objective,
) -> Job:
    for name, source in manifest.sources.items():
        if source.codebooks is not None:
            raise DataError(
                f"An image tokenizer must be trained on pictures; source `{name}` is pre-tokenized"
                " and has none. Give its raw manifest as `data.manifest`."
            )
    if config.model.init_from is not None:
        model = ImageTokenizer.from_pretrained(_folder("model.init_from", config.model.init_from))
        _check_start(config.model, model.config, None)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            try:
                model = ImageTokenizer(**config.model.options)
            except TypeError as error:
                raise ConfigError(f"`model.options`: {error}.") from error

    def export(trained: Any, path: Path) -> None:
        tokenizer: Any = ImageTokenizer.from_config(trained.config)
        tokenizer.load_state_dict(trained.state_dict())
        tokenizer.mark_released()
        tokenizer.save_pretrained(path)

    def batches(portion: Portion) -> PixelBatches:
        return PixelBatches(portion.read(manifest), micro_batch_size=config.data.micro_batch_size)

    held = batches(held_out) if held_out else None
    return Job(model, objective, batches(portion), manifest, export, {}, held)


def _folder(name: str, path: str) -> Path:
    if not Path(path).is_dir():
        raise ConfigError(f"`{name}` must be a folder; there is no `{path}`. Give its path.")
    return Path(path)
