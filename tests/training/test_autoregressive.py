"""Left to right: the loss equals a direct computation, token by token."""

import pytest
import torch

from multimodal_dlm.errors import ConfigError
from multimodal_dlm.models.attention_plan import AttentionPlan
from multimodal_dlm.training.objectives import Autoregressive
from multimodal_dlm.training.objectives.autoregressive import causal_order
from tests.training.tiny import canvas_of, generators, tiny_model


def test_the_loss_is_the_likelihood_token_by_token():
    """Each free token from a canvas that holds only what comes before it in the order."""
    model = tiny_model(logits_shift=1).double().eval()
    canvas = canvas_of(("caption", "text_to_image", "vqa"))
    order = causal_order(canvas)
    plan = AttentionPlan.from_canvas(canvas.replace(order=order))
    total: dict[int, float] = {}
    for row in range(canvas.batch_size):
        for column in canvas.is_free[row].nonzero().flatten().tolist():
            later = order[row] >= order[row, column]
            ids = canvas.input_ids.clone()
            ids[row, later] = model.vocabulary.special_id("bos")
            first = canvas.window_ids[row, :column].ne(canvas.window_ids[row, column]).all()
            if bool(first) and column and int(canvas.window_ids[row, column - 1]) == 0:
                ids[row, column - 1] = canvas.input_ids[row, column - 1]
            with torch.no_grad():
                hidden = model(
                    ids,
                    noise_levels=torch.zeros(ids.shape),
                    position_ids=canvas.position_ids,
                    attention_plan=plan,
                ).hidden_states[row, column]
            index = int(canvas.modality_ids[row, column])
            modality = model.vocabulary.modalities[index]
            logits = model.compute_logits(hidden, modality)
            target = model.vocabulary.to_columns(canvas.input_ids[row, column], modality)
            total[index] = total.get(index, 0.0) - float(logits.detach().log_softmax(-1)[target])
    counts = {
        index: int((canvas.is_free & (canvas.modality_ids == index)).sum()) for index in total
    }
    expected = sum(total[index] / counts[index] for index in total)
    with torch.no_grad():
        output = Autoregressive()(model, canvas, generator=generators([0, 1, 2]))
    assert float(output.loss) == pytest.approx(expected, rel=1e-10)
    assert output.num_targets == int(canvas.is_free.sum())


def test_a_condition_comes_before_what_it_conditions():
    canvas = canvas_of(("text_to_image",))
    order = causal_order(canvas)[0]
    answer, image = canvas.window_slice(3), canvas.window_slice(1)
    assert int(order[answer].max()) < int(order[image].min())
    assert sorted(order.tolist()) == list(range(canvas.length))


def test_a_model_that_would_see_its_targets_is_refused():
    with pytest.raises(ConfigError, match="needs a model with `logits_shift` 1; got 0"):
        Autoregressive()(tiny_model(), canvas_of(("caption",)))
