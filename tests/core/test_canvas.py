import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from multimodal_dlm.canvas import Canvas, LevelGroups, noise_levels
from multimodal_dlm.errors import CanvasError
from multimodal_dlm.vocabulary import UnifiedVocabulary
from tests.core.toy import toy_processor, toy_vocabulary


def three_modality_canvas() -> tuple[UnifiedVocabulary, Canvas]:
    vocabulary = UnifiedVocabulary.build(
        {"text": [("text", 5)], "image": [("image.0", 4)], "action": [("action", 3)]}
    )
    windows = torch.tensor([[0, 1, 1, 2, 2, 2, 3, 3]])
    modalities = torch.tensor([[0, 0, 0, 1, 1, 1, 2, 2]])
    masks = [vocabulary.mask_token_id(m) for m in vocabulary.modalities]
    image, action = vocabulary.columns("image").start, vocabulary.columns("action").start
    ids = torch.tensor(
        [[vocabulary.special_id("bos"), 1, masks[0], masks[1], image, masks[1], action, action + 2]]
    )
    flags = torch.zeros_like(ids, dtype=torch.bool)
    canvas = Canvas(
        input_ids=ids,
        window_ids=windows,
        modality_ids=modalities,
        position_ids=torch.zeros(1, 8, 1, dtype=torch.long),
        order=torch.zeros_like(ids),
        document_ids=torch.zeros_like(ids),
        is_free=vocabulary.is_masked(ids),
        is_padding=flags,
    )
    return vocabulary, canvas


def test_three_modalities_pass():
    vocabulary, canvas = three_modality_canvas()
    canvas.validate(vocabulary)
    assert canvas.free_windows() == [1, 2]
    assert [canvas.window_modality(w) for w in canvas.windows()] == [0, 1, 2]
    levels = noise_levels(canvas, vocabulary)[0].tolist()
    assert levels == pytest.approx([0, 0, 0.5, 2 / 3, 0, 2 / 3, 0, 0])


def test_noise_level_counts_frozen_masks_and_leaves_padding_out():
    processor = toy_processor()
    canvas = processor.unconditional(processor.text_to_image(["ab", "c"]))
    levels = noise_levels(canvas, processor.vocabulary)
    answer = canvas.window_slice(processor.answer_window)
    assert (levels[:, answer] == 1).all()
    padded = processor.text_to_image(["abcdef", "c"])
    ids = padded.input_ids.clone()
    answer = padded.window_slice(processor.answer_window)
    ids[:, answer.start] = processor.vocabulary.mask_token_id("text")
    levels = noise_levels(padded.replace(input_ids=ids), processor.vocabulary)
    assert levels[:, answer.start].tolist() == pytest.approx([1 / 7, 1 / 2])


def test_blocks_of_a_window_are_noise_groups_of_their_own():
    vocabulary, canvas = three_modality_canvas()
    order = torch.tensor([[0, 0, 0, 0, 0, 1, 0, 0]])
    levels = noise_levels(canvas.replace(order=order), vocabulary)
    assert levels[0, 3].item() == pytest.approx(0.5)
    assert levels[0, 5].item() == pytest.approx(1.0)


def test_groups_found_once_give_the_levels_of_every_canvas_of_the_run():
    vocabulary, canvas = three_modality_canvas()
    canvas = Canvas(
        **{name: value.repeat(2, *[1] * (value.dim() - 1)) for name, value in vars(canvas).items()}
    )
    canvas = canvas.replace(is_padding=canvas.is_padding.index_fill(1, torch.tensor([1]), True))
    groups = LevelGroups.of(canvas)
    seen = []
    for column in (3, 5, 2):
        changed = canvas.input_ids.clone()
        changed[1, column] = vocabulary.columns("text").start
        canvas = canvas.replace(input_ids=changed)
        levels = groups.levels(vocabulary.is_masked(canvas.input_ids))
        assert torch.equal(levels, noise_levels(canvas, vocabulary))
        seen.append(levels[1].tolist())
    assert len({tuple(levels) for levels in seen}) == 3


def test_a_copy_knows_the_windows_of_the_original_unless_they_were_exchanged():
    _, canvas = three_modality_canvas()
    assert canvas.window_slice(2) == slice(3, 6)
    assert canvas.replace(input_ids=canvas.input_ids + 0)._runs is canvas._runs
    moved = canvas.replace(window_ids=canvas.window_ids.roll(1, dims=1))
    assert moved.window_slice(2) == slice(4, 7)


def test_documents_of_a_row_are_noise_groups_of_their_own():
    vocabulary, canvas = three_modality_canvas()
    documents = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1]])
    levels = noise_levels(canvas.replace(document_ids=documents), vocabulary)
    assert levels[0, 3].item() == pytest.approx(0.5)
    assert levels[0, 5].item() == pytest.approx(1.0)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text("abc", max_size=9), min_size=1, max_size=4))
def test_levels_of_a_row_do_not_depend_on_the_batch(prompts):
    processor = toy_processor()
    together = processor.text_to_image(prompts)
    levels = noise_levels(together, processor.vocabulary)
    for index, prompt in enumerate(prompts):
        alone = processor.text_to_image([prompt])
        expected = noise_levels(alone, processor.vocabulary)[0]
        kept = ~together.is_padding[index]
        assert torch.equal(levels[index][kept], expected)
        assert torch.equal(together.input_ids[index][kept], alone.input_ids[0])
        assert torch.equal(together.position_ids[index][kept], alone.position_ids[0])


def test_invariants_are_checked():
    vocabulary, canvas = three_modality_canvas()
    padded = torch.ones_like(canvas.is_padding)
    with pytest.raises(CanvasError, match="padding position may not be free"):
        canvas.replace(is_padding=padded).validate(vocabulary)
    free = torch.ones_like(canvas.is_free)
    with pytest.raises(CanvasError, match="structure position"):
        canvas.replace(is_free=free).validate(vocabulary)
    mixed = canvas.modality_ids.clone()
    mixed[0, 2] = 1
    with pytest.raises(CanvasError, match="one modality only"):
        canvas.replace(modality_ids=mixed).validate(vocabulary)
    foreign = canvas.input_ids.clone()
    foreign[0, 1] = vocabulary.columns("image").start
    with pytest.raises(CanvasError, match="Window 1 holds `text`"):
        canvas.replace(input_ids=foreign).validate(vocabulary)
    torn = canvas.window_ids.clone()
    torn[0, 7] = 1
    with pytest.raises(CanvasError, match="one run"):
        canvas.replace(window_ids=torn).validate(vocabulary)
    with pytest.raises(CanvasError, match="no window 9"):
        canvas.window_slice(9)
    unknown = canvas.input_ids.clone()
    unknown[0, 0] = 10_000
    with pytest.raises(CanvasError, match="must lie in"):
        canvas.replace(input_ids=unknown).validate(vocabulary)
    with pytest.raises(CanvasError, match="must have shape"):
        canvas.replace(order=canvas.order[:, :3]).validate(vocabulary)


def test_rows_can_be_selected():
    processor = toy_processor()
    canvas = processor.text_to_image(["ab", "c", "d"])
    picked = canvas.select_rows(torch.tensor([2, 0]))
    assert torch.equal(picked.input_ids, canvas.input_ids[[2, 0]])
    assert picked.validate(toy_vocabulary()).batch_size == 2
