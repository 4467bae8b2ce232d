"""A critic for image tokenizers: scores patches, and compares pictures by what it looks at."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from multimodal_dlm.errors import CheckpointError


class PatchCritic(nn.Module):
    """Scores patches of a picture as real or reconstructed (Isola et al. 2017, arXiv 1611.07004).

    Args:
        channels: Width of the first layer; doubled twice.
    """

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [
                nn.Conv2d(3, channels, 4, stride=2, padding=1),
                nn.Conv2d(channels, 2 * channels, 4, stride=2, padding=1),
                nn.Conv2d(2 * channels, 4 * channels, 3, padding=1),
            ]
        )
        self.score = nn.Conv2d(4 * channels, 1, 3, padding=1)

    def features(self, pixels: Float[Tensor, "batch 3 h w"]) -> list[Tensor]:
        """Pixels around [0, 1] -> what each layer sees."""
        hidden, found = pixels * 2 - 1, []
        for layer in self.layers:
            hidden = F.leaky_relu(layer(hidden), 0.2)
            found.append(hidden)
        return found

    def forward(
        self, pixels: Float[Tensor, "batch 3 h w"]
    ) -> Float[Tensor, "batch 1 rows columns"]:
        """Pixels around [0, 1] -> one score a patch, high for real."""
        return self.score(self.features(pixels)[-1])


class CriticTrainer:
    """A critic with its optimizer: learns from each batch, then judges it.

    Args:
        channels: Width of the critic.
        lr: Learning rate of AdamW with betas (0.5, 0.9).
        seed: Initial weights of the critic.
    """

    def __init__(self, *, channels: int, lr: float, seed: int) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.critic = PatchCritic(channels)
        self.optimizer = torch.optim.AdamW(self.critic.parameters(), lr=lr, betas=(0.5, 0.9))

    def learn(
        self, real: Float[Tensor, "batch 3 h w"], fake: Float[Tensor, "batch 3 h w"]
    ) -> Float[Tensor, ""]:
        """One hinge step: real patches above 1, reconstructed ones below -1.

        It is left out where its gradient is not finite.

        The loss of Lim and Ye 2017 (arXiv 1705.02894, section 3), as in Esser et al. 2021 (arXiv
        2012.09841, section 3.1).

        Returns:
            The loss before the step, detached.
        """
        scores_real, scores_fake = self.critic(torch.cat([real, fake.detach()])).float().chunk(2)
        loss = (F.relu(1 - scores_real) + F.relu(1 + scores_fake)).mean()
        loss.backward()
        gradients = [p.grad for p in self.critic.parameters() if p.grad is not None]
        if bool(nn.utils.get_total_norm(gradients).isfinite()):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def judge(
        self,
        real: Float[Tensor, "batch 3 h w"],
        fake: Float[Tensor, "batch 3 h w"],
        *,
        matches: bool,
    ) -> dict[str, Float[Tensor, ""]]:
        """What a decoder minimizes; gradients flow into `fake` only.

        Args:
            real: Pictures.
            fake: Their reconstructions.
            matches: Whether features are compared.

        Returns:
            `adversarial`, minus the mean score of `fake`, and `matching`, the mean over layers of
            the mean absolute difference of the critic's features (Wang et al. 2018, arXiv
            1711.11585, Eq. 4).
        """
        self.critic.requires_grad_(False)
        found = self.critic.features(fake)
        values = {"adversarial": -self.critic.score(found[-1]).float().mean()}
        if matches:
            with torch.no_grad():
                targets = self.critic.features(real)
            pairs = zip(found, targets, strict=True)
            distances = [(a - b).float().abs().mean() for a, b in pairs]
            values["matching"] = torch.stack(distances).mean()
        self.critic.requires_grad_(True)
        return values

    def tensors(self) -> dict[str, Tensor]:
        """Weights and moments by name, on the CPU, as a checkpoint keeps them."""
        moments = self.optimizer.state_dict()["state"]
        found = {f"critic.{k}": v for k, v in self.critic.state_dict().items()} | {
            f"moments.{index}.{k}": v for index, own in moments.items() for k, v in own.items()
        }
        return {name: tensor.detach().cpu() for name, tensor in found.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `tensors` gave.

        Raises:
            CheckpointError: When a weight is missing or has another shape.
        """
        weights = {
            k.removeprefix("critic."): v for k, v in tensors.items() if k.startswith("critic.")
        }
        try:
            self.critic.load_state_dict(weights)
        except RuntimeError as error:
            raise CheckpointError(
                "The critic of a checkpoint must have the weights of the one to go on with; got"
                f" others: {error}. Undo the change of `critic_channels`, or give another"
                " `output_dir`."
            ) from error
        state = self.optimizer.state_dict()
        for name, value in tensors.items():
            kind, *place = name.split(".")
            if kind == "moments":
                state["state"].setdefault(int(place[0]), {})[place[1]] = value
        self.optimizer.load_state_dict(state)
