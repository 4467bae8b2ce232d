"""Scores of rows: against plain forwards, enumeration, and the same row in another batch."""

import numpy as np
import pytest
import torch

from multimodal_dlm.canvas import noise_levels
from multimodal_dlm.diffusion.likelihood import enumerated_nelbo, monte_carlo_nelbo
from multimodal_dlm.errors import ConfigError
from multimodal_dlm.models.attention_plan import AttentionPlan
from multimodal_dlm.pipelines import UnifiedImageToTextPipeline
from multimodal_dlm.pipelines.randomness import draw_row_seeds
from multimodal_dlm.pipelines.scoring import CanvasScorer
from multimodal_dlm.processing import TASKS
from tests.pipelines.tiny import GRID, seeded, tiny_components

TEXTS = ["a red apple", "a blue circle on a white background", "yes"]


@pytest.fixture(scope="module")
def pipe():
    pipe = UnifiedImageToTextPipeline(**tiny_components())
    pipe.transformer.double()
    return pipe


@pytest.fixture(scope="module")
def codes():
    return (torch.randint(0, 48, (3, *GRID), generator=torch.Generator().manual_seed(3)),)


def inputs_of(task, codes):
    """What a task needs, for three rows."""
    given = {}
    if task != "text":
        given["codes"] = codes
    if task != "unconditional_image":
        given["text"] = TEXTS
    if task in ("vqa", "text"):
        given["question"] = ["is there a square?", "what colour?", "is there a circle?"]
    return given


def test_nll_of_a_mask_is_that_of_a_plain_forward(pipe, codes):
    canvas = pipe.processor.score("caption", codes=(codes[0][:1],), texts=TEXTS[:1])
    scorer = CanvasScorer(pipe.transformer, canvas, batch_size=2)
    free = canvas.is_free[0].nonzero()[:, 0]
    masks = torch.zeros(3, canvas.length, dtype=torch.bool)
    masks[0, free[0]] = masks[1, free[:2]] = masks[2, free] = True
    found = scorer(masks)
    vocabulary = pipe.transformer.vocabulary
    for mask, nll in zip(masks, found, strict=True):
        ids = canvas.input_ids.masked_fill(mask, vocabulary.mask_token_id("text"))
        noisy = canvas.replace(input_ids=ids)
        with torch.no_grad():
            output = pipe.transformer(
                ids,
                noise_levels=noise_levels(noisy, vocabulary),
                modality_ids=noisy.modality_ids,
                position_ids=noisy.position_ids,
                attention_plan=AttentionPlan.from_canvas(noisy),
            )
            logits = pipe.transformer.compute_logits(output.hidden_states[0], "text")
        columns = vocabulary.to_columns(canvas.input_ids[0][mask], "text")
        expected = -logits.log_softmax(dim=-1)[mask].gather(-1, columns[:, None])[:, 0]
        assert torch.allclose(nll[mask], expected, atol=1e-10)
        assert bool((nll[~mask] == 0).all())


def test_scores_average_to_the_enumerated_bound(pipe, codes):
    canvas = pipe.processor.score("caption", codes=(codes[0][:1],), texts=["yes"])
    num_free = int(canvas.is_free.sum())
    assert 2 <= num_free <= 6
    exact = enumerated_nelbo(CanvasScorer(pipe.transformer, canvas), canvas.is_free[0])
    (found,) = pipe.score(
        "caption", codes=(codes[0][:1],), text="yes", num_draws=600, generator=seeded(1)
    )
    assert found.standard_error > 0
    assert abs(found.value - exact.value) < 4 * found.standard_error
    assert found.is_bound


@pytest.mark.parametrize("task", TASKS)
def test_a_row_of_a_ragged_batch_scores_as_it_does_alone(pipe, codes, task):
    given = inputs_of(task, codes)
    together = pipe.score(task, **given, num_draws=8, generator=seeded(1, 2, 3))
    assert len(together) == 3
    for row in range(3):
        alone = {
            name: (value[0][row : row + 1],) if name == "codes" else value[row]
            for name, value in given.items()
        }
        (score,) = pipe.score(task, **alone, num_draws=8, generator=seeded(row + 1), batch_size=3)
        assert score.value == pytest.approx(together[row].value, abs=1e-9)
        assert score.standard_error == pytest.approx(together[row].standard_error, abs=1e-9)


