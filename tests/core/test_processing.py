import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from multimodal_dlm.errors import CanvasError, ConfigError, VocabularyError
from multimodal_dlm.layout import check_layout, make_layout
from multimodal_dlm.processing import TASKS, TrainingRow
from tests.core.toy import GRID, toy_processor

CODES = (torch.arange(12).view(2, *GRID),)


def free_windows(processor, canvas):
    names = dict.fromkeys(processor.image_windows, "image")
    names[processor.instruction_window] = "instruction"
    names[processor.answer_window] = "answer"
    return sorted({names[window] for window in canvas.free_windows()})


def orders(processor, canvas, row=0):
    found = {}
    for window in canvas.windows():
        part = canvas.window_slice(window)
        kept = ~canvas.is_padding[row, part]
        if kept.any():
            found[window] = canvas.order[row, part][kept].unique().tolist()
    return found


def test_text_to_image_row():
    processor = toy_processor()
    canvas = processor.text_to_image(["abc", ""]).validate(processor.vocabulary)
    assert free_windows(processor, canvas) == ["image"]
    assert orders(processor, canvas) == {1: [1], 3: [0]}
    special = processor.vocabulary.special_ids
    assert canvas.input_ids[0, 0] == special["boi"]
    assert canvas.input_ids[0, 7] == special["eoi"]
    assert canvas.input_ids[0, 8:].tolist() == [99, 100, 101, special["eos"]]
    assert canvas.input_ids[1, 8:].tolist() == [special["eos"], *[special["pad"]] * 3]
    assert canvas.position_ids[0, 1:7, 1:].tolist() == [
        [row, column] for row in range(2) for column in range(3)
    ]
    assert canvas.position_ids[0, 8:, 0].tolist() == [1, 2, 3, 4]
    assert canvas.order[0, [0, 7]].tolist() == [1, 1]


def test_full_attention_has_one_order():
    processor = toy_processor(attention="full")
    for canvas in (processor.text_to_image(["a"]), processor.image_to_text(CODES, gen_length=3)):
        assert (canvas.order == 0).all()


def test_captioning_and_questions():
    processor = toy_processor()
    canvas = processor.image_to_text(CODES, questions=["q?", None], gen_length=5)
    canvas.validate(processor.vocabulary)
    assert free_windows(processor, canvas) == ["answer"]
    assert orders(processor, canvas) == {1: [0], 2: [1], 3: [2]}
    assert processor.decode_text(canvas, "instruction") == ["q?", ""]
    assert torch.equal(processor.image_codes(canvas)[0], CODES[0])
    answer = canvas.window_slice(processor.answer_window)
    assert canvas.position_ids[0, answer, 0].tolist() == [4, 5, 6, 7, 8]
    assert canvas.position_ids[1, answer, 0].tolist() == [1, 2, 3, 4, 5]


def test_joint_windows_see_each_other():
    processor = toy_processor()
    canvas = processor.joint(2, gen_length=4).validate(processor.vocabulary)
    assert free_windows(processor, canvas) == ["answer", "image"]
    assert (canvas.order == 0).all()


def test_text_alone_starts_with_a_structure_token():
    processor = toy_processor()
    canvas = processor.text(["do", None], gen_length=3).validate(processor.vocabulary)
    assert canvas.input_ids[:, 0].tolist() == [processor.vocabulary.special_id("bos")] * 2
    assert canvas.windows() == [2, 3]


def test_inpainting_frees_the_hole_only():
    processor = toy_processor()
    hole = torch.zeros(2, *GRID, dtype=torch.bool)
    hole[0, 0, 1] = hole[1] = True
    canvas = processor.inpaint(CODES, hole, ["a", "b"]).validate(processor.vocabulary)
    part = canvas.window_slice(1)
    assert canvas.is_free[:, part].sum(dim=1).tolist() == [1, 6]
    known = ~hole.flatten(1)
    ids = processor.vocabulary.to_input_ids(CODES[0], "image.0").flatten(1)
    assert torch.equal(canvas.input_ids[:, part][known], ids[known])


def test_templates_free_their_markers_only():
    processor = toy_processor()
    canvas = processor.infill(["a[MASK]b[MASK][MASK]"]).validate(processor.vocabulary)
    answer = canvas.window_slice(processor.answer_window)
    assert canvas.is_free[0, answer].tolist() == [False, True, False, True, True, False]
    assert canvas.input_ids[0, answer][-1] == processor.vocabulary.special_id("eos")


