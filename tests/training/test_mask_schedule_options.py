"""What `mask_schedule` of masked diffusion takes, and the errors of what it does not take."""

import pytest
import torch

from multimodal_dlm.errors import ConfigError
from multimodal_dlm.training.objectives import MaskedDiffusion, build_objective
from multimodal_dlm.training.objectives.base import Batch
from tests.training.tiny import canvas_of, generators, tiny_model


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("cosine", r"`mask_schedule` must go by modality; got 'cosine'"),
        ({"image": None}, r"`mask_schedule.image` must be a name, or a mapping .* got None"),
        ({"image": {"power": 2}}, r"`mask_schedule.image` must be a name, or a mapping"),
        ({"image": "cosin"}, r"`mask_schedule.image`: .*Did you mean `cosine`"),
        (
            {"image": {"name": "polynomial", "power": 0}},
            r"`mask_schedule.image`: `power` must be a finite number above 0; got 0",
        ),
    ],
)
def test_wrong_schedules_are_named_with_their_place(option, message):
    with pytest.raises(ConfigError, match=message):
        build_objective("masked_diffusion", mask_schedule=option)


def test_a_modality_that_there_is_not_is_named():
    objective = MaskedDiffusion(mask_schedule={"imge": "cosine"})
    with pytest.raises(ConfigError, match=r"Unknown modality in `mask_schedule` `imge`. Did you"):
        objective(tiny_model(), canvas_of(("joint",)), generator=generators([0]))


def test_held_out_levels_are_the_same_under_every_schedule():
    tasks = ("text_to_image", "joint")
    canvas, model = canvas_of(tasks), tiny_model()
    batch = Batch(canvas, ("", ""), tasks, (0, 1))
    losses = []
    for schedule in (None, {"image": "cosine"}):
        objective = MaskedDiffusion(mask_schedule=schedule)
        plan = objective.prepare([batch], seed=0, step=0, gather=list, num_processes=1)
        levels = objective.grid(plan.contexts, 4)
        with torch.no_grad():
            outputs = [
                objective(model, canvas, generator=generators([1, 2]), **context)
                for (context,) in levels
            ]
        losses.append([float(output.loss) for output in outputs])
    assert losses[0] == losses[1]