def test_the_joint_score_is_a_chain(pipe, codes):
    """Twice the draws; the value is that of the two corners of one canvas."""
    (joint,) = pipe.score(
        "joint", codes=(codes[0][:1],), text="yes", num_draws=400, generator=seeded(5)
    )
    assert joint.num_draws == 800
    canvas = pipe.processor.score("joint", codes=(codes[0][:1],), texts=["yes"])
    names = list(pipe.transformer.vocabulary.modalities)
    is_text = canvas.is_free[0] & (canvas.modality_ids[0] == names.index("text"))
    is_image = canvas.is_free[0] & ~is_text
    scorer = CanvasScorer(pipe.transformer, canvas)
    text = enumerated_nelbo(scorer, is_text, is_hidden=is_image)
    image = monte_carlo_nelbo(
        scorer, is_image, num_draws=400, generator=torch.Generator().manual_seed(9)
    )
    error = (joint.standard_error**2 + image.standard_error**2) ** 0.5
    assert abs(joint.value - text.value - image.value) < 4 * error


def test_pictures_and_codes_score_alike(pipe):
    pipe.image_tokenizer.float()
    rng = np.random.default_rng(0)
    image = rng.random((1, 32, 32, 3), dtype=np.float32)
    codes = pipe._given_codes(image, None)
    options = {"text": "yes", "num_draws": 4}
    by_image = pipe.score("text_to_image", image=image, generator=seeded(1), **options)
    by_codes = pipe.score("text_to_image", codes=codes, generator=seeded(1), **options)
    assert by_image == by_codes


def test_refusals(pipe, codes):
    with pytest.raises(ConfigError, match=r"Unknown task `captions`. Did you mean `caption`"):
        pipe.score("captions", codes=codes, text=TEXTS)
    for task, given, message in (
        ("caption", {}, r"Task `caption` needs `codes`; got none. It takes `codes`, `texts`\."),
        ("caption", {"codes": codes}, r"Task `caption` needs `texts`"),
        ("vqa", {"codes": codes, "text": TEXTS}, r"Task `vqa` needs `questions`"),
        (
            "caption",
            {"codes": codes, "text": TEXTS, "question": TEXTS},
            r"Task `caption` has no place for `questions`; got some",
        ),
        ("unconditional_image", {"codes": codes, "text": TEXTS}, r"has no place for `texts`"),
        ("text", {"codes": codes, "text": TEXTS, "question": TEXTS}, r"no place for `codes`"),
        ("caption", {"codes": codes, "text": ["a", None, "b"]}, r"`texts` must be one string a"),
    ):
        with pytest.raises(ConfigError, match=message):
            pipe.score(task, **given)
    with pytest.raises(ConfigError, match=r"even and at least 2; got 3"):
        pipe.score("caption", codes=codes, text=TEXTS, num_draws=3, generator=seeded(1, 2, 3))
    with pytest.raises(ConfigError, match=r"either `image` or `codes`; got both"):
        pipe.score("caption", image=[0], codes=codes, text=TEXTS)
    with pytest.raises(ConfigError, match=r"one per level; got none. Use"):
        pipe.score("caption", codes=(), text=TEXTS)
    canvas = pipe.processor.score("caption", codes=codes, texts=TEXTS)
    with pytest.raises(ConfigError, match=r"`canvas` must have one row; got 3"):
        CanvasScorer(pipe.transformer, canvas)


def test_texts_are_ranked_by_what_the_picture_says_of_them(pipe, codes):
    one = tuple(level[:1] for level in codes)
    texts = ["a red apple", "a green pear", "a red apple"]

    def rank(given, seed=3):
        generator = torch.Generator().manual_seed(seed)
        return pipe.rank_texts(texts=given, codes=one, num_draws=4, generator=generator)

    ranked = rank(texts)
    assert [row.score for row in ranked] == sorted((row.score for row in ranked), reverse=True)
    assert sorted(row.place for row in ranked) == [0, 1, 2]
    score = {row.place: row.score for row in ranked}
    assert score[0] == score[2]  # The same masks for every text.
    assert [row.place for row in ranked].index(0) < [row.place for row in ranked].index(2)
    assert rank(texts[:1])[0].score == pytest.approx(score[0])
    (seed,) = draw_row_seeds(torch.Generator().manual_seed(3), 1)
    alone, given = (
        pipe.score(
            task, codes=one, text=texts[1], num_draws=4,
            generator=[torch.Generator().manual_seed(seed)],
        )[0].value
        for task in ("unconditional_text", "caption")
    )  # fmt: skip
    assert score[1] == pytest.approx(alone - given)
    for wrong in ({"texts": []}, {"texts": "a red apple"}):
        with pytest.raises(ConfigError, match="ranks a list of texts for one picture"):
            pipe.rank_texts(codes=one, **wrong)
    with pytest.raises(ConfigError, match="got 2 pictures"):
        pipe.rank_texts(codes=tuple(level[:2] for level in codes), texts=texts)
