"""Left to right in the same weights and rows: the fair autoregressive baseline.

Tokens are ordered by (attention order, column), so that a condition comes before what it conditions
wherever it stands; token i is predicted from the state of the previous token of the row, and the
loss is the exact negative log-likelihood in that order.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from multimodal_dlm.canvas import Canvas, causal_order
from multimodal_dlm.errors import ConfigError
from multimodal_dlm.training.objectives.base import Generators, ObjectiveOutput, target_nll
from multimodal_dlm.training.objectives.canvas_objective import CanvasObjective, nelbo_terms
from multimodal_dlm.training.packing import Packing, canvas_states


class Autoregressive(CanvasObjective):
    """Next-token likelihood; needs a model with `logits_shift=1`."""

    def __call__(
        self,
        model: Any,
        inputs: Canvas,
        *,
        generator: Generators | None = None,
        teacher: Any = None,
        uniforms: Mapping[int, Float[Tensor, " batch"]] | None = None,
        denominators: Mapping[int, int] | None = None,
        tasks: Sequence[str] = (),
        draws: Sequence[float] = (),
        row_share: float = 1.0,
        packing: Packing | None = None,
    ) -> ObjectiveOutput:
        """One causal forward on the clean canvas; nothing is drawn.

        Args:
            model: Backbone with `logits_shift=1`.
            inputs: Clean canvas; `is_free` is what is predicted.
            generator: Unused.
            teacher: Unused.
            uniforms: Unused.
            denominators: Free positions of each modality index in the global batch.
            tasks: Task of each row, for its weight and the report.
            draws: Unused.
            row_share: Rows of this micro-batch over those of the global batch.
            packing: How rows share the rows of the forward pass.

        Raises:
            ConfigError: When the model does not shift its logits; it would see its targets.
        """
        del generator, teacher, uniforms, draws
        shift = model.config["logits_shift"]
        if shift != 1:
            raise ConfigError(
                f"Objective `autoregressive` needs a model with `logits_shift` 1; got {shift}. Set"
                " `model.options.logits_shift: 1`."
            )
        levels = torch.zeros(inputs.input_ids.shape, device=inputs.device)
        ordered = inputs.replace(order=causal_order(inputs))
        output = canvas_states(model, ordered, levels, packing)
        nll = target_nll(model, output.hidden_states, inputs, inputs.is_free)
        loss = self.weighted_loss(nll, inputs, model.vocabulary, denominators, tasks)
        if output.auxiliary_loss is not None:
            loss = loss + row_share * output.auxiliary_loss
        is_bound = torch.ones(inputs.batch_size, dtype=torch.bool, device=inputs.device)
        terms = nelbo_terms(nll, inputs, model.vocabulary, is_bound=is_bound, tasks=tasks)
        return ObjectiveOutput(loss, terms, int(inputs.is_free.sum()), is_bound)

    def grid(
        self, contexts: Sequence[dict[str, Any]], num_levels: int
    ) -> list[list[dict[str, Any]]]:
        """The contexts as they are: there is no noise."""
        del num_levels
        return [list(contexts)]
