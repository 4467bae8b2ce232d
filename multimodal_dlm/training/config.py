"""What a training run is made of, as frozen dataclasses; importable without torch.

Every field can be set in YAML and overridden on the command line (`--optimizer.lr 1e-3`). Field
docstrings are the command line's help.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from multimodal_dlm.errors import ConfigError


@dataclass(frozen=True)
class ModelConfig:
    """The component that is trained.

    Args:
        component: `transformer` (the backbone) or `image_tokenizer`.
        preset: Named size of the backbone, see `multimodal_dlm.models.presets`.
        options: Constructor arguments that override the preset, or the whole image tokenizer.
        init_from: Folder of a saved component (or pipeline) to start from; None for new weights.
            Other options than the defaults must then be those of what is loaded.
        frozen: Names of the component's modules that keep their weights, e.g. `[encoder]` of an FSQ
            tokenizer: a better decoder for the same codes.
        max_text: Longest text window in tokens, `<eos>` included.
        unconditional_text: Masks that stand for "no caption".
        condition_attention: `prefix` (the condition never sees what is generated), `full`, or
            `causal` (each token sees those before it; for `autoregressive`).
        block_lengths: Lengths of the blocks that answers are written in; training draws among them,
            the first is the default of generation. None for answers in one piece.
    """

    component: Literal["transformer", "image_tokenizer"] = "transformer"
    preset: str = "small"
    options: dict[str, Any] = field(default_factory=dict)
    init_from: str | None = None
    frozen: tuple[str, ...] = ()
    max_text: int = 32
    unconditional_text: int = 8
    condition_attention: Literal["prefix", "full", "causal"] = "prefix"
    block_lengths: tuple[int, ...] = ()


@dataclass(frozen=True)
class LoRAConfig:
    """Fine-tuning by low-rank adapters (Hu et al. 2021, arXiv 2106.09685).

    Args:
        rank: Rank of the adapters; 0 trains all weights.
        alpha: The adapters' product is scaled by alpha / rank; None for alpha = rank.
        target_modules: Names of the linear layers that get one; never `head` or `embed_tokens`.
        merge: Export a whole pipeline with the adapters added in, instead of the adapters alone.
    """

    rank: int = 0
    alpha: int | None = None
    target_modules: tuple[str, ...] = ("to_qkv", "to_out", "gate_up_proj", "down_proj")
    merge: bool = False


@dataclass(frozen=True)
class TokenizersConfig:
    """Tokenizer folders; None for those of the pipeline `model.init_from`, if it is one.

    Args:
        text: Folder of the text tokenizer; without a pipeline `tokenizers/text`.
        image: Folder of the image tokenizer; without a pipeline `tokenizers/image`.
    """

    text: str | None = None
    image: str | None = None


@dataclass(frozen=True)
class DataConfig:
    """What is read, and in what portions.

    Args:
        manifest: Mixture manifest (YAML).
        data_root: Folder that holds the datasets' folders; None for the manifest's own.
        split: Split to train on.
        batch_size: Rows of the global batch, over all processes.
        micro_batch_size: Rows of one forward pass; rows of like length share one. None for all.
        pack_length: Tokens of a packed row: short rows share the rows of a forward pass, with the
            same losses and gradients. None leaves every row alone.
        cache_dir: Raw sources are pre-tokenized into this folder, once for each pair of tokenizers.
        num_workers: Background processes that prepare batches; the order does not depend on it.
        max_skipped: Unusable samples of each source that are skipped as rows of weight 0: below 1 a
            share of its samples, else a number. 0 ends the run at the first one.
    """

    manifest: str = "datasets/sample.yaml"
    data_root: str | None = None
    split: str = "train"
    batch_size: int = 64
    micro_batch_size: int | None = None
    pack_length: int | None = None
    cache_dir: str = "runs/cache"
    num_workers: int = 0
    max_skipped: float = 0.0


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is minimised.

    Args:
        name: `masked_diffusion`, `autoregressive` or `reconstruction`.
        options: Arguments of the objective, such as `loss_weights` and `hole_share`.
    """

    name: str = "masked_diffusion"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101), or Muon for the hidden matrices.

    Args:
        name: `adamw`, or `muon`: the matrices of the backbone's blocks by orthogonalized momentum
            (Liu et al. 2025, arXiv 2502.16982), everything else by AdamW.
        lr: Peak learning rate.
        betas: Decay of the two moments.
        eps: Added to the denominator.
        weight_decay: On matrices only: no norm, bias or modulation table is decayed.
        max_grad_norm: Gradients are scaled down to this global norm; .inf for no clipping.
        momentum: Of Muon.
    """

    name: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    weight_decay: float = 0.03
    max_grad_norm: float = 1.0
    momentum: float = 0.95


@dataclass(frozen=True)
class LRScheduleConfig:
    """Linear warm-up, then a half cosine down to a share of the peak.

    Args:
        num_warmup_steps: Steps of the warm-up.
        final_share: Learning rate of the last step over the peak.
    """

    num_warmup_steps: int = 500
    final_share: float = 0.02


@dataclass(frozen=True)
class StabilityConfig:
    """Steps without a finite loss and gradient are skipped, but not too many; spikes are reported.

    Args:
        max_skipped_in_a_row: More skipped steps in a row end the run; 0 ends it at the first.
        max_skipped_share: More than this share of the last `window` steps skipped ends the run.
        window: Steps that the running median and spread of loss and gradient norm look back on.
        spike_deviations: Robust standard deviations above the median that make a spike; 0 for none.
    """

    max_skipped_in_a_row: int = 5
    max_skipped_share: float = 0.1
    window: int = 128
    spike_deviations: float = 10.0


@dataclass(frozen=True)
class EvaluationConfig:
    """The objective on held-out rows, at noise levels and masks that never change.

    Args:
        every_steps: Steps between evaluations, and after the last step; 0 for never.
        split: Split that is read.
        num_rows: Rows of the mixture, the same in every run; a multiple of the processes.
        num_levels: Mask counts of each row: one in each of this many equal bands of noise.
    """

    every_steps: int = 0
    split: str = "val"
    num_rows: int = 64
    num_levels: int = 4


@dataclass(frozen=True)
class CheckpointConfig:
    """When the run is saved.

    Args:
        every_steps: Steps between checkpoints; the last step is always saved.
        keep_last: Checkpoints kept.
        best_metric: Value of the evaluation whose best step is saved and kept besides; None to
            keep none.
        best_mode: Whether the lowest value is best, or the highest.
    """

    every_steps: int = 500
    keep_last: int = 2
    best_metric: str | None = "eval/loss"
    best_mode: Literal["min", "max"] = "min"


@dataclass(frozen=True)
class ExportConfig:
    """What a finished run leaves for users.

    Args:
        folder: Where the component or pipeline is saved; None for `<output_dir>/pipeline`.
        dtype: Of the saved backbone.
        use_ema: Save the averaged weights.
        use_best: Save those of the best checkpoint instead of the last step's.
        average_with: Pipeline whose backbone is averaged with the run's, such as the one before a
            stage: a stage that is about one task takes something from the others, and the mean
            often keeps most of both (Wortsman et al. 2022, arXiv 2109.01903, section 3). None for
            the run's own weights. To try another share, run the finished run's command again.
        average_share: Of the run's own weights in that mean, in [0, 1].
    """

    folder: str | None = None
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    use_ema: bool = True
    use_best: bool = False
    average_with: str | None = None
    average_share: float = 0.5


@dataclass(frozen=True)
class TrainConfig:
    """A training run. To resume it, run the same command again.

    Args:
        output_dir: Folder of the run: config, environment, log, metrics, checkpoints, export.
        num_train_steps: Optimizer steps.
        seed: Of initial weights, data order and every draw.
        model: The component that is trained.
        lora: Adapters trained in place of the component's own weights.
        tokenizers: Tokenizer folders.
        data: What is read.
        objective: What is minimised.
        optimizer: AdamW or Muon.
        lr_schedule: Warm-up and cosine.
        checkpoint: When the run is saved.
        evaluation: Held-out bounds during the run.
        stability: Skipped steps and spikes.
        export: What a finished run leaves.
        ema_decay: Decay of the averaged weights, warmed up; 0 for none.
        mixed_precision: `bf16` autocast, `no` (float32), or `auto`: what the run began with, else
            `bf16` where the device has instructions for it (`multimodal_dlm.precision`). In YAML
            write 'no' in quotes.
        sharding: How several processes hold the model: `none` (a copy each), `zero2` or `fsdp`
            (shards, see `multimodal_dlm.training.sharding`), or `auto`: what the accelerate config
            says, else `none`.
        log_every_steps: Steps between lines of the log.
        sample_every_steps: Steps between calls of the callbacks (sample sheets); 0 for never.
        grad_norms_every_steps: Steps between measurements of each modality's own gradient norm,
            one more forward and backward for each; 0 for never.
        gradient_checkpointing: Recompute activations in backward to save memory.
        compile_blocks: Compile the repeated blocks.
        allow_changes: Resume although the config changed, such as to lengthen a run.
    """

    output_dir: str
    num_train_steps: int
    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    tokenizers: TokenizersConfig = field(default_factory=TokenizersConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lr_schedule: LRScheduleConfig = field(default_factory=LRScheduleConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    stability: StabilityConfig = field(default_factory=StabilityConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    ema_decay: float = 0.999
    mixed_precision: Literal["auto", "bf16", "no"] = "auto"
    sharding: Literal["auto", "none", "zero2", "fsdp"] = "auto"
    log_every_steps: int = 20
    sample_every_steps: int = 0
    grad_norms_every_steps: int = 100
    gradient_checkpointing: bool = False
    compile_blocks: bool = False
    allow_changes: bool = False

    def __post_init__(self) -> None:
        _at_least("num_train_steps", self.num_train_steps, 1)
        _at_least("data.batch_size", self.data.batch_size, 1)
        _at_least("log_every_steps", self.log_every_steps, 1)
        _at_least("sample_every_steps", self.sample_every_steps, 0)
        _at_least("checkpoint.every_steps", self.checkpoint.every_steps, 1)
        _at_least("checkpoint.keep_last", self.checkpoint.keep_last, 1)
        _at_least("seed", self.seed, 0)
        _at_least("grad_norms_every_steps", self.grad_norms_every_steps, 0)
        _at_least("evaluation.every_steps", self.evaluation.every_steps, 0)
        _at_least("evaluation.num_rows", self.evaluation.num_rows, 1)
        _at_least("evaluation.num_levels", self.evaluation.num_levels, 1)
        _at_least("stability.max_skipped_in_a_row", self.stability.max_skipped_in_a_row, 0)
        _at_least("stability.window", self.stability.window, 1)
        if not 0 <= self.data.max_skipped < float("inf"):
            raise ConfigError(
                f"`data.max_skipped` must be a share or a number of samples; got"
                f" {self.data.max_skipped}. Use 0.001 for one in a thousand."
            )
        if self.data.micro_batch_size is not None:
            _at_least("data.micro_batch_size", self.data.micro_batch_size, 1)
        if self.data.pack_length is not None:
            _at_least("data.pack_length", self.data.pack_length, 1)
        self._check_export()
        _at_least("lora.rank", self.lora.rank, 0)
        if self.lora.rank and (
            self.model.init_from is None or self.model.component != "transformer"
        ):
            raise ConfigError(
                f"`lora.rank` above 0 needs a trained backbone in `model.init_from`; got rank"
                f" {self.lora.rank}, `model.component` {self.model.component} and `init_from`"
                f" {self.model.init_from}. Give the folder of a pipeline."
            )
        if not 0.0 <= self.ema_decay < 1.0:
            raise ConfigError(f"`ema_decay` must lie in [0, 1); got {self.ema_decay}. Use 0.999.")
        if self.optimizer.lr <= 0:
            raise ConfigError(f"`optimizer.lr` must be positive; got {self.optimizer.lr}.")
        _check_optimizer(self.optimizer)
        _at_least("lr_schedule.num_warmup_steps", self.lr_schedule.num_warmup_steps, 0)
        _share("lr_schedule.final_share", self.lr_schedule.final_share, "Use 0.02.")
        share = self.stability.max_skipped_share
        _share("stability.max_skipped_share", share, "Use 0.1.")
        if not self.stability.spike_deviations >= 0:
            raise ConfigError(
                "`stability.spike_deviations` must not be negative; got"
                f" {self.stability.spike_deviations}. Use 0 for none."
            )

    def _check_export(self) -> None:
        if self.export.use_best and not (
            self.evaluation.every_steps and self.checkpoint.best_metric
        ):
            raise ConfigError(
                "`export.use_best` needs `evaluation.every_steps` above 0 and a"
                f" `checkpoint.best_metric`; got {self.evaluation.every_steps} and"
                f" {self.checkpoint.best_metric}. Set both or export the last step."
            )
        _share("export.average_share", self.export.average_share, "Use 0.5.")
        if self.export.average_with is not None and self.model.component != "transformer":
            raise ConfigError(
                "`export.average_with` needs `model.component` `transformer`; got"
                f" `{self.model.component}`. Leave it out."
            )
        if self.export.average_with is not None and self.lora.rank and not self.lora.merge:
            raise ConfigError(
                "`export.average_with` needs whole weights to average; got `lora.rank`"
                f" {self.lora.rank} and `lora.merge` false. Set `lora.merge`."
            )

    @property
    def export_folder(self) -> Path:
        """Where a finished run is saved."""
        return Path(self.export.folder or Path(self.output_dir) / "pipeline")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON and YAML values."""
        return plain(dataclasses.asdict(self))


