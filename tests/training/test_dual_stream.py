"""Blocks in training: the states of inference, the entropy of an oracle, weights block by block."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from multimodal_dlm.canvas import Canvas, noise_levels
from multimodal_dlm.models.attention_plan import AttentionPlan
from multimodal_dlm.processing import TrainingRow
from multimodal_dlm.training.batches import drop_empty_columns
from multimodal_dlm.training.dual_stream import Streams
from multimodal_dlm.training.objectives import MaskedDiffusion
from multimodal_dlm.training.packing import canvas_states, pack_rows
from multimodal_dlm.vocabulary import UnifiedVocabulary
from tests.core.toy import GRID, toy_processor
from tests.training.tiny import canvas_of, generators, tiny_model

LETTERS = UnifiedVocabulary.build({"letters": [("letters", 3)]})
SEQUENCES = torch.tensor(list(itertools.product(range(3), repeat=4)))


def block_canvas() -> Canvas:
    """Answers in blocks of 4, 3 and 2, with and without a condition."""
    codes = torch.arange(GRID[0] * GRID[1]).view(GRID).numpy()
    rows = [
        TrainingRow("text", instruction="what?", text="abcdefgh", window_draw=0.0),
        TrainingRow("text", text="abcd", window_draw=0.5),
        TrainingRow("vqa", (codes,), "is it?", "no, an owl", window_draw=0.9),
        TrainingRow("caption", (codes,), text="a cat", window_draw=0.5),
    ]
    return drop_empty_columns(toy_processor(blocks=(4, 3, 2)).training_canvas(rows))


def corrupted(canvas: Canvas, vocabulary: UnifiedVocabulary):
    return MaskedDiffusion().corrupt(canvas, vocabulary, generator=generators(range(4)))


@pytest.mark.parametrize("pack_length", [None, 30, 1000])
@pytest.mark.parametrize("conditioning", ["none", "ada_norm_single"])
def test_the_states_of_a_block_are_those_of_inference(pack_length, conditioning):
    """There the blocks before it are clean, it is noisy, and those behind it are not seen."""
    model = tiny_model(noise_conditioning=conditioning).double().eval()
    clean = block_canvas()
    noisy = corrupted(clean, model.vocabulary).canvas
    packing = None if pack_length is None else pack_rows(clean.is_padding, pack_length)
    levels = noise_levels(noisy, model.vocabulary)
    with torch.no_grad():
        found = canvas_states(model, noisy, levels, packing, clean=clean).hidden_states
    assert found.shape[:2] == clean.input_ids.shape
    num_compared = 0
    for block in range(int(clean.order.max()) + 1):
        ids = torch.where(clean.order < block, clean.input_ids, noisy.input_ids)
        current = noisy.replace(input_ids=ids)
        with torch.no_grad():
            expected = model(
                ids,
                noise_levels=noise_levels(current, model.vocabulary),
                position_ids=current.position_ids,
                attention_plan=AttentionPlan.from_canvas(current),
            ).hidden_states
        part = (clean.order == block) & ~clean.is_padding
        assert (found - expected)[part].abs().max() <= 1e-10
        num_compared += int((part & clean.is_free).sum())
    assert num_compared == int(clean.is_free.sum())


def test_rows_in_one_piece_have_one_stream():
    canvas = canvas_of()
    levels = torch.zeros(canvas.input_ids.shape)
    streams = Streams.of(canvas, levels, canvas)
    assert streams.is_noisy is None
    assert streams.canvas is canvas


def test_only_blocks_that_others_follow_are_copied():
    canvas = block_canvas()
    streams = Streams.of(canvas, torch.zeros(canvas.input_ids.shape), canvas)
    copies = streams.canvas.select_columns(slice(canvas.length, None))
    last = canvas.order.masked_fill(~canvas.is_free, -1).amax(dim=1)
    for row in range(canvas.batch_size):
        kept = ~copies.is_padding[row]
        expected = canvas.is_free[row] & (canvas.order[row] < last[row])
        assert copies.input_ids[row, kept].tolist() == canvas.input_ids[row, expected].tolist()
    assert not bool(copies.is_free.any())


class Oracle:
    """p(letter | letters that the plan lets it see) by enumeration; states are logits."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(3)
        joint = torch.rand(len(SEQUENCES), generator=draw, dtype=torch.float64).pow(6)
        self.joint = joint / joint.sum()
        self.vocabulary = LETTERS

    def __call__(self, input_ids, *, position_ids, attention_plan, **_):
        columns = self.vocabulary.to_columns(input_ids, "letters")
        places = position_ids[..., 0]
        mask = attention_plan.mask
        shape = (len(columns), columns.shape[1], columns.shape[1])
        seen = torch.ones(shape, dtype=torch.bool) if mask is None else mask[:, 0]
        is_held = (columns == 3)[..., None] | (SEQUENCES.T[places] == columns[..., None])
        is_possible = (~seen[..., None] | is_held[:, None]).all(dim=2)
        posterior = self.joint * is_possible
        one_hot = torch.nn.functional.one_hot(SEQUENCES, 3).double()
        chances = torch.einsum("bqs,bqsv->bqv", posterior, one_hot.transpose(0, 1)[places])
        logits = (chances / posterior.sum(-1, keepdim=True)).log()
        return SimpleNamespace(hidden_states=logits, auxiliary_loss=None)

    def compute_logits(self, states, modality):
        return states


