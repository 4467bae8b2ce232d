"""Forward processes q(x_t | x_0): how tokens lose their values, and what that says of the reverse.

All of it in the column space of one modality: columns 0..V-1, and state V = mask for the absorbing
process. Tokens are corrupted independently, each clean with probability alpha(t), so everything is
a closed form of one token: marginals, transitions, posteriors q(x_s | x_t, x_0), and their mixture
over a denoiser's law of x_0, which is the ancestral reverse step. The losses are in `losses`; the
committing of tokens in few steps is the scheduler's.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from multimodal_dlm.diffusion.mask_schedules import MaskSchedule, get_mask_schedule
from multimodal_dlm.diffusion.masking import bernoulli_mask, exact_count_mask, exact_count_weight
from multimodal_dlm.diffusion.timesteps import counts_from_uniforms
from multimodal_dlm.errors import ConfigError, unknown_name


@dataclass(frozen=True)
class ForwardProcessOutput:
    """A corrupted batch and what a loss needs to know about it.

    Args:
        input_ids: Corrupted tokens, columns of the modality or the mask.
        is_target: Positions that carry loss.
        weight: What each target's loss is multiplied by, so that the row sum is an unbiased
            estimate of the row's NELBO in nats; 0 elsewhere.
        noise_levels: What the backbone is told about each position, in [0, 1]; 0 is clean.
    """

    input_ids: Int[Tensor, "batch length"]
    is_target: Bool[Tensor, "batch length"]
    weight: Float[Tensor, "batch length"]
    noise_levels: Float[Tensor, "batch length"]


class ForwardProcess(ABC):
    """Base of the forward processes.

    Args:
        num_columns: Columns V of the modality, at least 1.
        mask_schedule: Name of alpha(t), or a mask schedule.
        mask_schedule_options: Options of a mask schedule given by name.

    Raises:
        ConfigError: When there are no columns, or the mask schedule is unknown.
    """

    def __init__(
        self,
        *,
        num_columns: int,
        mask_schedule: str | MaskSchedule = "linear",
        mask_schedule_options: dict[str, Any] | None = None,
    ) -> None:
        if num_columns < 1:
            raise ConfigError(
                f"`num_columns` must be at least 1; got {num_columns}. Use the codebook size."
            )
        if isinstance(mask_schedule, str):
            mask_schedule = get_mask_schedule(mask_schedule, **(mask_schedule_options or {}))
        self.num_columns = num_columns
        self.mask_schedule = mask_schedule

    @property
    @abstractmethod
    def num_states(self) -> int:
        """Symbols a corrupted token can be."""

    @abstractmethod
    def stationary(self) -> Float[Tensor, " states"]:
        """Law of a token at t = 1, float64."""

    @abstractmethod
    def add_noise(
        self,
        columns: Int[Tensor, "batch length"],
        t: Float[Tensor, " batch"],
        *,
        is_free: Bool[Tensor, "batch length"],
        generator: torch.Generator | None,
    ) -> Int[Tensor, "batch length"]:
        """Draw x_t ~ q(x_t | x_0) at the free positions, each token independently.

        Args:
            columns: Clean tokens x_0.
            t: Time of each row, in [0, 1].
            is_free: Positions that may change.
            generator: Source of all randomness.
        """

    @abstractmethod
    def corrupt(
        self,
        columns: Int[Tensor, "batch length"],
        uniforms: Float[Tensor, " batch"],
        *,
        is_free: Bool[Tensor, "batch length"],
        is_padding: Bool[Tensor, "batch length"] | None = None,
        generator: torch.Generator | None,
    ) -> ForwardProcessOutput:
        """Corrupt one window for training, with targets, weights and noise levels.

        Args:
            columns: Clean tokens x_0.
            uniforms: Uniform number of each row, from `timesteps`; sets how much is corrupted.
            is_free: Positions that may be corrupted and carry loss.
            is_padding: Positions that only make the batch rectangular; None for none.
            generator: Source of all randomness.
        """

    @abstractmethod
    def posterior(
        self,
        clean_probs: Float[Tensor, "*shape columns"],
        columns: Int[Tensor, "*shape"],
        s: float,
        t: float,
    ) -> Float[Tensor, "*shape states"]:
        """Law of x_s given x_t, mixed over a law of x_0: sum over x_0 of p(x_0) q(x_s | x_t, x_0).

        With a one-hot law it is the posterior itself; with a denoiser's, the reverse step.

        Args:
            clean_probs: Law of x_0 at each position.
            columns: Corrupted tokens x_t.
            s: Earlier time, 0 <= s < t.
            t: Time of `columns`, at most 1.

        Raises:
            ConfigError: When the times are not in that order.
        """

    def transition_matrix(self, s: float, t: float) -> Float[Tensor, "states states"]:
        """Law of x_t (columns) given x_s (rows), float64; s = 0 gives the marginals q(x_t | x_0).

        A token keeps its state with probability alpha_t / alpha_s, else is redrawn from the
        stationary law (Austin et al. 2021, arXiv 2107.03006, section 3).

        Args:
            s: Earlier time, 0 <= s <= t.
            t: Later time, at most 1.

        Raises:
            ConfigError: When the times are not in that order.
        """
        if not 0.0 <= s <= t <= 1.0:
            raise ConfigError(f"`s` and `t` must satisfy 0 <= s <= t <= 1; got {s} and {t}.")
        kept = _kept(self.mask_schedule.alpha(s), self.mask_schedule.alpha(t))
        stay = kept * torch.eye(self.num_states, dtype=torch.float64)
        return stay + (1 - kept) * self.stationary().expand_as(stay)

    def one_hot(self, columns: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape columns"]:
        """The law that is sure of `columns`, float64."""
        return F.one_hot(columns, self.num_columns).double()

    def _alphas(self, s: float, t: float) -> tuple[float, float]:
        if not 0.0 <= s < t <= 1.0:
            raise ConfigError(
                f"`s` and `t` must satisfy 0 <= s < t <= 1; got {s} and {t}. The reverse process"
                " goes from the noisier time t to s."
            )
        return self.mask_schedule.alpha(s), self.mask_schedule.alpha(t)


class AbsorbingProcess(ForwardProcess):
    """Tokens turn into the mask, state V, and stay there.

    q(x_t | x_0) = alpha_t [x_t = x_0] + (1 - alpha_t) [x_t = mask] (Austin et al. 2021, arXiv
    2107.03006; Sahoo et al. 2024, arXiv 2406.07524, Eq. 5). Training masks exact counts and not
    Bernoulli draws: the same bound with less variance, and independent of the mask schedule.
    """

    @property
    def num_states(self) -> int:
        """V + 1: the columns and the mask."""
        return self.num_columns + 1

    @property
    def mask_column(self) -> int:
        """The mask's state V."""
        return self.num_columns

    def stationary(self) -> Float[Tensor, " states"]:
        """All mask."""
        law = torch.zeros(self.num_states, dtype=torch.float64)
        law[self.mask_column] = 1.0
        return law

    def add_noise(
        self,
        columns: Int[Tensor, "batch length"],
        t: Float[Tensor, " batch"],
        *,
        is_free: Bool[Tensor, "batch length"],
        generator: torch.Generator | None,
    ) -> Int[Tensor, "batch length"]:
        """Mask each free token with probability 1 - alpha(t).

        Args:
            columns: Clean tokens x_0.
            t: Time of each row, in [0, 1].
            is_free: Positions that may change.
            generator: Source of all randomness.
        """
        rate = 1 - self.mask_schedule.alpha(t)
        return columns.masked_fill(
            bernoulli_mask(is_free, rate, generator=generator), self.mask_column
        )

    def corrupt(
        self,
        columns: Int[Tensor, "batch length"],
        uniforms: Float[Tensor, " batch"],
        *,
        is_free: Bool[Tensor, "batch length"],
        is_padding: Bool[Tensor, "batch length"] | None = None,
        generator: torch.Generator | None,
    ) -> ForwardProcessOutput:
        """Mask k = ceil(u L) of the L free tokens; targets are the masks, weight L / k.

        The loss of a target is its cross-entropy. The noise level is the realised masked share of
        the window, frozen tokens included.

        Args:
            columns: Clean tokens x_0.
            uniforms: Uniform number u of each row.
            is_free: Positions that may be masked.
            is_padding: Positions that are no tokens; None for none.
            generator: Source of all randomness.
        """
        lengths = is_free.sum(dim=1)
        counts = counts_from_uniforms(uniforms.to(is_free.device), lengths)
        is_masked = exact_count_mask(is_free, counts, generator=generator)
        input_ids = columns.masked_fill(is_masked, self.mask_column)
        weight = is_masked * exact_count_weight(is_masked, is_free)[:, None]
        levels = self.noise_levels(input_ids, is_padding=is_padding)
        return ForwardProcessOutput(input_ids, is_masked, weight, levels)

    def noise_levels(
        self,
        input_ids: Int[Tensor, "batch length"],
        *,
        is_padding: Bool[Tensor, "batch length"] | None = None,
    ) -> Float[Tensor, "batch length"]:
        """Masked share of the window's tokens at the masks, 0 at known tokens, float32.

        Args:
            input_ids: Corrupted tokens of one noise group.
            is_padding: Positions that are no tokens; None for none.
        """
        is_token = torch.ones_like(input_ids, dtype=torch.bool)
        if is_padding is not None:
            is_token = ~is_padding
        is_masked = (input_ids == self.mask_column) & is_token
        share = is_masked.sum(dim=1).float() / is_token.sum(dim=1).clamp(min=1)
        return is_masked * share[:, None]

    def posterior(
        self,
        clean_probs: Float[Tensor, "*shape columns"],
        columns: Int[Tensor, "*shape"],
        s: float,
        t: float,
    ) -> Float[Tensor, "*shape states"]:
        """A mask becomes x_0 with probability (alpha_s - alpha_t) / (1 - alpha_t); the rest stays.

        Sahoo et al. 2024 (arXiv 2406.07524), Eq. 6. A known token stays itself whatever the law.

        Args:
            clean_probs: Law of x_0 at each position.
            columns: Corrupted tokens x_t.
            s: Earlier time, 0 <= s < t.
            t: Time of `columns`, at most 1.

        Raises:
            ConfigError: When the times are not in that order.
        """
        alpha_s, alpha_t = self._alphas(s, t)
        revealed = (alpha_s - alpha_t) / (1 - alpha_t)
        stays = torch.full_like(clean_probs[..., :1], 1 - revealed)
        from_mask = torch.cat([revealed * clean_probs, stays], dim=-1)
        known = F.one_hot(columns, self.num_states).to(clean_probs.dtype)
        return torch.where((columns == self.mask_column)[..., None], from_mask, known)