# Fields that set the order of the data: no run that goes on may change them.
FIXED_FIELDS = ("data.batch_size", "data.split", "seed")

# Fields that may change between a checkpoint and the run that continues it.
RESUMABLE_CHANGES = (
    "allow_changes",
    "checkpoint.every_steps",
    "checkpoint.keep_last",
    "compile_blocks",
    "data.cache_dir",
    "data.data_root",
    "data.micro_batch_size",
    "data.num_workers",
    "data.pack_length",
    "export.average_share",
    "export.average_with",
    "export.dtype",
    "export.folder",
    "export.use_best",
    "export.use_ema",
    "grad_norms_every_steps",
    "gradient_checkpointing",
    "lora.merge",
    "log_every_steps",
    "output_dir",
    "sample_every_steps",
    "sharding",
)


def config_changes(
    old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = ""
) -> dict[str, tuple[Any, Any]]:
    """Dotted names whose values differ, with both values, resumable fields left out."""
    changes: dict[str, tuple[Any, Any]] = {}
    for name in sorted(set(old) | set(new)):
        path = f"{prefix}{name}"
        left, right = old.get(name), new.get(name)
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            changes |= config_changes(left, right, f"{path}.")
        elif left != right and path not in RESUMABLE_CHANGES:
            changes[path] = (left, right)
    return changes


