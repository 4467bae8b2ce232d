"""What each task promises beyond the common contract."""

import numpy as np
import pytest
import torch
from PIL import Image

from multimodal_dlm.errors import CanvasError, ConfigError
from multimodal_dlm.pipelines import (
    UnifiedImageToTextPipeline,
    UnifiedInpaintPipeline,
    UnifiedJointPipeline,
    UnifiedTextGenerationPipeline,
    UnifiedTextToImagePipeline,
)
from multimodal_dlm.schedulers import ConfidenceScheduler
from tests.pipelines.registry import hole, picture
from tests.pipelines.tiny import GRID, IMAGE_SIZE, MAX_TEXT, seeded

EOS, FILL = 0, 1
SAMPLED = {
    "text": {"temperature": 1.0, "choice_temperature": 1.0, "eos_column": EOS, "fill_column": FILL},
    "image": {"temperature": 1.0, "choice_temperature": 1.0},
}


def is_well_formed(row):
    """Content, one `<eos>`, then `<fill>`."""
    return row.count(EOS) == 1 and all(
        (token == FILL) == (position > row.index(EOS)) for position, token in enumerate(row)
    )


# Text to image.


@pytest.fixture
def draw(make):
    return make(UnifiedTextToImagePipeline)


def test_negative_prompt_changes_the_result(draw):
    arguments = {"num_inference_steps": 6, "output_type": "codes"}
    without = draw("a red apple", generator=seeded(0), **arguments).images[0]
    negative = draw(
        "a red apple", negative_prompt="a blue circle", generator=seeded(0), **arguments
    )
    assert not torch.equal(without, negative.images[0])
    several = draw(
        ["a red apple", "a"],
        negative_prompt=["a blue circle", "yes"],
        generator=seeded(0, 1),
        **arguments,
    )
    assert torch.equal(several.images[0][:1], negative.images[0])


def test_negative_prompts_must_match_the_prompts(draw):
    with pytest.raises(ConfigError, match="`negative_prompt` must be one string or one per prompt"):
        draw(["a", "b"], negative_prompt=["c", "d", "e"])


def test_pictures_of_one_prompt_stand_side_by_side(draw):
    arguments = {"num_inference_steps": 4, "output_type": "codes"}
    both = draw(
        ["a red apple", "a"], num_images_per_prompt=2, generator=seeded(0, 1, 2, 3), **arguments
    )
    second = draw("a", num_images_per_prompt=2, generator=seeded(2, 3), **arguments)
    assert both.images[0].shape == (4, *GRID)
    assert torch.equal(both.images[0][2:], second.images[0])


