"""What a scheduler knows about one modality: its path through the square and its shaping."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

from multimodal_dlm.diffusion.mask_schedules import MaskSchedule, get_mask_schedule
from multimodal_dlm.errors import ConfigError, unknown_name
from multimodal_dlm.schedulers.commit_rules import CommitRule, get_commit_rule
from multimodal_dlm.schedulers.step_plan import check_profile

TIME_TOLERANCE = 1e-9  # Times are float64 on the host; anything closer is the same time.


@dataclass(frozen=True)
class ModalitySettings:
    """Options of one modality, all with defaults; stored as one entry of `config.modalities`.

    Args:
        mask_schedule: Name of alpha(t): `linear`, `cosine`, `polynomial` or `geometric`.
        mask_schedule_options: Keyword options of that mask schedule.
        step_profile: Measured information profile, nats a token at evenly spaced shares of known
            tokens; the counts of a window then come from `step_plan.plan_steps` instead of the
            mask schedule. None for the mask schedule.
        start: Time in (0, 1] at which the first token may be committed.
        stop: Time in [0, start) at which the last token has been committed.
        temperature: Divides the logits before a token is drawn; 0 takes the most likely token.
        choice_temperature: Weight of the Gumbel noise on the confidence; it shrinks with the time
            left (confidence-type schedulers only).
        top_k: Draw among the k most likely columns; None for all.
        top_p: Draw among the most likely columns that together hold this probability; None for all.
        commit_rule: Name of the rule that commits sure tokens ahead of the plan: `threshold`,
            `factor`, `entropy_bound`, `stability` or `early_exit`; None follows the plan alone
            (confidence-type schedulers only).
        commit_rule_options: Keyword options of that rule.
        eos_column: Column that ends the content of a window; None for no length rule.
        fill_column: Column that fills a window after its end; None for no length rule.

    Raises:
        ConfigError: When an option is out of range or contradicts another.
    """

    mask_schedule: str = "linear"
    mask_schedule_options: Mapping[str, Any] = field(default_factory=dict)
    step_profile: Sequence[float] | None = None
    start: float = 1.0
    stop: float = 0.0
    temperature: float = 0.0
    choice_temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    commit_rule: str | None = None
    commit_rule_options: Mapping[str, Any] = field(default_factory=dict)
    eos_column: int | None = None
    fill_column: int | None = None

    def __post_init__(self) -> None:
        for name in ("mask_schedule_options", "commit_rule_options"):
            if not isinstance(getattr(self, name), Mapping):
                raise ConfigError(
                    f"`{name}` must be a dictionary of options; got {getattr(self, name)!r}."
                    " Use {} for none."
                )
        self.alpha_schedule  # noqa: B018 (an unknown name must fail here, not at the first step)
        self.rule  # noqa: B018
        if self.step_profile is not None:
            check_profile(self.step_profile)
        if not 0.0 <= self.stop < self.start <= 1.0:
            raise ConfigError(
                "`start` and `stop` must satisfy 0 <= stop < start <= 1; got start"
                f" {self.start} and stop {self.stop}. Time runs from 1 (masked) to 0 (clean)."
            )
        for name in ("temperature", "choice_temperature"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0.0):
                raise ConfigError(
                    f"`{name}` must be a finite number, 0 or more; got {value}. Use 0 for none."
                )
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"`top_k` must be at least 1; got {self.top_k}. Use None for all.")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"`top_p` must be in (0, 1]; got {self.top_p}. Use None for all.")
        self._check_length_rule()

    def _check_length_rule(self) -> None:
        eos, fill = self.eos_column, self.fill_column
        if (eos is None) != (fill is None):
            raise ConfigError(
                "`eos_column` and `fill_column` must be given together; got"
                f" {eos} and {fill}. Use None for both to switch the length rule off."
            )
        if eos is not None and fill is not None and (eos == fill or min(eos, fill) < 0):
            raise ConfigError(
                "`eos_column` and `fill_column` must be two different columns, 0 or more; got"
                f" {eos} and {fill}."
            )

    @cached_property
    def alpha_schedule(self) -> MaskSchedule:
        """The mask schedule these options name."""
        return get_mask_schedule(self.mask_schedule, **self.mask_schedule_options)

    @cached_property
    def rule(self) -> CommitRule | None:
        """The commit rule these options name."""
        if self.commit_rule is None:
            if self.commit_rule_options:
                raise ConfigError(
                    "`commit_rule_options` needs a `commit_rule`; got"
                    f" {dict(self.commit_rule_options)} and None. Name the rule."
                )
            return None
        return get_commit_rule(self.commit_rule, **self.commit_rule_options)

    def between(self, start: float | None, stop: float | None) -> "ModalitySettings":
        """The same settings on another time window; None keeps an end."""
        if start is None and stop is None:
            return self
        return replace(
            self,
            start=self.start if start is None else start,
            stop=self.stop if stop is None else stop,
        )

    def local_time(self, t: float) -> float:
        """Time of this modality at global time t: clip((t - stop) / (start - stop), 0, 1)."""
        return min(1.0, max(0.0, (t - self.stop) / (self.start - self.stop)))

    def masked_share(self, t: float) -> float:
        """Share 1 - alpha of this modality that is still masked at global time t, in [0, 1]."""
        if t not in self._masked_shares:
            local = self.local_time(t)
            share = (
                0.0 if local <= TIME_TOLERANCE else 1.0 - float(self.alpha_schedule.alpha(local))
            )
            self._masked_shares[t] = share
        return self._masked_shares[t]

    @cached_property
    def _masked_shares(self) -> dict[float, float]:
        return {}

    def to_options(self) -> dict[str, Any]:
        """All options as JSON values."""
        options = {part.name: getattr(self, part.name) for part in fields(self)}
        profile = self.step_profile
        return {
            **options,
            "step_profile": None if profile is None else [float(value) for value in profile],
            "mask_schedule_options": dict(self.mask_schedule_options),
            "commit_rule_options": dict(self.commit_rule_options),
        }

    @classmethod
    def from_options(cls, modality: str, options: Any) -> "ModalitySettings":
        """Read one entry of `config.modalities`; options left out take their defaults.

        Raises:
            ConfigError: When an option is unknown, out of range or of the wrong kind.
        """
        if not isinstance(options, Mapping):
            raise ConfigError(
                f"`modalities[{modality!r}]` must be a dictionary of options; got"
                f" {type(options).__name__}. Use {{}} for the defaults."
            )
        known = [part.name for part in fields(cls)]
        for name in options:
            if name not in known:
                raise unknown_name(f"option of modality `{modality}`:", name, known)
        try:
            return cls(**options)
        except (ConfigError, TypeError) as error:
            raise ConfigError(f"Modality `{modality}`: {error}") from error