def with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """A saved config with the defaults of the fields that came after it."""

    def filled(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
        result = {**defaults, **values}
        for name, default in defaults.items():
            if isinstance(default, Mapping) and isinstance(result[name], Mapping):
                result[name] = filled(result[name], default)
        return result

    return filled(config, TrainConfig(output_dir="", num_train_steps=1).to_dict())


def load_train_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a YAML file through jsonargparse, with command line overrides.

    Args:
        path: Config file.
        overrides: Arguments such as `["--optimizer.lr", "1e-3"]`.

    Raises:
        ConfigError: When the file is missing or a field is unknown or of the wrong type.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    if not Path(path).is_file():
        raise ConfigError(f"There is no config `{path}`. Give the path of a YAML file.")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(TrainConfig, None)
    try:
        values = parser.instantiate(parser.parse_args(["--config", str(path), *overrides]))
    except ArgumentError as error:
        raise ConfigError(f"{path}: {error}") from error
    names = {part.name for part in dataclasses.fields(TrainConfig)}
    return TrainConfig(**{name: value for name, value in values.items() if name in names})


def _at_least(name: str, value: int, minimum: int) -> None:
    if value < minimum:
        raise ConfigError(f"`{name}` must be at least {minimum}; got {value}.")


def _share(name: str, value: float, remedy: str) -> None:
    if not 0.0 <= value <= 1.0:
        raise ConfigError(f"`{name}` must lie in [0, 1]; got {value}. {remedy}")


def _check_optimizer(config: OptimizerConfig) -> None:
    """Refuse what would stop, reverse or blow up the steps without a word."""
    if not all(0.0 <= beta < 1.0 for beta in config.betas):
        raise ConfigError(
            f"`optimizer.betas` must lie in [0, 1); got {config.betas}. Use [0.9, 0.98]."
        )
    if not config.eps > 0:
        raise ConfigError(f"`optimizer.eps` must be positive; got {config.eps}. Use 1e-8.")
    if not config.weight_decay >= 0:
        raise ConfigError(
            f"`optimizer.weight_decay` must not be negative; got {config.weight_decay}. Use 0 for"
            " none."
        )
    if not 0.0 <= config.momentum < 1.0:
        raise ConfigError(
            f"`optimizer.momentum` must lie in [0, 1); got {config.momentum}. Use 0.95."
        )
    if not config.max_grad_norm > 0:
        raise ConfigError(
            f"`optimizer.max_grad_norm` must be positive; got {config.max_grad_norm}. Write .inf to"
            " switch clipping off."
        )


def plain(value: Any) -> Any:
    """Tuples become lists, as JSON and YAML would have them."""
    if isinstance(value, Mapping):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return value