def test_output_types_hold_the_same_pictures(draw):
    outputs = {
        kind: draw(
            ["a red apple", "a"], num_inference_steps=3, generator=seeded(0, 1), output_type=kind
        )
        for kind in ("pil", "np", "pt", "codes")
    }
    pil, array = outputs["pil"].images, outputs["np"].images
    tensor, codes = outputs["pt"].images, outputs["codes"].images
    assert array.shape == (2, IMAGE_SIZE, IMAGE_SIZE, 3)
    assert array.dtype == np.float32
    assert tensor.shape == (2, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert tensor.dtype == torch.float32
    assert 0 <= array.min() <= array.max() <= 1
    assert np.array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
    assert [image.size for image in pil] == [(IMAGE_SIZE, IMAGE_SIZE)] * 2
    assert np.array_equal(np.asarray(pil[1]), (array[1] * 255).round().astype(np.uint8))
    assert torch.equal(draw.image_tokenizer.decode(codes), tensor)


def test_prompts_are_checked(draw):
    with pytest.raises(ConfigError, match="`prompt` must be a string or a list"):
        draw([])
    with pytest.raises(ConfigError, match="`prompt` must hold strings only; got 3"):
        draw(["a", 3])
    with pytest.raises(ConfigError, match=f"at most {MAX_TEXT} tokens .* got 4[0-9]"):
        draw("z" * 40)
    with pytest.raises(ConfigError, match="0 <= start <= stop <= 1"):
        draw("a", guidance_start=0.9, guidance_stop=0.2)


# Image to text.


@pytest.fixture
def read(make):
    return make(UnifiedImageToTextPipeline)


def test_default_lengths_are_those_of_captions_and_answers(read):
    assert read(picture(0)).sequences.shape == (1, min(24, MAX_TEXT))
    assert read(picture(0), "what?").sequences.shape == (1, 8)


def test_question_changes_the_answer(make):
    read = make(UnifiedImageToTextPipeline, scheduler=ConfidenceScheduler(modalities=SAMPLED))
    first = read(picture(0), "what?", generator=seeded(0))
    second = read(picture(0), "is there a square?", generator=seeded(0))
    assert not torch.equal(first.sequences, second.sequences)


@pytest.mark.parametrize("steps", [1, 3, 8])
def test_text_windows_are_well_formed(make, steps):
    read = make(UnifiedImageToTextPipeline, scheduler=ConfidenceScheduler(modalities=SAMPLED))
    images = [picture(seed) for seed in range(8)]
    output = read(images, gen_length=8, num_inference_steps=steps, generator=seeded(*range(8)))
    for row, text in zip(output.sequences.tolist(), output.texts, strict=True):
        assert is_well_formed(row)
        assert text == read.tokenizer.decode(row[: row.index(EOS)]).strip()


def test_pictures_in_any_form_give_the_same_codes(read):
    integers = (picture(3) * 255).round().to(torch.uint8)
    array = integers.permute(1, 2, 0).numpy()
    forms = [
        Image.fromarray(array),
        array,
        array[None],
        integers,
        integers[None],
        integers.float() / 255,
        [Image.fromarray(array)],
    ]
    results = [read(form, gen_length=4).sequences.tolist() for form in forms]
    assert all(result == results[0] for result in results)
    codes = read.image_tokenizer.encode(integers[None].float() / 255)
    assert read(codes=codes, gen_length=4).sequences.tolist() == results[0]


def test_several_texts_per_image(make):
    read = make(UnifiedImageToTextPipeline, scheduler=ConfidenceScheduler(modalities=SAMPLED))
    output = read(
        [picture(0), picture(1)],
        ["what?", "is there a square?"],
        num_texts_per_image=2,
        generator=seeded(0, 1, 2, 3),
    )
    assert len(output.texts) == 4
    alone = read(picture(1), "is there a square?", generator=seeded(2))
    assert torch.equal(output.sequences[2:3], alone.sequences)


def test_seq_output_has_no_texts(read):
    output = read(picture(0), output_type="seq")
    assert output.texts is None
    assert len(read(picture(0), output_type="seq", return_dict=False)) == 1


def test_images_and_questions_are_checked(read):
    with pytest.raises(ConfigError, match="either `image` or `codes`; got neither"):
        read()
    with pytest.raises(ConfigError, match="`image` must be a PIL image"):
        read("picture.png")
    with pytest.raises(ConfigError, match="`question` must be one string or one per picture"):
        read([picture(0), picture(1)], ["what?"])
    with pytest.raises(ConfigError, match=f"`gen_length` must be .* at most {MAX_TEXT}"):
        read(picture(0), gen_length=MAX_TEXT + 1)


# Text.


@pytest.fixture
def write(make):
    return make(UnifiedTextGenerationPipeline)


def test_template_keeps_its_known_text(make):
    write = make(UnifiedTextGenerationPipeline, scheduler=ConfidenceScheduler(modalities=SAMPLED))
    output = write(
        template=["a [MASK] apple", "[MASK] [MASK] pear"],
        num_texts_per_prompt=3,
        generator=seeded(*range(6)),
    )
    canvas = write.processor.infill(["a [MASK] apple", "[MASK] [MASK] pear"])
    part = canvas.window_slice(write.processor.answer_window)
    known = ~(canvas.is_free | canvas.is_padding)[:, part].repeat_interleave(3, dim=0)
    ids = canvas.input_ids[:, part].repeat_interleave(3, dim=0)
    assert torch.equal(output.sequences[known], ids[known])
    assert len(output.texts) == 6
    assert all(text.endswith("apple") for text in output.texts[:3])
    for row in output.sequences.tolist():
        assert is_well_formed(row)


def test_template_may_be_about_a_picture(write):
    output = write(template="a [MASK] apple", image=picture(0), guidance_scale=2.0)
    assert output.texts[0].endswith("apple")


def test_text_without_any_prompt(write):
    assert len(write(num_texts_per_prompt=2, gen_length=5, generator=seeded(0, 1)).texts) == 2
    with pytest.raises(CanvasError, match="Use `guidance_scale=1.0`"):
        write(guidance_scale=2.0, gen_length=5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"template": "a red apple"}, r"at least one `\[MASK\]`"),
        ({"template": "a [MASK]", "prompt": "a"}, "`template` excludes `prompt`"),
        ({"template": ["[MASK]", "[MASK]"], "image": picture(0)}, "one picture per template"),
        ({"prompt": "a", "image": picture(0)}, "Use `UnifiedImageToTextPipeline`"),
    ],
)
def test_contradicting_arguments_are_refused(write, arguments, message):
    with pytest.raises(ConfigError, match=message):
        write(**arguments)


# Joint.


@pytest.fixture
def invent(make):
    return make(UnifiedJointPipeline)


def test_joint_pairs_are_whole(invent):
    output = invent(3, gen_length=8, num_inference_steps=10, generator=seeded(0, 1, 2))
    assert len(output.images) == len(output.texts) == 3
    assert all(is_well_formed(row) for row in output.sequences.tolist())
    assert output.images[0].info["recipe"]["caption"] == output.texts[0]


