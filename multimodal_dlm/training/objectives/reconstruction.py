"""Training an image tokenizer: reconstruction, perceptual distance, and an optional critic."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from multimodal_dlm.errors import ConfigError
from multimodal_dlm.training.objectives.base import Generators, Objective, ObjectiveOutput, Term
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


class PatchCritic(nn.Module):
    """Scores patches of a picture as real or reconstructed (Isola et al. 2017, arXiv 1611.07004).

    Args:
        channels: Width of the first layer; doubled twice.
    """

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, channels, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(channels, 2 * channels, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * channels, 4 * channels, 3, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(4 * channels, 1, 3, padding=1),
        )

    def forward(
        self, pixels: Float[Tensor, "batch 3 h w"]
    ) -> Float[Tensor, "batch 1 rows columns"]:
        """Pixels around [0, 1] -> one score a patch, high for real."""
        return self.layers(pixels * 2 - 1)


class Reconstruction(Objective):
    """L1 + L2 + logarithm of L2 + perceptual distance + the quantizer's loss + a hinge critic.

    The critic (Esser et al. 2021, arXiv 2012.09841, section 3.1) and its optimizer belong to the
    objective: they start from the seed given here and are not part of a checkpoint, so a resumed
    run with `adversarial_weight` above 0 goes on with a fresh critic.

    Args:
        l1_weight: Weight of the mean absolute error.
        l2_weight: Weight of the mean squared error.
        log_weight: Weight of the mean over pictures of the natural logarithm of each one's mean
            squared error. PSNR is this logarithm: alone it maximizes the mean PSNR of pictures.
        perceptual_weight: Weight of the EfficientNet-Lite0 distance; 0 loads no network.
        perceptual_rows: Rows of a micro-batch that the distance looks at (it dominates the time).
        mirrored_share: Probability that a picture is mirrored left to right, 0 to 1.
        adversarial_weight: Weight of the critic; 0 builds none.
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
        critic_lr: float = 2e-4,
        critic_seed: int = 0,
    ) -> None:
        weights = {
            "l1_weight": l1_weight,
            "l2_weight": l2_weight,
            "log_weight": log_weight,
            "perceptual_weight": perceptual_weight,
            "adversarial_weight": adversarial_weight,
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
        self.adversarial_weight = adversarial_weight
        self.perceptual = PerceptualDistance() if perceptual_weight else None
        self.critic: PatchCritic | None = None
        if adversarial_weight:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(critic_seed)
                self.critic = PatchCritic()
            self.critic_optimizer = torch.optim.AdamW(
                self.critic.parameters(), lr=critic_lr, betas=(0.5, 0.9)
            )

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
            values["critic"] = self._train_critic(self.critic, pixels, reconstruction.detach())
            self.critic.requires_grad_(False)
            values["adversarial"] = -self.critic(reconstruction).mean()
            self.critic.requires_grad_(True)
            loss = loss + self.adversarial_weight * values["adversarial"]
        count = torch.tensor(float(num_rows))
        terms = {k: Term(v.detach().float() * num_rows, count) for k, v in values.items()}
        return ObjectiveOutput(loss, terms, num_rows, is_bound=False)

    def _train_critic(self, critic: PatchCritic, real: Tensor, fake: Tensor) -> Tensor:
        """One hinge step of the critic: real patches above 1, reconstructed ones below -1."""
        loss = (F.relu(1 - critic(real)) + F.relu(1 + critic(fake))).mean()
        loss.backward()
        if bool(loss.isfinite()):  # A broken step is skipped for the tokenizer as well.
            self.critic_optimizer.step()
        self.critic_optimizer.zero_grad(set_to_none=True)
        return loss.detach()