def test_unconditional_branches():
    processor = toy_processor()
    masks = {m: processor.vocabulary.mask_token_id(m) for m in ("text", "image")}
    branch = processor.unconditional(processor.text_to_image(["abc", "a"]))
    answer = branch.validate(processor.vocabulary).window_slice(processor.answer_window)
    assert (branch.input_ids[:, answer] == masks["text"]).all()
    assert branch.input_ids[:, answer].shape[1] == 4
    assert free_windows(processor, branch) == ["image"]

    branch = processor.unconditional(
        processor.image_to_text(CODES, questions=["q?", "r?"], gen_length=4)
    )
    assert (branch.input_ids[:, branch.window_slice(1)] == masks["image"]).all()
    assert processor.decode_text(branch, "instruction") == ["q?", "r?"]
    assert free_windows(processor, branch) == ["answer"]

    negative = processor.unconditional(
        processor.text_to_image(["abc", "a"]), negative_prompts=["x", "yz"]
    )
    assert processor.decode_text(negative) == ["x", "yz"]
    branch = processor.unconditional(processor.text(["do", "it"], gen_length=3))
    assert (branch.input_ids[:, branch.window_slice(2)] == masks["text"]).all()


def test_the_unconditional_branch_keeps_what_is_already_written():
    processor = toy_processor()
    canvas = processor.text_to_image(["abc", "a"])
    ids = canvas.input_ids.clone()
    ids[:, 2] = processor.vocabulary.columns("image").start + 7
    branch = processor.unconditional(canvas.replace(input_ids=ids))
    assert torch.equal(branch.input_ids[:, :8], ids[:, :8])
    assert torch.equal(branch.order[:, :8], canvas.order[:, :8])


def test_guidance_without_a_condition_is_refused():
    processor = toy_processor()
    with pytest.raises(CanvasError, match=r"guidance_scale=1\.0"):
        processor.unconditional(processor.joint(1, gen_length=3))
    canvas = processor.image_to_text(CODES, gen_length=3)
    with pytest.raises(ConfigError, match="negative_prompt"):
        processor.unconditional(canvas, negative_prompts=["a", "b"])


@pytest.mark.parametrize("task", TASKS)
def test_training_rows_of_every_task(task):
    processor = toy_processor()
    codes = None if task == "text" else (CODES[0][1],)
    row = TrainingRow(task, codes, "why" if task in ("vqa", "text") else None, "abc", 0.9)
    canvas = processor.training_canvas([row]).validate(processor.vocabulary)
    free = {
        "text_to_image": ["image"],
        "unconditional_image": ["image"],
        "joint": ["answer", "image"],
    }.get(task, ["answer"])
    assert free_windows(processor, canvas) == free
    is_masked = processor.vocabulary.is_masked(canvas.input_ids)
    assert not (is_masked & canvas.is_free).any()
    assert bool(is_masked.any()) == task.startswith("unconditional")


def test_a_mixed_batch_equals_its_rows():
    processor = toy_processor()
    rows = [
        TrainingRow("text", None, "why", "abc", 0.9),
        TrainingRow("vqa", (CODES[0][0],), "who", "me", 0.1),
        TrainingRow("text_to_image", (CODES[0][1],), None, "abcdef"),
    ]
    together = processor.training_canvas(rows).validate(processor.vocabulary)
    for index, row in enumerate(rows):
        alone = processor.training_canvas([row])
        kept = ~together.is_padding[index]
        for name in ("input_ids", "window_ids", "order", "is_free", "position_ids"):
            got, expected = getattr(together, name)[index][kept], getattr(alone, name)[0]
            assert torch.equal(got, expected), name


@settings(max_examples=60, deadline=None)
@given(st.text("ab", max_size=15), st.floats(0, 0.999))
def test_training_windows_are_content_one_eos_and_fill(text, draw):
    processor = toy_processor()
    row = TrainingRow("caption", (CODES[0][0],), None, text, draw)
    canvas = processor.training_canvas([row])
    ids = canvas.input_ids[0, canvas.window_slice(processor.answer_window)].tolist()
    eos, fill = (processor.vocabulary.special_id(name) for name in ("eos", "fill"))
    assert len(text) + 1 <= len(ids) <= 16
    assert ids[len(text)] == eos
    assert set(ids[len(text) + 1 :]) <= {fill}
    assert processor.decode_text(canvas) == [text]


