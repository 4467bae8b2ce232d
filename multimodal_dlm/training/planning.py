"""Will a run fit, how fast will it be, and what should change: answered without a device.

A plan counts parameters on the meta device, reads the first batches of the data as the dry run of
training does, and does the arithmetic of `costs`. Speed is a share of the device's peak that the
caller states; the network between devices is not modelled.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from multimodal_dlm.datasets.tokenizing import TokenizerFolders
from multimodal_dlm.errors import ConfigError, DataError
from multimodal_dlm.layout import make_layout
from multimodal_dlm.models.noise_conditioning import NUM_LEVELS
from multimodal_dlm.models.presets import get_preset
from multimodal_dlm.models.transformer import UnifiedTransformerModel
from multimodal_dlm.precision import bf16_support, resolve_precision
from multimodal_dlm.tokenizers.image import ImageTokenizer
from multimodal_dlm.tokenizers.text import load_text_tokenizer
from multimodal_dlm.training.batches import iterate_steps
from multimodal_dlm.training.components import backbone_folder, build_job, build_vocabulary
from multimodal_dlm.training.config import TokenizersConfig, TrainConfig
from multimodal_dlm.training.costs import (
    ADAM_BYTES,
    FLOAT32,
    BackboneShape,
    Work,
    batch_bytes,
    forward_flops,
    state_bytes,
    training_flops,
)
from multimodal_dlm.training.devices import Device
from multimodal_dlm.training.launching import resolve_sharding
from multimodal_dlm.training.objectives.base import Batch

GIB = 2**30
STEPS_READ = 4
SECONDS_A_DAY = 86_400
SHARDINGS = ("none", "zero2", "fsdp")
MOST_DEVICES = 4096


@dataclass(frozen=True)
class StepShape:
    """What the micro-batches of a step look like.

    Args:
        tokens: Tokens of a step without padding, over all devices.
        slots: The same with padding.
        average: A micro-batch of the mean length with the mean number of targets.
        largest: The largest micro-batch with every free token a target.
        is_read: Whether it was counted in the data; else it is the longest row of the layout.
    """

    tokens: float
    slots: float
    average: Work
    largest: Work
    is_read: bool


@dataclass(frozen=True)
class Setting:
    """What a plan may change.

    Args:
        sharding: `none`, `zero2` or `fsdp`.
        checkpointing: Recompute the blocks in backward.
        micro_batch_rows: Rows of a forward on one device.
    """

    sharding: str
    checkpointing: bool
    micro_batch_rows: int


@dataclass(frozen=True)
class Plan:
    """Everything a plan says; see `docs/planning.md` for the formulas.

    Args:
        values: JSON values.
        problems: Why the run cannot work as it stands.
        changes: What would make it work, in words.
    """

    values: dict[str, Any]
    problems: list[str]
    changes: list[str]

    @property
    def is_possible(self) -> bool:
        """Nothing stands against the run."""
        return not self.problems


@dataclass(frozen=True)
class Planner:
    """A run on some devices.

    Args:
        config: The run, its precision resolved.
        device: One device.
        devices: How many train together.
        shape: Backbone.
        step: What a step looks like.
    """

    config: TrainConfig
    device: Device
    devices: int
    shape: BackboneShape
    step: StepShape

    @property
    def rows_per_device(self) -> int:
        """Rows of the global batch that one device sees; rounded up where they do not divide."""
        return math.ceil(self.config.data.batch_size / self.devices)

    @property
    def setting(self) -> Setting:
        """What the config says."""
        rows = min(self.config.data.micro_batch_size or self.rows_per_device, self.rows_per_device)
        sharding = resolve_sharding(self.config.sharding)
        return Setting(sharding, self.config.gradient_checkpointing, rows)

    def memory(self, setting: Setting) -> dict[str, float]:
        """GiB of one device by what they are for, `reserve` and `total` included."""
        config, largest = self.config, self.step.largest
        scale = setting.micro_batch_rows / self.setting.micro_batch_rows
        work = replace(
            largest,
            rows=largest.rows * scale,
            targets=tuple((columns, number * scale) for columns, number in largest.targets),
        )
        state = state_bytes(
            self.shape,
            sharding=setting.sharding,
            devices=self.devices,
            mixed_precision=config.mixed_precision,
            has_ema=config.ema_decay > 0,
        )
        batch = batch_bytes(
            self.shape,
            work,
            mixed_precision=config.mixed_precision,
            sharding=setting.sharding if self.devices > 1 else "none",
            checkpointing=setting.checkpointing,
            has_norm_kernel=self.device.name != "cpu",
        )
        memory = {name: value / GIB for name, value in (state | batch).items()}
        memory["reserve"] = self.device.reserve_gib
        return memory | {"total": sum(memory.values())}

    def fits(self, setting: Setting) -> bool:
        """Whether a setting fits into a device."""
        return self.memory(setting)["total"] <= self.device.memory_gib

    def settings(self) -> Iterator[Setting]:
        """All settings, the least change first: micro-batch, recomputation, sharding."""
        first = self.setting
        later = SHARDINGS[SHARDINGS.index(first.sharding) :]
        for sharding in later if self.devices > 1 else (first.sharding,):
            for checkpointing in (False, True) if not first.checkpointing else (True,):
                rows = first.micro_batch_rows
                while rows >= 1:
                    yield Setting(sharding, checkpointing, rows)
                    rows //= 2

    def problems(self) -> list[str]:
        """Why the run cannot work."""
        config, found = self.config, list[str]()
        for name, rows in (
            ("data.batch_size", config.data.batch_size),
            ("evaluation.num_rows", config.evaluation.num_rows),
        ):
            is_used = name == "data.batch_size" or config.evaluation.every_steps
            if is_used and rows % self.devices:
                better = math.ceil(rows / self.devices) * self.devices
                found.append(
                    f"`{name}` must be divisible by the {self.devices} devices; got {rows}."
                    f" Use {better}."
                )
        memory = self.memory(self.setting)
        if memory["total"] > self.device.memory_gib:
            found.append(
                f"A device must hold {memory['total']:.1f} GiB; {self.device.name} has"
                f" {self.device.memory_gib:g} GiB."
            )
        return found

    def changes(self) -> list[str]:
        """The least changes that make it fit; empty when it fits."""
        if self.fits(self.setting):
            return []
        fitting = next(filter(self.fits, self.settings()), None)
        if fitting is not None:
            return self._differences(fitting)
        smallest = Setting("fsdp", True, 1)
        devices = max(2, self.devices)
        while devices <= MOST_DEVICES:
            larger = replace(self, devices=devices)
            if larger.fits(smallest):
                return [f"use {devices} devices with", *larger._differences(smallest)]
            devices *= 2
        return ["choose a smaller `model.preset` or a device with more memory"]

    def _differences(self, other: Setting) -> list[str]:
        named = {
            "sharding": f"`--sharding {other.sharding}`",
            "checkpointing": "`--gradient_checkpointing true`",
            "micro_batch_rows": f"`--data.micro_batch_size {other.micro_batch_rows}`",
        }
        before, after = asdict(self.setting), asdict(other)
        return [text for name, text in named.items() if before[name] != after[name]]

    def speed(self, utilisation: float, token_budget: float | None) -> dict[str, float]:
        """Tokens a second and days, at a share of the peak."""
        setting, step = self.setting, self.step
        micro_batches = step.slots / step.average.slots
        needed = micro_batches * training_flops(self.shape, step.average)
        done = micro_batches * training_flops(
            self.shape, step.average, checkpointing=setting.checkpointing
        )
        peak = self.devices * self.device.peak_flops(self.config.mixed_precision)
        step_s = done / (peak * utilisation)
        budget = token_budget or step.tokens * self.config.num_train_steps
        forward = micro_batches * forward_flops(self.shape, step.average)
        return {
            "forward_flops_per_token": forward / step.tokens,
            "training_flops_per_token": needed / step.tokens,
            "executed_flops_per_token": done / step.tokens,
            "utilisation": utilisation,
            "step_s": step_s,
            "tokens_per_s": step.tokens / step_s,
            "token_budget": budget,
            "days": budget / step.tokens * step_s / SECONDS_A_DAY,
        }


def plan(
    config: TrainConfig,
    device: Device,
    devices: int,
    *,
    utilisation: float = 0.4,
    token_budget: float | None = None,
) -> Plan:
    """Plan a run of the backbone.

    Args:
        config: The run.
        device: One device.
        devices: How many train together.
        utilisation: Share of the peak rate that is reached, in (0, 1].
        token_budget: Tokens to train on; None for those of the run.

    Raises:
        ConfigError: When an argument is out of range or the run trains an image tokenizer.
    """
    if devices < 1:
        raise ConfigError(f"`devices` must be at least 1; got {devices}.")
    if not 0.0 < utilisation <= 1.0:
        raise ConfigError(f"`utilisation` must lie in (0, 1]; got {utilisation}. Use 0.4.")
    if token_budget is not None and token_budget <= 0:
        raise ConfigError(f"`token_budget` must be positive; got {token_budget}. Use 1e9.")
    component = config.model.component
    if component != "transformer":
        raise ConfigError(
            f"`model.component` must be `transformer` to be planned; got `{component}`. Image"
            " tokenizers are small: try one with `--num_train_steps 10`."
        )
    support = bf16_support(torch.device("cpu")) if device.support is None else device.support
    precision = resolve_precision(config.mixed_precision, support)
    config = replace(config, mixed_precision=precision.value)
    model, columns, longest = _open_backbone(config)
    shape = BackboneShape.of(model)
    step = _read_step(config, devices, columns, longest)
    planner = Planner(config, device, devices, shape, step)
    setting = planner.setting
    values = {
        "device": device.name,
        "devices": devices,
        "num_parameters": shape.parameters,
        "rows_per_step": config.data.batch_size,
        "rows_per_device": planner.rows_per_device,
        "micro_batch_rows": setting.micro_batch_rows,
        "micro_batches": math.ceil(planner.rows_per_device / setting.micro_batch_rows),
        "tokens_per_step": round(step.tokens),
        "padding_share": round(1 - step.tokens / step.slots, 4),
        "tokens_from": "data" if step.is_read else "layout",
        "sharding": setting.sharding,
        "gradient_checkpointing": setting.checkpointing,
        "mixed_precision": precision.value,
        "mixed_precision_reason": precision.reason,
        "memory_gib": planner.memory(setting),
        "device_memory_gib": device.memory_gib,
        "alternatives": [
            {
                "sharding": sharding,
                "gradient_checkpointing": checkpointing,
                "total_gib": planner.memory(other)["total"],
                "fits": planner.fits(other),
            }
            for sharding in (SHARDINGS if devices > 1 else ("none",))
            for checkpointing in (False, True)
            for other in [Setting(sharding, checkpointing, setting.micro_batch_rows)]
        ],
        "checkpoint_gib": _checkpoint_bytes(config, shape) / GIB,
        **planner.speed(utilisation, token_budget),
    }
    problems, changes = planner.problems(), planner.changes()
    values |= {"is_possible": not problems, "problems": problems, "changes": changes}
    return Plan(values, problems, changes)


def _checkpoint_bytes(config: TrainConfig, shape: BackboneShape) -> float:
    """Size of a checkpoint, which the main process holds in memory while it writes."""
    copies = 2 if config.ema_decay > 0 else 1
    return shape.parameters * (copies * FLOAT32 + ADAM_BYTES)


def _open_backbone(config: TrainConfig) -> tuple[Any, dict[str, int], dict[str, int]]:
    """The backbone without memory, columns of each modality, and its longest window."""
    folders = _tokenizer_folders(config)
    tokenizer = load_text_tokenizer(folders.text)
    image_tokenizer: Any = ImageTokenizer.from_pretrained(folders.image)
    vocabulary = build_vocabulary(tokenizer, image_tokenizer)
    height, width = image_tokenizer.grid_size
    num_image_tokens = height * width * len(image_tokenizer.codebook_sizes)
    layout = make_layout(max_text=config.model.max_text, num_image_tokens=num_image_tokens)
    with torch.device("meta"):
        if config.model.init_from is not None:
            start = backbone_folder("model.init_from", config.model.init_from)
            saved: Any = UnifiedTransformerModel.load_config(start)
            model = UnifiedTransformerModel.from_config(saved)
        else:
            options = {**get_preset(config.model.preset), **config.model.options}
            model = UnifiedTransformerModel(
                vocabulary=vocabulary.to_dict(), layout=dict(layout), **options
            )
    columns = {name: vocabulary.num_columns(name) for name in vocabulary.modalities}
    return model, columns, dict(layout["max_window"])


def _read_step(
    config: TrainConfig, devices: int, columns: Mapping[str, int], longest: Mapping[str, int]
) -> StepShape:
    """The first steps of the data, or the longest row where the data is not here."""
    try:
        everything = _first_batches(config, 1)
        is_divided = config.data.batch_size % devices == 0 and devices > 1
        own = _first_batches(_without_evaluation(config), devices) if is_divided else everything
    except DataError:
        return _longest_step(config, devices, columns, longest)
    steps = min(STEPS_READ, config.num_train_steps)
    works = [_whole(batch, list(columns.values())) for batch in own]
    slots = sum(work.slots for work in works) * (devices if is_divided else 1)
    return StepShape(
        tokens=sum(batch.num_tokens for batch in everything) / steps,
        slots=slots / steps,
        average=_average(works),
        largest=max(works, key=lambda work: work.slots),
        is_read=True,
    )


def _first_batches(config: TrainConfig, world_size: int) -> list[Batch]:
    """The first steps of process 0; the data does not depend on the model, so a tiny one serves."""
    tiny = replace(config.model, preset="tiny", options={}, init_from=None)
    folders = _tokenizer_folders(config)
    tokenizers = TokenizersConfig(text=str(folders.text), image=str(folders.image))
    config = replace(config, model=tiny, tokenizers=tokenizers)
    job = build_job(config, world_size=world_size, is_dry_run=True)
    steps = min(STEPS_READ, config.num_train_steps)
    return [part for _, parts in iterate_steps(job.source, 0, steps) for part in parts]


def _tokenizer_folders(config: TrainConfig) -> TokenizerFolders:
    given = config.tokenizers
    return TokenizerFolders.find(given.text, given.image, pipeline=config.model.init_from)


def _without_evaluation(config: TrainConfig) -> TrainConfig:
    return replace(config, evaluation=replace(config.evaluation, every_steps=0))


def _average(works: list[Work]) -> Work:
    """A micro-batch of the mean size: on average half of the free tokens are targets."""
    slots = sum(work.slots for work in works)
    # Attention grows with the square of the length.
    length = sum(work.slots * work.length for work in works) / slots
    free = zip(*(work.targets for work in works), strict=True)
    targets = tuple(
        (part[0][0], sum(number for _, number in part) / len(works) / 2) for part in free
    )
    levels = max(work.levels for work in works)
    return Work(slots / len(works) / length, length, targets, levels)


def _whole(batch: Batch, columns: list[int]) -> Work:
    """A micro-batch as it is, with every free token a target."""
    canvas = batch.inputs
    rows, length = canvas.input_ids.shape
    targets = tuple(
        (size, float((canvas.is_free & (canvas.modality_ids == index)).sum()))
        for index, size in enumerate(columns)
    )
    return Work(rows, length, targets, _most_levels(rows))


def _most_levels(rows: int) -> int:
    """Two noise groups a row, and the level of what is known."""
    return min(NUM_LEVELS, 2 * rows + 1)


def _longest_step(
    config: TrainConfig, devices: int, columns: Mapping[str, int], longest: Mapping[str, int]
) -> StepShape:
    """Every row with every window as long as it may be, and all of it free."""
    rows = math.ceil(config.data.batch_size / devices)
    rows = min(config.data.micro_batch_size or rows, rows)
    length = 2 + sum(longest.values())
    free = tuple((columns[name], float(rows * number)) for name, number in longest.items())
    work = Work(rows, length, free, _most_levels(rows))
    tokens = float(config.data.batch_size * length)
    return StepShape(tokens, tokens, _average([work]), work, False)
