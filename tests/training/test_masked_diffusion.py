"""Masked diffusion: oracle values, weights, corruption, invariance to how a batch is cut."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from multimodal_dlm.canvas import Canvas, noise_levels
from multimodal_dlm.diffusion.mask_schedules import get_mask_schedule
from multimodal_dlm.diffusion.timesteps import mean_scheduled_count
from multimodal_dlm.errors import ConfigError, VocabularyError
from multimodal_dlm.training.batches import drop_empty_columns
from multimodal_dlm.training.objectives import MaskedDiffusion, build_objective
from multimodal_dlm.training.objectives.base import Batch
from multimodal_dlm.vocabulary import UnifiedVocabulary
from tests.core.toy import toy_processor
from tests.training.tiny import TASKS, canvas_of, generators, rows_of, tiny_model

VOCABULARY = UnifiedVocabulary.build({"letters": [("letters", 3)]})
LENGTH = 3


def joint_distribution() -> torch.Tensor:
    """A correlated distribution over three letters at three places, (27,)."""
    draw = torch.Generator().manual_seed(3)
    return torch.rand(3**LENGTH, generator=draw, dtype=torch.float64).pow(3).softmax(0) ** 1.5


SEQUENCES = torch.tensor(list(itertools.product(range(3), repeat=LENGTH)))


class PerfectDenoiser:
    """p(letter at i | visible letters) by enumeration; states are the log-probabilities."""

    def __init__(self) -> None:
        joint = joint_distribution()
        self.joint = joint / joint.sum()
        self.vocabulary = VOCABULARY

    def __call__(self, input_ids, **kwargs):
        columns = self.vocabulary.to_columns(input_ids, "letters")
        seen = (columns[:, None, :] == SEQUENCES) | (columns[:, None, :] == 3)
        posterior = self.joint * seen.all(-1)
        one_hot = torch.nn.functional.one_hot(SEQUENCES, 3).double()
        probabilities = torch.einsum("bs,slv->blv", posterior, one_hot)
        logits = (probabilities / posterior.sum(1)[:, None, None]).log()
        return SimpleNamespace(hidden_states=logits, auxiliary_loss=None)

    def compute_logits(self, states, modality):
        return states


def letters_canvas(columns: torch.Tensor) -> Canvas:
    batch, length = columns.shape
    zeros = torch.zeros(batch, length, dtype=torch.long)
    return Canvas(
        input_ids=VOCABULARY.from_columns(columns, "letters"),
        window_ids=zeros + 1,
        modality_ids=zeros,
        position_ids=torch.zeros(batch, length, 3, dtype=torch.long),
        order=zeros,
        document_ids=zeros,
        is_free=torch.ones(batch, length, dtype=torch.bool),
        is_padding=torch.zeros(batch, length, dtype=torch.bool),
    )


@pytest.mark.parametrize(
    "mask_schedule",
    [{}, {"letters": "cosine"}, {"letters": {"name": "polynomial", "power": 2}}],
    ids=["uniform", "cosine", "square"],
)
def test_the_perfect_denoiser_pays_the_entropy(mask_schedule):
    model = PerfectDenoiser()
    objective = MaskedDiffusion(num_noise_bins=1, mask_schedule=mask_schedule)
    entropy = -(model.joint * model.joint.log()).sum()
    repeats = 400
    total = torch.zeros(())
    for index, row in enumerate(SEQUENCES):
        canvas = letters_canvas(row.expand(repeats, -1))
        draw = torch.Generator().manual_seed(index)
        output = objective(model, canvas, generator=draw)
        total = total + model.joint[index] * output.loss * LENGTH
    assert float(total) == pytest.approx(float(entropy), rel=0.02)


def test_the_weight_of_a_target_is_window_length_over_count():
    canvas = canvas_of(("text_to_image", "caption"))
    vocabulary = tiny_model().vocabulary
    corrupted = MaskedDiffusion().corrupt(canvas, vocabulary, generator=generators([1, 2]))
    for row in range(2):
        targets = corrupted.is_target[row]
        length, count = int(canvas.is_free[row].sum()), int(targets.sum())
        assert 1 <= count <= length
        assert torch.equal(corrupted.weight[row, targets], torch.full((count,), length / count))
    assert bool((corrupted.weight[~corrupted.is_target] == 0).all())


def test_flat_weights_change_the_loss_of_one_modality_and_no_report():
    canvas, model = canvas_of(("text_to_image", "joint")), tiny_model()
    uniforms = {window: torch.tensor([0.3, 0.8]).double() for window in canvas.free_windows()}
    outputs = {
        weighting: MaskedDiffusion(mask_weighting={"image": weighting}, loss_weights={"text": 0.0})(
            model, canvas, generator=generators([1, 2]), uniforms=uniforms
        )
        for weighting in ("bound", "flat")
    }
    bound, flat = outputs["bound"], outputs["flat"]
    assert {name: float(term.value) for name, term in bound.terms.items()} == {
        name: float(term.value) for name, term in flat.terms.items()
    }
    assert not torch.equal(bound.loss, flat.loss)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_weights_sum_to_the_window_in_the_mean_over_counts(name):
    canvas, vocabulary = canvas_of(("text_to_image",)), tiny_model().vocabulary
    length = int(canvas.is_free.sum())
    (window,) = canvas.free_windows()
    schedule = get_mask_schedule(name)
    bound, flat = 0.0, 0.0
    for count in range(1, length + 1):
        time, likely = [
            schedule.inverse(1 - (count - 0.5) / length),
            schedule.inverse(1 - count / length) - schedule.inverse(1 - (count - 1) / length),
        ]
        corrupted = MaskedDiffusion(mask_schedule={"image": name}).corrupt(
            canvas,
            vocabulary,
            generator=generators([count]),
            uniforms={window: torch.tensor([time], dtype=torch.float64)},
        )
        assert int(corrupted.is_target.sum()) == count
        for weight in (corrupted.weight, corrupted.flat_weight):
            assert weight[corrupted.is_target].unique().numel() == 1
            assert bool((weight[~corrupted.is_target] == 0).all())
        # The bound's total is that of uniform counts, count for count.
        assert float(corrupted.weight.sum()) * likely == pytest.approx(1, rel=1e-5)
        bound += float(corrupted.weight.sum()) * likely
        flat += float(corrupted.flat_weight.sum()) * likely
    assert bound == pytest.approx(length)
    assert flat == pytest.approx(length)


def test_a_linear_mask_schedule_is_none_and_cosine_masks_more_of_its_modality_alone():
    tasks = ("text_to_image",) * 32 + ("caption",) * 32
    canvas, vocabulary = canvas_of(tasks), tiny_model().vocabulary
    context = MaskedDiffusion().prepare(
        [Batch(canvas, ("",) * 64, tasks, tuple(range(64)))],
        seed=0,
        step=0,
        gather=list,
        num_processes=1,
    )
    found = {
        name: MaskedDiffusion(mask_schedule={"image": name} if name else None).corrupt(
            canvas,
            vocabulary,
            generator=generators(range(64)),
            uniforms=context.contexts[0]["uniforms"],
        )
        for name in (None, "linear", "cosine")
    }
    uniform, linear, cosine = found.values()
    assert torch.equal(uniform.is_target, linear.is_target)
    assert torch.allclose(uniform.weight, linear.weight, rtol=1e-6)
    assert torch.allclose(uniform.flat_weight, linear.flat_weight, rtol=1e-6)
    assert torch.equal(uniform.is_target[32:], cosine.is_target[32:])
    assert torch.equal(uniform.weight[32:], cosine.weight[32:])
    lengths = canvas.is_free[:32].sum(dim=1)
    expected = mean_scheduled_count(lengths, get_mask_schedule("cosine")).sum()
    assert float(cosine.is_target[:32].sum()) == pytest.approx(float(expected), rel=0.05)
    assert float(expected) > 1.1 * float((lengths + 1).sum() / 2)


def test_holes_weigh_the_same_under_every_schedule():
    canvas, vocabulary = canvas_of(("text_to_image",) * 4), tiny_model().vocabulary
    found = [
        MaskedDiffusion(hole_share=1.0, mask_schedule=schedule).corrupt(
            canvas, vocabulary, generator=generators(range(4)), draws=(0.5,) * 4
        )
        for schedule in (None, {"image": "cosine"})
    ]
    for corrupted in found:
        counts = corrupted.is_target.sum(dim=1)
        lengths = canvas.is_free.sum(dim=1)
        assert torch.allclose(corrupted.weight.sum(dim=1), lengths.float())
        expected = 2 * lengths / (lengths + 1) * counts
        assert torch.allclose(corrupted.flat_weight.sum(dim=1), expected)


def test_only_free_positions_are_masked_and_levels_are_the_realised_share():
    canvas, vocabulary = canvas_of(), tiny_model().vocabulary
    corrupted = MaskedDiffusion().corrupt(canvas, vocabulary, generator=generators(range(6)))
    changed = corrupted.canvas.input_ids != canvas.input_ids
    assert torch.equal(changed, corrupted.is_target)
    assert not bool((changed & ~canvas.is_free).any())
    assert bool(vocabulary.is_masked(corrupted.canvas.input_ids[corrupted.is_target]).all())
    levels = noise_levels(corrupted.canvas, vocabulary)
    expected = 1 / corrupted.weight[corrupted.is_target]
    assert torch.allclose(levels[corrupted.is_target], expected)


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_accumulated_micro_batches_equal_one_batch(size):
    """Same losses and gradients, whatever is padded and however the batch is cut."""
    canvas, model = canvas_of(), tiny_model().double()
    objective = MaskedDiffusion(hole_share=0.5, condition_noise={"caption": 0.8, "vqa": 0.5})
    draws = (0.1, 0.9, 0.2, 0.9, 0.9, 0.3)

    def run(order, cut):
        parts = [order[start : start + cut] for start in range(0, len(order), cut)]
        batches = [
            Batch(
                drop_empty_columns(canvas.select_rows(torch.tensor(part))),
                keys=tuple(str(row) for row in part),
                tasks=tuple(TASKS[row] for row in part),
                rows=tuple(part),
                draws=tuple(draws[row] for row in part),
            )
            for part in parts
        ]
        plan = objective.prepare(batches, seed=5, step=2, gather=list, num_processes=1)
        model.zero_grad()
        total = 0.0
        parts = zip(batches, plan.contexts, plan.loss_scales, strict=True)
        for batch, context, scale in parts:
            draw = generators(batch.rows)
            output = objective(model, batch.inputs, generator=draw, **context)
            (output.loss * scale).backward()
            total += float(output.loss.detach())
        return total, {
            name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
        }

    loss, gradients = run(list(range(6)), 6)
    cut_loss, cut_gradients = run([3, 5, 0, 1, 4, 2], size)
    assert cut_loss == pytest.approx(loss, rel=1e-12)
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, cut_gradients[name], rtol=1e-9, atol=1e-12), name


def test_counts_are_stratified_within_each_task():
    tasks = ("caption",) * 4 + ("text_to_image",) * 4
    canvas = canvas_of(tasks)
    batch = Batch(canvas, ("",) * 8, tasks, tuple(range(8)))
    context = (
        MaskedDiffusion().prepare([batch], seed=0, step=0, gather=list, num_processes=1).contexts[0]
    )
    for uniforms in context["uniforms"].values():
        for rows in (slice(0, 4), slice(4, 8)):
            strata = (uniforms[rows] * 4).floor().sort().values
            assert strata.tolist() == [0, 1, 2, 3]


def test_independent_counts_and_holes_are_not_bounds():
    canvas, model = canvas_of(), tiny_model()
    output = MaskedDiffusion(hole_share=0.5)(
        model, canvas, generator=generators(range(6)), tasks=TASKS, draws=(0.1, *[0.9] * 5)
    )
    assert output.is_bound.tolist() == [False, True, True, False, True, True]
    assert "loss/image/joint" in output.terms
    assert "nelbo/image/joint" not in output.terms
    assert "loss/image/text_to_image" in output.terms
    assert "nelbo/text/caption" in output.terms


def test_a_hole_is_a_rectangle():
    canvas, vocabulary = canvas_of(("text_to_image",) * 20), tiny_model().vocabulary
    corrupted = MaskedDiffusion(hole_share=1.0).corrupt(
        canvas, vocabulary, generator=generators(range(20)), draws=[0.0] * 20
    )
    assert bool(corrupted.is_apart.all())
    for row in range(20):
        places = canvas.position_ids[row, corrupted.is_target[row]][:, 1:]
        sides = places.amax(0) - places.amin(0) + 1
        assert len(places) == int(sides.prod())


def test_condition_noise_masks_known_windows_of_its_task_alone_and_without_loss():
    tasks = ("caption", "vqa", "caption", "text_to_image")
    canvas, model = canvas_of(tasks), tiny_model()
    vocabulary, draws = model.vocabulary, [0.5, 0.99, 0.0, 0.99]
    noisy, plain = (
        MaskedDiffusion(condition_noise={"caption": share}).corrupt(
            canvas, vocabulary, generator=generators(range(4)), draws=draws, tasks=tasks
        )
        for share in (0.8, 0.0)
    )
    assert torch.equal(noisy.is_target, plain.is_target)  # The draws of the targets come first.
    assert torch.equal(noisy.weight, plain.weight)
    extra = (noisy.canvas.input_ids != canvas.input_ids) & ~noisy.is_target
    is_image = canvas.modality_ids == vocabulary.modality_id("image")
    is_inside = torch.zeros_like(extra)
    for window in canvas.windows():
        is_inside[:, canvas.window_slice(window)] = True
    known = (is_image & is_inside & ~canvas.is_free & ~canvas.is_padding).sum(dim=1)
    expected = [math.floor(0.5 * (math.floor(0.8 * int(known[0])) + 1)), 0, 0, 0]
    assert extra.sum(dim=1).tolist() == expected
    assert expected[0] > 0
    assert not bool((extra & ~(is_image & is_inside)).any())
    assert bool(vocabulary.is_masked(noisy.canvas.input_ids[extra]).all())
    level = noise_levels(noisy.canvas, vocabulary)[extra].unique()
    assert level.tolist() == pytest.approx([expected[0] / int(known[0])])
    assert noisy.is_apart.tolist() == [True, False, False, False]
    output = MaskedDiffusion(condition_noise={"caption": 0.8})(
        model, canvas, generator=generators(range(4)), draws=draws, tasks=tasks
    )
    assert output.is_bound.tolist() == [False, True, True, True]
    measured = MaskedDiffusion(condition_noise={"caption": 1.0}).corrupt(
        canvas, vocabulary, generator=generators(range(4)), tasks=tasks
    )  # Without draws, as where a bound is measured.
    assert torch.equal(measured.canvas.input_ids, plain.canvas.input_ids)


def test_condition_noise_of_a_row_does_not_depend_on_others_or_on_holes():
    vocabulary, names = tiny_model().vocabulary, ("text_to_image", "caption", "vqa")
    noise = {"text_to_image": 1.0, "caption": 0.8, "unconditional_image": 1.0}

    def corrupt(canvas, tasks, draws, seeds, hole_share=0.0):
        objective = MaskedDiffusion(condition_noise=noise, hole_share=hole_share)
        half = torch.full((len(tasks),), 0.5).double()
        uniforms = dict.fromkeys(canvas.free_windows(), half)
        return objective.corrupt(
            canvas,
            vocabulary,
            generator=generators(seeds),
            uniforms=uniforms,
            draws=draws,
            tasks=tasks,
        )

    canvas, numbers = canvas_of(names), [0.7, 0.9, 0.9]
    together = corrupt(canvas, names, numbers, [1, 2, 3])
    for row, task in enumerate(names):
        own = drop_empty_columns(canvas.select_rows(torch.tensor([row])))
        alone = corrupt(own, (task,), numbers[row : row + 1], [row + 1])
        one, other = (
            corrupted.canvas.input_ids[place][~corrupted.canvas.is_padding[place]]
            for corrupted, place in ((alone, 0), (together, row))
        )
        assert torch.equal(one, other)
    assert together.is_apart.tolist() == [True, True, False]
    # A number just below the hole's share says "hole" and leaves nearly 1 for the prompt.
    drawing = canvas_of(("text_to_image",))
    holed = corrupt(drawing, ("text_to_image",), [0.0499], [1], hole_share=0.05)
    is_text = drawing.modality_ids == vocabulary.modality_id("text")
    is_there = is_text & ~holed.canvas.is_padding & (holed.canvas.window_ids > 0)
    assert bool(vocabulary.is_masked(holed.canvas.input_ids[is_there]).all())
    # A condition that is all masks already stays a bound.
    task = ("unconditional_image",)
    nothing = corrupt(canvas_of(task), task, [0.99], [1])
    assert nothing.is_apart.tolist() == [False]


def test_condition_noise_names_tasks_and_shares():
    with pytest.raises(ConfigError, match="Unknown task in `condition_noise` `captions`"):
        MaskedDiffusion(condition_noise={"captions": 0.5})
    with pytest.raises(ConfigError, match=r"`condition_noise.caption` must lie in \[0, 1\]; got 2"):
        MaskedDiffusion(condition_noise={"caption": 2})


def test_holes_across_blocks_are_refused():
    processor, vocabulary = toy_processor(attention="causal"), tiny_model().vocabulary
    canvas = processor.training_canvas(rows_of(("text_to_image", "caption")))
    options = {"generator": generators(range(2)), "draws": [0.9, 0.9]}
    with pytest.raises(ConfigError, match="`hole_share` above 0 needs grids .* piece; got 0.1"):
        MaskedDiffusion(hole_share=0.1).corrupt(canvas, vocabulary, **options)
    MaskedDiffusion().corrupt(canvas, vocabulary, **options)
    canvas = toy_processor(blocks=(4,)).training_canvas(rows_of(("text_to_image", "caption")))
    MaskedDiffusion(hole_share=0.1).corrupt(canvas, vocabulary, **options)  # Texts have no holes.


def test_content_leaves_out_fill():
    canvas, model = canvas_of(("caption",)), tiny_model()
    output = MaskedDiffusion()(
        model, canvas, generator=generators([0]), uniforms={3: torch.tensor([1.0])}
    )
    content = int(output.terms["content/text"].count)
    assert content == len("a cat") + 1
    assert int(output.terms["nelbo/text"].count) == int(canvas.is_free.sum()) > content


def test_loss_weights_scale_one_modality():
    canvas, model = canvas_of(("joint",)), tiny_model()
    uniforms = {1: torch.tensor([0.6]), 3: torch.tensor([0.6])}

    def loss(**weights):
        objective = MaskedDiffusion(loss_weights=weights)
        output = objective(model, canvas, generator=generators([0]), uniforms=uniforms)
        return float(output.loss.detach())

    both, image, text = loss(), loss(text=0.0), loss(image=0.0)
    assert both == pytest.approx(image + text, rel=1e-5)
    assert min(image, text) > 0


def test_task_weights_scale_the_rows_of_a_task_and_no_report():
    canvas, model = canvas_of(("caption", "vqa")), tiny_model()
    tasks = ("caption", "vqa")
    uniforms = {3: torch.tensor([0.6, 0.6])}

    def run(**weights):
        objective = MaskedDiffusion(task_weights=weights)
        return objective(
            model, canvas, generator=generators([0, 1]), uniforms=uniforms, tasks=tasks
        )

    def total(output):
        return float(output.loss.detach())

    plain, caption, answer = run(), run(vqa=0.0), run(caption=0.0)
    assert total(caption) + total(answer) == pytest.approx(total(plain), rel=1e-5)
    assert total(run(vqa=3.0)) == pytest.approx(total(plain) + 2 * total(answer), rel=1e-5)
    assert min(total(caption), total(answer)) > 0
    assert float(run(vqa=3.0).terms["nelbo/text"].total) == float(plain.terms["nelbo/text"].total)


def test_a_row_without_targets_keeps_a_gradient_path():
    canvas = canvas_of(("caption",))
    canvas = canvas.replace(is_free=torch.zeros_like(canvas.is_free))
    output = MaskedDiffusion()(tiny_model(), canvas, generator=generators([0]))
    output.loss.backward()
    assert float(output.loss.detach()) == 0.0
    assert output.num_targets == 0


def test_wrong_options_are_explained():
    with pytest.raises(ConfigError, match="Did you mean `masked_diffusion`"):
        build_objective("masked_difusion")
    with pytest.raises(ConfigError, match="`objective.options` of `masked_diffusion`"):
        build_objective("masked_diffusion", holes=0.1)
    with pytest.raises(ConfigError, match=r"`hole_share` must lie in \[0, 1\]; got 2"):
        MaskedDiffusion(hole_share=2)
    with pytest.raises(ConfigError, match=r"`mask_weighting.image` must be one of.*mean `flat`"):
        MaskedDiffusion(mask_weighting={"image": "flatt"})
    with pytest.raises(VocabularyError, match="Did you mean `image`"):
        MaskedDiffusion(mask_weighting={"imge": "flat"})(
            tiny_model(), canvas_of(("joint",)), generator=generators([0])
        )
    with pytest.raises(ConfigError, match="Did you mean `vqa`"):
        MaskedDiffusion(task_weights={"vqas": 2.0})
    with pytest.raises(ConfigError, match="`task_weights.vqa` must not be negative; got -1"):
        MaskedDiffusion(task_weights={"vqa": -1})
    with pytest.raises(ConfigError, match="Unknown modality in `loss_weights` `imge`"):
        MaskedDiffusion(loss_weights={"imge": 1.0})(
            tiny_model(), canvas_of(("joint",)), generator=generators([0])
        )


def test_two_steps_lower_the_loss_on_one_batch():
    canvas, model = canvas_of(), tiny_model(std=0.05)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(3):
        output = MaskedDiffusion()(model, canvas, generator=generators(range(6)))
        losses.append(float(output.loss.detach()))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    assert losses[2] < losses[1] < losses[0]
    assert losses[0] > math.log(2)


def test_an_auxiliary_loss_counts_once_however_the_batch_is_cut():
    canvas, model = canvas_of(), tiny_model()

    class Routed:
        def __init__(self):
            self.vocabulary, self.compute_logits = model.vocabulary, model.compute_logits

        def __call__(self, *args, **kwargs):
            output = model(*args, **kwargs)
            output.auxiliary_loss = torch.tensor(100.0)
            return output

    objective, totals = MaskedDiffusion(), []
    for routed in (model, Routed()):
        batches = [
            Batch(canvas.select_rows(part), ("",) * 3, TASKS[part], tuple(range(6))[part])
            for part in (slice(0, 3), slice(3, 6))
        ]
        plan = objective.prepare(batches, seed=0, step=0, gather=list, num_processes=1)
        pairs = zip(batches, plan.contexts, strict=True)
        losses = [
            objective(routed, b.inputs, generator=generators(b.rows), **context).loss.detach()
            for b, context in pairs
        ]
        totals.append(float(sum(losses)))
    assert totals[1] - totals[0] == pytest.approx(100.0, rel=1e-4)