def test_caption_is_written_before_the_picture(invent):
    image = invent.processor.joint(1, gen_length=8).window_slice(1)
    vocabulary = invent.transformer.vocabulary
    states = []

    def callback(pipe, step, timestep, tensors):
        masked = vocabulary.is_masked(tensors["input_ids"])
        in_image = int(masked[:, image].sum())
        states.append((int(masked.sum()) - in_image, in_image))
        return {}

    invent(gen_length=8, num_inference_steps=10, generator=seeded(0), callback_on_step_end=callback)
    assert any(text == 0 and picture == 16 for text, picture in states)
    assert all(picture == 16 for text, picture in states if text)


def test_text_temperature_zero_repeats_one_caption(invent):
    output = invent(
        3, gen_length=8, num_inference_steps=6, text_temperature=0.0, generator=seeded(0, 1, 2)
    )
    assert len(set(output.texts)) == 1
    assert invent.scheduler.config["modalities"]["text"]["temperature"] == 0.0
    varied = invent(3, gen_length=8, num_inference_steps=6, generator=seeded(0, 1, 2))
    assert len(set(varied.texts)) > 1
    assert invent.scheduler.config["modalities"]["text"]["temperature"] == 0.0


def test_joint_guidance_acts_on_the_picture_alone(invent):
    arguments = {"gen_length": 6, "num_inference_steps": 12, "output_type": "codes"}
    plain = invent(2, generator=seeded(0, 1), **arguments)
    unguided = invent.num_forwards
    guided = invent(2, generator=seeded(0, 1), guidance_scale=4.0, **arguments)
    assert torch.equal(plain.sequences, guided.sequences)
    assert not torch.equal(plain.images[0], guided.images[0])
    assert invent.num_forwards == unguided + 6


def test_time_windows_are_checked(invent):
    with pytest.raises(ConfigError, match="Unknown modality in `time_windows` `images`"):
        invent(time_windows={"images": (1.0, 0.0)})
    with pytest.raises(ConfigError, match="0 <= stop < start <= 1"):
        invent(time_windows={"text": (0.5, 0.5)})


# Inpainting.


@pytest.fixture
def fill(make):
    return make(UnifiedInpaintPipeline)


def test_known_codes_are_kept_and_masked_ones_written(fill):
    original = fill.image_tokenizer.encode(picture(0)[None])[0]
    result = fill("a red apple", picture(0), hole(0, 9), output_type="codes", generator=seeded(3))
    codes = result.images[0]
    assert torch.equal(codes[:, 2:], original[:, 2:])  # A mask 9 pixels high covers two tokens.
    assert not torch.equal(codes[:, :2], original[:, :2])


def test_composite_pastes_unmasked_pixels(fill):
    arguments = {"output_type": "pt", "generator": None}
    mask = hole(4, 12)
    pasted = fill("a", picture(0), mask, **{**arguments, "generator": seeded(0)}).images[0]
    raw = fill("a", picture(0), mask, composite=False, **{**arguments, "generator": seeded(0)})
    assert torch.equal(pasted[:, 12:], picture(0)[:, 12:])
    assert torch.equal(pasted[:, :4], picture(0)[:, :4])
    assert torch.equal(pasted[:, 4:12], raw.images[0][:, 4:12])
    assert not torch.equal(raw.images[0][:, 12:], picture(0)[:, 12:])


def test_masks_in_any_form_give_the_same_result(fill):
    mask = hole(0, 16)
    pixels = (mask * 255).to(torch.uint8)
    forms = [
        mask,
        mask[None],
        mask[None, None],
        mask.bool(),
        pixels.numpy(),
        pixels.numpy()[..., None],
        Image.fromarray(pixels.numpy()),
        Image.fromarray(pixels.numpy()).resize((64, 64), Image.Resampling.NEAREST),
        [mask],
    ]
    results = [
        fill("a", picture(0), form, output_type="codes", generator=seeded(1)).images[0]
        for form in forms
    ]
    assert all(torch.equal(result, results[0]) for result in results)


def test_empty_mask_gives_the_picture_back_without_a_forward(fill):
    result = fill("a", picture(0), hole(0, 0), output_type="pt")
    assert fill.num_forwards == 0
    assert torch.equal(result.images[0], picture(0))


def test_one_mask_serves_all_pictures(fill):
    both = fill(
        "a", [picture(0), picture(1)], hole(0, 8), output_type="codes", generator=seeded(0, 1)
    )
    alone = fill("a", picture(1), hole(0, 8), output_type="codes", generator=seeded(1))
    assert torch.equal(both.images[0][1:], alone.images[0])
    with pytest.raises(ConfigError, match="`mask_image` must be one mask or one per picture"):
        fill("a", picture(0), [hole(0, 8)] * 3)