class UniformProcess(ForwardProcess):
    """Tokens are redrawn uniformly among the V columns; which ones were is invisible.

    q(x_t | x_0) = alpha_t [x_t = x_0] + (1 - alpha_t) / V (Austin et al. 2021, arXiv 2107.03006;
    Schiff et al. 2024, arXiv 2412.10193). Its loss is no cross-entropy: see
    `losses.uniform_nelbo_rate`.
    """

    @property
    def num_states(self) -> int:
        """V: there is no mask."""
        return self.num_columns

    def stationary(self) -> Float[Tensor, " states"]:
        """Uniform."""
        return torch.full((self.num_columns,), 1 / self.num_columns, dtype=torch.float64)

    def add_noise(
        self,
        columns: Int[Tensor, "batch length"],
        t: Float[Tensor, " batch"],
        *,
        is_free: Bool[Tensor, "batch length"],
        generator: torch.Generator | None,
    ) -> Int[Tensor, "batch length"]:
        """Redraw each free token with probability 1 - alpha(t); it may come out as it was.

        Args:
            columns: Clean tokens x_0.
            t: Time of each row, in [0, 1].
            is_free: Positions that may change.
            generator: Source of all randomness.
        """
        rate = 1 - self.mask_schedule.alpha(t)
        is_redrawn = bernoulli_mask(is_free, rate, generator=generator)
        drawn = torch.randint(
            self.num_columns,
            columns.shape,
            generator=generator,
            device="cpu" if generator is None else generator.device,
        )
        return torch.where(is_redrawn, drawn.to(columns.device), columns)

    def corrupt(
        self,
        columns: Int[Tensor, "batch length"],
        uniforms: Float[Tensor, " batch"],
        *,
        is_free: Bool[Tensor, "batch length"],
        is_padding: Bool[Tensor, "batch length"] | None = None,
        generator: torch.Generator | None,
    ) -> ForwardProcessOutput:
        """Noise at t = u; every free token is a target of weight 1 and has level 1 - alpha(t).

        The loss of a target is `losses.uniform_nelbo_rate` at the same t.

        Args:
            columns: Clean tokens x_0.
            uniforms: Time t of each row, uniform on (0, 1).
            is_free: Positions that may be redrawn.
            is_padding: Unused; a padding position is not free.
            generator: Source of all randomness.
        """
        del is_padding
        times = uniforms.to(is_free.device)
        input_ids = self.add_noise(columns, times, is_free=is_free, generator=generator)
        levels = self.noise_levels(times, is_free=is_free)
        return ForwardProcessOutput(input_ids, is_free, is_free.float(), levels)

    def noise_levels(
        self, t: Float[Tensor, " batch"], *, is_free: Bool[Tensor, "batch length"]
    ) -> Float[Tensor, "batch length"]:
        """Level 1 - alpha(t) at every free token, corrupted or not, 0 elsewhere, float32.

        Args:
            t: Time of each row, in [0, 1].
            is_free: Positions that may have been redrawn.
        """
        return is_free * (1 - self.mask_schedule.alpha(t)).float()[:, None]

    def posterior(
        self,
        clean_probs: Float[Tensor, "*shape columns"],
        columns: Int[Tensor, "*shape"],
        s: float,
        t: float,
    ) -> Float[Tensor, "*shape states"]:
        """Bayes: q(x_s | x_t, x_0) = q(x_t | x_s) q(x_s | x_0) / q(x_t | x_0), mixed over x_0.

        Austin et al. 2021 (arXiv 2107.03006), Eq. 3; linear in V.

        Args:
            clean_probs: Law of x_0 at each position.
            columns: Corrupted tokens x_t.
            s: Earlier time, 0 <= s < t.
            t: Time of `columns`, at most 1.

        Raises:
            ConfigError: When the times are not in that order.
        """
        alpha_s, alpha_t = self._alphas(s, t)
        kept = _kept(alpha_s, alpha_t)
        is_same = F.one_hot(columns, self.num_columns).to(clean_probs.dtype)
        # p(x_0) / q(x_t | x_0), as a function of x_0.
        odds = clean_probs / (alpha_t * is_same + (1 - alpha_t) / self.num_columns)
        forward = kept * is_same + (1 - kept) / self.num_columns
        total = odds.sum(dim=-1, keepdim=True)
        return forward * (alpha_s * odds + (1 - alpha_s) / self.num_columns * total)


FORWARD_PROCESSES: dict[str, type[ForwardProcess]] = {
    "absorbing": AbsorbingProcess,
    "uniform": UniformProcess,
}


def get_forward_process(name: str, **options: Any) -> ForwardProcess:
    """Make a forward process by name.

    Args:
        name: `absorbing` or `uniform`.
        options: Arguments of `ForwardProcess`.

    Raises:
        ConfigError: When the name is unknown or an argument is refused.
    """
    if name not in FORWARD_PROCESSES:
        raise unknown_name("forward process", name, FORWARD_PROCESSES)
    return FORWARD_PROCESSES[name](**options)


def _kept(alpha_s: float, alpha_t: float) -> float:
    """Probability that a token of time s is unchanged at time t; 1 where both are fully noisy."""
    return alpha_t / alpha_s if alpha_s > 0 else 1.0