def test_the_length_of_a_training_window_says_little_about_the_text():
    """P(window 12 | text) changes with the text as 1 / log(17 / shortest window), nothing more."""
    processor = toy_processor()
    draws = (torch.arange(1000) + 0.5) / 1000

    def share_of_12(text):
        rows = [TrainingRow("caption", (CODES[0][0],), None, text, float(u)) for u in draws]
        canvas = processor.training_canvas(rows)
        part = canvas.window_slice(processor.answer_window)
        return float(((~canvas.is_padding[:, part]).sum(dim=1) == 12).float().mean())

    for length in (0, 3, 9):
        expected = math.log(13 / 12) / math.log(17 / (length + 1))
        assert share_of_12("a" * length) == pytest.approx(expected, abs=2e-3)


def test_conditions_carry_no_fill():
    processor = toy_processor()
    row = TrainingRow("text_to_image", (CODES[0][0],), None, "ab", 0.9)
    canvas = processor.training_canvas([row])
    assert canvas.input_ids[0, canvas.window_slice(3)].tolist() == [99, 100, 0]


def test_scoring_rows_are_clean_and_exact_in_length():
    processor = toy_processor()
    canvas = processor.score("caption", codes=CODES, texts=["ab", "c"])
    assert processor.decode_text(canvas) == ["ab", "c"]
    assert canvas.is_free.sum(dim=1).tolist() == [3, 2]
    canvas = processor.score("text_to_image", codes=CODES, texts=["ab", "c"])
    assert canvas.is_free.sum(dim=1).tolist() == [6, 6]


def test_levels_are_windows_at_the_same_places():
    processor = toy_processor(levels=2)
    codes = (CODES[0], CODES[0] + 1)
    canvas = processor.image_to_text(codes, gen_length=2).validate(processor.vocabulary)
    assert canvas.windows() == [1, 2, 4]
    first, second = canvas.window_slice(1), canvas.window_slice(2)
    assert torch.equal(canvas.position_ids[:, first], canvas.position_ids[:, second])
    back = processor.image_codes(canvas)
    assert all(torch.equal(got, given) for got, given in zip(back, codes, strict=True))


@pytest.mark.parametrize("levels", [1, 2])
def test_token_by_token_a_picture_is_closed_after_its_last_level(levels):
    processor = toy_processor(levels=levels, attention="causal")
    canvas = processor.text_to_image(["ab", "abc"])
    for rows in (canvas, processor.unconditional(canvas)):
        parts = [rows.order[:, rows.window_slice(window)] for window in range(1, levels + 1)]
        assert torch.cat(parts, dim=1).diff(dim=1).eq(1).all()
        end = rows.window_slice(levels).stop
        assert torch.equal(rows.order[:, end], parts[-1].max(dim=1).values + 1)


def test_bad_input_gets_a_sentence():
    processor = toy_processor()
    with pytest.raises(ConfigError, match="at most 16 tokens .* got 21"):
        processor.text_to_image(["a" * 20])
    with pytest.raises(ConfigError, match=r"1\.\.16 .* got 17"):
        processor.joint(1, gen_length=17)
    with pytest.raises(ConfigError, match="Did you mean `caption`"):
        processor.training_canvas([TrainingRow("captoin")])
    with pytest.raises(ConfigError, match="needs image `codes`"):
        processor.training_canvas([TrainingRow("caption")])
    with pytest.raises(ConfigError, match="no place for image"):
        processor.training_canvas([TrainingRow("text", (CODES[0][0],))])
    with pytest.raises(ConfigError, match="one entry per row"):
        processor.image_to_text(CODES, questions=["a"], gen_length=3)
    with pytest.raises(ConfigError, match="tuple of 1 levels"):
        processor.image_to_text((CODES[0], CODES[0]), gen_length=3)
    with pytest.raises(VocabularyError, match="got 99"):
        processor.image_to_text((CODES[0] * 0 + 99,), gen_length=3)
    with pytest.raises(ConfigError, match="`is_hole` must have shape"):
        processor.inpaint(CODES, torch.ones(2, 5, 5, dtype=torch.bool), ["a", "b"])
    with pytest.raises(ConfigError, match="at least one row"):
        processor.text_to_image([])


