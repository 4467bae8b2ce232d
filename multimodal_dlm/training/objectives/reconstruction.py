"""Training an image tokenizer: reconstruction, perceptual distance, and an optional critic."""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor

from multimodal_dlm.errors import ConfigError
from multimodal_dlm.training.objectives.base import Generators, Objective, ObjectiveOutput, Term
from multimodal_dlm.training.objectives.critic import CriticTrainer
from multimodal_dlm.training.perceptual import PerceptualDistance

MIN_ERROR = 1e-6  # 60 dB: a picture that is right already has no say.


def mirror(
    pixels: Float[Tensor, "batch 3 h w"], share: float, generator: Generators
) -> Float[Tensor, "batch 3 h w"]:
    """Mirror a share of the pictures left to right, each decided by its own draw."""
    own = [generator] * len(pixels) if isinstance(generator, torch.Generator) else generator
    draws = [float(torch.rand((), generator=row)) for row in own]
    is_mirrored = torch.tensor([draw < share for draw in draws], device=pixels.device)
    return torch.where(is_mirrored[:, None, None, None], pixels.flip(3), pixels)


class Reconstruction(Objective):
    """L1 + L2 + logarithm of L2 + perceptual distance + the quantizer's loss + a hinge critic.

    The critic (Esser et al. 2021, arXiv 2012.09841, section 3.1) learns from every micro-batch
    before it judges it. It belongs to the objective, one to a process, and is part of a checkpoint.

    Args:
        l1_weight: Weight of the mean absolute error.
        l2_weight: Weight of the mean squared error.
        log_weight: Weight of the mean over pictures of the natural logarithm of each one's mean
            squared error. PSNR is this logarithm: alone it maximizes the mean PSNR of pictures.
        perceptual_weight: Weight of the EfficientNet-Lite0 distance; 0 loads no network.
        perceptual_rows: Rows of a micro-batch that the distance looks at (it dominates the time).
        mirrored_share: Probability that a picture is mirrored left to right, 0 to 1.
        adversarial_weight: Weight of minus the critic's score; 0 builds no critic.
        matching_weight: Weight of the distance in the critic's features; needs a critic.
        critic_channels: Width of the critic's first layer; doubled twice.
        critic_lr: Learning rate of the critic.
        critic_seed: Initial weights of the critic.
    """

    component = "image_tokenizer"

    def __init__(
        self,
        *,
        l1_weight: float = 1.0,
        l2_weight: float = 4.0,
        log_weight: float = 0.0,
        perceptual_weight: float = 0.02,
        perceptual_rows: int = 12,
        mirrored_share: float = 0.0,
        adversarial_weight: float = 0.0,
        matching_weight: float = 0.0,
        critic_channels: int = 32,
        critic_lr: float = 2e-4,
        critic_seed: int = 0,
    ) -> None:
        weights = {
            "l1_weight": l1_weight,
            "l2_weight": l2_weight,
            "log_weight": log_weight,
            "perceptual_weight": perceptual_weight,
            "adversarial_weight": adversarial_weight,
            "matching_weight": matching_weight,
        }
        if min(weights.values()) < 0 or max(l1_weight, l2_weight, log_weight) == 0:
            raise ConfigError(
                "Weights must not be negative and `l1_weight`, `l2_weight` or `log_weight` must be"
                f" above 0; got {weights}. Use `l1_weight: 1.0`."
            )
        self.l1_weight, self.l2_weight, self.log_weight = l1_weight, l2_weight, log_weight
        self.perceptual_weight, self.perceptual_rows = perceptual_weight, perceptual_rows
        if not 0 <= mirrored_share <= 1:
            raise ConfigError(
                f"`mirrored_share` must be in [0, 1]; got {mirrored_share}. Use 0.5, or 0 for none."
            )
        self.mirrored_share = mirrored_share
        if matching_weight and not adversarial_weight:
            raise ConfigError(
                "`matching_weight` needs a critic; got `adversarial_weight` 0. Use"
                " `adversarial_weight: 0.05`, or 0 for both."
            )
        self.adversarial_weight, self.matching_weight = adversarial_weight, matching_weight
        self.perceptual = PerceptualDistance() if perceptual_weight else None
        self.critic: CriticTrainer | None = None
        if adversarial_weight:
            self.critic = CriticTrainer(channels=critic_channels, lr=critic_lr, seed=critic_seed)

    def to(self, device: torch.device) -> Self:
        """Move the perceptual distance and the critic."""
        if self.critic is not None:
            self.critic.critic.to(device)
        return super().to(device)

    def tensors(self) -> dict[str, Tensor]:
        """The critic's weights and moments."""
        return self.critic.tensors() if self.critic is not None else {}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on with the critic of a checkpoint; with a fresh one where it has none."""
        if self.critic is not None and tensors:
            self.critic.restore(tensors)

    def __call__(
        self,
        model: Any,
        inputs: Float[Tensor, "batch 3 h w"],
        *,
        generator: Generators,
        counted: Sequence[int] | None = None,
        **context: Any,
    ) -> ObjectiveOutput:
        """Loss of one micro-batch of pixels in [0, 1], the mean over the rows that count.

        Args:
            model: Image tokenizer: pixels -> (reconstruction, quantizer loss).
            inputs: Pixels.
            generator: Decides which pictures are mirrored; a sequence has one for each row.
            counted: Places of the rows that count; None for all. Without any the loss is that of
                all rows, so that it has gradients, and must be multiplied by 0.
            context: Unused.
        """
        del context
        if self.mirrored_share and torch.is_grad_enabled():
            inputs = mirror(inputs, self.mirrored_share, generator)
        num_rows = len(inputs) if counted is None else len(counted)
        rows = inputs[list(counted)] if counted and num_rows < len(inputs) else inputs
        pixels = rows.contiguous(memory_format=torch.channels_last)
        reconstruction, quantizer_loss = model(pixels)
        error = reconstruction - pixels
        l1, l2 = error.abs().mean(), error.pow(2).mean()
        loss = self.l1_weight * l1 + self.l2_weight * l2 + quantizer_loss
        values = {"l1": l1, "psnr": -10 * l2.detach().clamp(min=1e-10).log10()}
        if self.log_weight:
            logs = error.pow(2).mean(dim=(1, 2, 3)).clamp(min=MIN_ERROR).log()
            loss = loss + self.log_weight * logs.mean()
        if self.perceptual is not None:
            first = slice(0, self.perceptual_rows)
            values["perceptual"] = self.perceptual(reconstruction[first], pixels[first])
            loss = loss + self.perceptual_weight * values["perceptual"]
        if self.critic is not None and num_rows and torch.is_grad_enabled():
            values["critic"] = self.critic.learn(pixels, reconstruction)
            weights = {"adversarial": self.adversarial_weight, "matching": self.matching_weight}
            matches = self.matching_weight > 0
            judged = self.critic.judge(pixels, reconstruction, matches=matches)
            loss = loss + torch.stack([weights[k] * v for k, v in judged.items()]).sum()
            values |= judged
        count = torch.tensor(float(num_rows))
        terms = {k: Term(v.detach().float() * num_rows, count) for k, v in values.items()}
        return ObjectiveOutput(loss, terms, num_rows, is_bound=False)
