"""Negative log-likelihoods at targets: dense, without padding's traces, in few sizes."""

import pytest
import torch

from multimodal_dlm.diffusion.losses import token_nll
from multimodal_dlm.training.objectives.base import PIECE, target_nll
from tests.training.tiny import canvas_of, tiny_model


class Watched:
    """A model that notes how many states its head was given."""

    def __init__(self, model) -> None:
        self.model, self.vocabulary, self.sizes = model, model.vocabulary, []

    def compute_logits(self, states, modality):
        self.sizes.append(states.shape[:-1].numel())
        return self.model.compute_logits(states, modality)


@pytest.mark.parametrize("share", [0.1, 0.6, 1.0])
def test_targets_cost_what_they_cost_alone_and_the_head_sees_few_sizes(share):
    canvas, model = canvas_of(("joint",) * 8), tiny_model().double()
    draw = torch.Generator().manual_seed(0)
    states = torch.randn(
        *canvas.is_free.shape, model.config.hidden_size, generator=draw, dtype=torch.float64
    ).requires_grad_()
    is_target = canvas.is_free & (torch.rand(canvas.is_free.shape, generator=draw) < share)
    watched = Watched(model)
    nll = target_nll(watched, states, canvas, is_target)
    assert len(watched.sizes) == 2
    assert all(size % PIECE == 0 for size in watched.sizes)
    assert bool((nll[~is_target] == 0).all())
    (gradient,) = torch.autograd.grad((nll * nll.detach()).sum(), states)

    alone = torch.zeros_like(nll)
    vocabulary = model.vocabulary
    for row, column in is_target.nonzero().tolist():
        name = vocabulary.modalities[int(canvas.modality_ids[row, column])]
        alone[row, column] = token_nll(
            states[row, column][None],
            lambda found, name=name: model.compute_logits(found, name),
            vocabulary.to_columns(canvas.input_ids[row, column][None], name),
            num_columns=vocabulary.num_columns(name),
        )[0]
    (expected,) = torch.autograd.grad((alone * alone.detach()).sum(), states)
    assert torch.allclose(nll, alone, rtol=1e-12)
    assert torch.allclose(gradient, expected, rtol=1e-10, atol=1e-14)
    assert bool((gradient[~is_target] == 0).all())


def test_without_targets_every_parameter_still_has_a_gradient():
    canvas, model = canvas_of(("caption",)), tiny_model()
    states = torch.randn(*canvas.is_free.shape, model.config.hidden_size, requires_grad=True)
    nll = target_nll(model, states, canvas, torch.zeros_like(canvas.is_free))
    nll.sum().backward()
    assert bool((nll == 0).all())
    assert states.grad is not None
    assert bool((states.grad == 0).all())