def test_layouts_are_checked():
    good = make_layout(max_text=16, num_image_tokens=4)
    with pytest.raises(ConfigError, match="Did you mean `max_window`"):
        check_layout({**good, "max_windows": {}})
    with pytest.raises(ConfigError, match="missing"):
        check_layout({"name": "unified_v1"})
    with pytest.raises(ConfigError, match="Did you mean `prefix`"):
        make_layout(max_text=16, num_image_tokens=4, condition_attention="prefx")
    with pytest.raises(ConfigError, match="must not exceed"):
        make_layout(max_text=4, num_image_tokens=4)


def answer_orders(processor, canvas, row=0):
    return canvas.order[row, canvas.window_slice(processor.answer_window)].tolist()


def test_an_answer_is_written_in_blocks():
    processor = toy_processor(blocks=(4, 3))
    canvas = processor.text(["ask", "a"], gen_length=10).validate(processor.vocabulary)
    for row in range(2):
        assert answer_orders(processor, canvas, row) == [2] * 4 + [3] * 4 + [4] * 2
    assert orders(processor, canvas)[processor.instruction_window] == [1]
    canvas = processor.text(["ask"], gen_length=7, block_length=3)
    assert answer_orders(processor, canvas) == [2] * 3 + [3] * 3 + [4]
    with pytest.raises(ConfigError, match=r"trained with \(4, 3\); got 5"):
        processor.text(["ask"], gen_length=7, block_length=5)
    with pytest.raises(ConfigError, match=r"trained with \(none\); got 4"):
        toy_processor().text(["ask"], gen_length=7, block_length=4)
    picture = processor.image_to_text(CODES, gen_length=6)
    assert answer_orders(processor, picture) == [2] * 4 + [3] * 2
    without = processor.unconditional(canvas)
    assert answer_orders(processor, without) == [2] * 3 + [3] * 3 + [4]
    assert orders(processor, without)[processor.instruction_window] == [1]


def test_training_draws_a_block_length_and_ends_with_the_block_of_eos():
    processor = toy_processor(blocks=(4, 3))
    rows = [TrainingRow("text", instruction="q", text="abcde", window_draw=u) for u in (0.1, 0.9)]
    canvas = processor.training_canvas([*rows, TrainingRow("text", text="abc", window_draw=0.0)])
    part = canvas.window_slice(processor.answer_window)
    lengths = canvas.is_free[:, part].sum(dim=1).tolist()
    assert lengths == [8, 6, 4]  # Six tokens in blocks of 4 and 3; four tokens.
    assert answer_orders(processor, canvas, 0) == [2] * 4 + [3] * 4
    assert answer_orders(processor, canvas, 1)[:6] == [2] * 3 + [3] * 3


def test_a_causal_row_is_ordered_token_by_token():
    processor = toy_processor(attention="causal")
    canvas = processor.text(["ask", "a"], gen_length=4)
    assert canvas.order.tolist() == [list(range(canvas.length))] * 2
    drawn = processor.text_to_image(["ab"])
    image, answer = (drawn.window_slice(w) for w in (1, processor.answer_window))
    assert int(drawn.order[0, answer].max()) < int(drawn.order[0, image].min())
    row = TrainingRow("text", instruction="q", text="abc", window_draw=0.9)
    trained = processor.training_canvas([row])
    assert int(trained.is_free.sum()) == 4  # No fill: the text ends with its `<eos>`.
    without = processor.unconditional(canvas)
    assert without.order.tolist() == [list(range(without.length))] * 2


def test_blocks_that_make_no_sense_are_refused():
    for attention in ("full", "causal"):
        with pytest.raises(
            ConfigError, match=f"needs `condition_attention: prefix`; got `{attention}`"
        ):
            toy_processor(attention=attention, blocks=(4,))
    with pytest.raises(ConfigError, match=r"whole numbers, 1 or more; got \[0\]"):
        toy_processor(blocks=(0,))
    assert "block_lengths" not in make_layout(max_text=4, num_image_tokens=4, unconditional_text=2)