def letters_canvas(columns: torch.Tensor, order: list[int]) -> Canvas:
    zeros = torch.zeros(columns.shape, dtype=torch.long)
    places = torch.arange(columns.shape[1]).expand(columns.shape)
    return Canvas(
        input_ids=LETTERS.from_columns(columns, "letters"),
        window_ids=zeros + 1,
        modality_ids=zeros,
        position_ids=torch.stack([places, zeros, zeros], dim=-1),
        order=torch.tensor(order).expand(columns.shape).clone(),
        document_ids=zeros,
        is_free=torch.ones(columns.shape, dtype=torch.bool),
        is_padding=torch.zeros(columns.shape, dtype=torch.bool),
    )


@pytest.mark.parametrize("schedule", [None, {"letters": "cosine"}])
@pytest.mark.parametrize("order", [[0, 0, 1, 1], [0, 1, 1, 2], [0, 1, 2, 3]])
def test_a_perfect_denoiser_pays_the_entropy_block_by_block(order, schedule):
    """Less would mean that a block sees its own clean copy, more that it misses an earlier one."""
    model = Oracle()
    entropy = -(model.joint * model.joint.log()).sum()
    repeats, total = 60, torch.zeros((), dtype=torch.float64)
    for index, row in enumerate(SEQUENCES):
        canvas = letters_canvas(row.expand(repeats, -1), order)
        objective = MaskedDiffusion(mask_schedule=schedule)
        output = objective(model, canvas, generator=torch.Generator().manual_seed(index))
        total = total + model.joint[index] * output.loss * len(order)
    assert bool(output.is_bound.all())
    tolerance = 1e-9 if order == [0, 1, 2, 3] else 0.02
    assert float(total) == pytest.approx(float(entropy), rel=tolerance)


def test_every_block_has_a_count_of_its_own():
    canvas, vocabulary = block_canvas(), tiny_model().vocabulary
    found = corrupted(canvas, vocabulary)
    shares = set()
    for row in range(canvas.batch_size):
        for block in canvas.order[row, canvas.is_free[row]].unique().tolist():
            part = canvas.is_free[row] & (canvas.order[row] == block)
            targets = part & found.is_target[row]
            length, count = int(part.sum()), int(targets.sum())
            assert 1 <= count <= length
            expected = torch.full((count,), length / count)
            assert torch.equal(found.weight[row, targets], expected)
            shares.add(count / length)
    assert len(shares) > 2
    assert bool((found.weight[~found.is_target] == 0).all())
