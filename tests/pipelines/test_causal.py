"""Causal models: exact likelihoods by enumeration, and decoding token by token with the cache."""

import itertools

import pytest
import torch

from multimodal_dlm.canvas import Canvas
from multimodal_dlm.errors import ConfigError
from multimodal_dlm.models.attention_plan import AttentionPlan
from multimodal_dlm.models.kv_cache import ExactCacheConfig
from multimodal_dlm.models.presets import get_preset
from multimodal_dlm.models.transformer import UnifiedTransformerModel
from multimodal_dlm.pipelines import (
    UnifiedImageToTextPipeline,
    UnifiedInpaintPipeline,
    UnifiedTextToImagePipeline,
)
from multimodal_dlm.pipelines.scoring import causal_nll
from multimodal_dlm.processing import TASKS
from multimodal_dlm.vocabulary import UnifiedVocabulary
from tests.pipelines.test_scoring import inputs_of
from tests.pipelines.tiny import GRID, seeded, tiny_components

NUM_TOKENS = GRID[0] * GRID[1]
PROMPTS = ["a red apple", "a green pear and a blue circle"]
# A picture of two codes out of two, and a text of two letters out of three: 36 joint rows.
JOINT = UnifiedVocabulary.build(
    {"text": [("text", 3)], "image": [("image.0", 2)]}, {"eos": ("text", 0)}
)


@pytest.fixture(scope="module")
def draw():
    parts = tiny_components(condition_attention="causal", logits_shift=1, noise_conditioning="none")
    pipe = UnifiedTextToImagePipeline(**parts)
    pipe.transformer.double()
    pipe.image_tokenizer.float()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def read(draw):
    pipe = UnifiedImageToTextPipeline.from_pipe(draw)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def codes():
    return (torch.randint(0, 48, (3, *GRID), generator=torch.Generator().manual_seed(3)),)


def joint_model(logits_shift: int = 1) -> UnifiedTransformerModel:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = UnifiedTransformerModel(
            vocabulary=JOINT.to_dict(), logits_shift=logits_shift, **get_preset("tiny")
        )
        for name, weight in model.named_parameters():
            if weight.dim() > 1 or "scale_shift" in name:
                torch.nn.init.normal_(weight, std=0.3)
    return model.double().eval()


def joint_rows(*, is_text_first: bool) -> Canvas:
    """`<boi>` picture `<eoi>` text, every row there is; the picture last in order, or first."""
    boi, eoi = JOINT.special_id("boi"), JOINT.special_id("eoi")
    texts = [JOINT.columns("text").start + code for code in range(3)]
    images = [JOINT.columns("image").start + code for code in range(2)]
    every = itertools.product(images, images, texts, texts)
    ids = torch.tensor([[boi, *row[:2], eoi, *row[2:]] for row in every])
    order = [2, 3, 4, 5, 0, 1] if is_text_first else [0, 1, 2, 3, 4, 5]
    names = list(JOINT.modalities)
    image, text = names.index("image"), names.index("text")

    def rows(values, dtype=torch.long):
        return torch.tensor(values, dtype=dtype).expand(len(ids), -1).clone()

    return Canvas(
        input_ids=ids,
        window_ids=rows([0, 1, 1, 0, 2, 2]),
        modality_ids=rows([image, image, image, image, text, text]),
        position_ids=torch.arange(6)[None, :, None].expand(len(ids), 6, 3).clone(),
        order=rows(order),
        document_ids=rows([0] * 6),
        is_free=rows([False, True, True, False, not is_text_first, not is_text_first], torch.bool),
        is_padding=rows([False] * 6, torch.bool),
    )


@torch.no_grad()
def test_the_chain_is_a_law_of_all_joint_rows():
    """Probabilities of all 36 rows sum to 1, and marginals of prefixes agree with their factors."""
    model, canvas = joint_model(), joint_rows(is_text_first=False)
    nll = causal_nll(model, canvas)
    law = (-nll.sum(dim=1)).exp()
    assert float(law.sum()) == pytest.approx(1.0, abs=1e-12)
    assert float(law.max()) > 1.5 / len(law)  # Not the uniform one, for which much would pass.
    assert bool((nll[~canvas.is_free] == 0).all())
    # p(first code) from the enumeration is what its own factor says, so is p(picture).
    for columns in ([1], [1, 2]):
        factors = (-nll[:, columns].sum(dim=1)).exp()
        ids = canvas.input_ids[:, columns]
        for row in range(len(law)):
            same = (ids == ids[row]).all(dim=1)
            assert float(law[same].sum()) == pytest.approx(float(factors[row]), abs=1e-12)


@torch.no_grad()
def test_a_condition_that_stands_behind_is_seen():
    """Picture given text: a law of pictures for each text, and another one for another text."""
    model, canvas = joint_model(), joint_rows(is_text_first=True)
    law = (-causal_nll(model, canvas).sum(dim=1)).exp().view(4, 9)
    assert torch.allclose(law.sum(dim=0), torch.ones(9, dtype=torch.float64), atol=1e-12)
    assert float((law[:, 0] - law[:, 8]).abs().max()) > 1e-3


def test_rows_whose_tokens_would_be_seen_are_refused():
    canvas = joint_rows(is_text_first=False)
    with pytest.raises(ConfigError, match="needs a model with `logits_shift` 1; got 0"):
        causal_nll(joint_model(logits_shift=0), canvas)
    for order in ([0, 1, 1, 2, 3, 4], [0, 2, 1, 3, 4, 5]):
        wrong = canvas.replace(order=torch.tensor(order).expand(canvas.batch_size, -1))
        with pytest.raises(ConfigError, match="each token has its own `order`, above that"):
            causal_nll(joint_model(), wrong)
    parts = tiny_components(condition_attention="causal")
    with pytest.raises(ConfigError, match="needs a model with `logits_shift` 1; got 0"):
        UnifiedTextToImagePipeline(**parts).score("unconditional_text", text="yes")


@pytest.mark.parametrize("task", TASKS)
@torch.no_grad()
def test_a_score_is_the_sum_of_steps_that_see_no_later_token(read, codes, task):
    """Alone or in a ragged batch; the oracle asks for one token at a time, later ones exchanged."""
    given = inputs_of(task, codes)
    together = read.score(task, **given)
    again = read.score(task, **given, num_draws=8, generator=seeded(1, 2, 3), batch_size=2)
    assert [score.value for score in together] == pytest.approx([s.value for s in again], abs=1e-9)
    assert all(s.is_bound and s.standard_error == 0 and s.low == s.high for s in together)
    row = 1
    canvas = read.processor.score(
        task, **{("texts" if k == "text" else "questions" if k == "question" else k): v
                 for k, v in given.items()},
    ).select_rows(slice(row, row + 1))  # fmt: skip
    canvas = canvas.select_columns(~canvas.is_padding[0])
    vocabulary, total = read.transformer.vocabulary, 0.0
    for column in canvas.is_free[0].nonzero().flatten().tolist():
        is_later = canvas.order[0] >= canvas.order[0, column]
        ids = canvas.input_ids.clone()
        ids[0, is_later] = vocabulary.special_id("bos")
        hidden = read.transformer(
            ids,
            noise_levels=torch.zeros(ids.shape),
            position_ids=canvas.position_ids,
            attention_plan=AttentionPlan.from_canvas(canvas),
        ).hidden_states[0, column]
        modality = vocabulary.modalities[int(canvas.modality_ids[0, column])]
        target = vocabulary.to_columns(canvas.input_ids[0, column], modality)
        logits = read.transformer.compute_logits(hidden, modality)
        total -= float(logits.log_softmax(-1)[target])
    assert together[row].value == pytest.approx(total, abs=1e-9)


def computed_columns(pipe, call):
    """The result of a call, and rows and columns of each forward."""
    shapes = []
    handle = pipe.transformer.blocks[0].register_forward_pre_hook(
        lambda _, inputs: shapes.append(tuple(inputs[0].shape[:2]))
    )
    try:
        return call(), shapes
    finally:
        handle.remove()


@pytest.fixture
def cached(draw):
    """The shared backbone with the exact cache, taken off again."""
    draw.transformer.enable_cache(ExactCacheConfig(num_prefixes=0))
    yield
    draw.transformer.disable_cache()


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
def test_pictures_are_drawn_token_by_token(draw, guidance_scale, request):
    """Steps that are asked for change nothing; with the cache a forward computes one column."""

    def call(**options):
        return draw(
            PROMPTS, generator=seeded(1, 2), guidance_scale=guidance_scale, output_type="codes",
            **options,
        ).images[0]  # fmt: skip

    expected, shapes = computed_columns(draw, call)
    assert torch.equal(expected, call(num_inference_steps=1))
    num_branches = 1 if guidance_scale == 1.0 else 2
    assert draw.num_forwards == NUM_TOKENS * num_branches
    longest = max(length for _, length in shapes)
    assert NUM_TOKENS < min(length for _, length in shapes)
    request.getfixturevalue("cached")
    found, shapes = computed_columns(draw, call)
    assert torch.equal(found, expected)
    assert draw.num_forwards == NUM_TOKENS * num_branches
    # The condition is computed once, then one column for each token that was written.
    assert sum(length > 1 for _, length in shapes) <= 2 * num_branches
    rows = len(PROMPTS) * num_branches
    assert sum(size * length for size, length in shapes) <= rows * (longest + 1)


@pytest.mark.parametrize("question", [None, "what colour is the circle?"])
@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
def test_texts_are_written_token_by_token(read, codes, question, guidance_scale, request):
    def call():
        return read(
            codes=codes, question=question, guidance_scale=guidance_scale, output_type="seq"
        ).sequences

    expected, num_forwards = call(), read.num_forwards
    request.getfixturevalue("cached")
    found, shapes = computed_columns(read, call)
    assert torch.equal(found, expected)
    assert read.num_forwards == num_forwards
    num_branches = 1 if guidance_scale == 1.0 else 2
    assert sum(length > 1 for _, length in shapes) <= 2 * num_branches
    assert 1 < num_forwards <= found.shape[1] * num_branches


def test_a_guided_picture_is_what_the_logits_of_both_branches_say(draw):
    """Temperature 0: each code is the likeliest of u + g (c - u), read off one forward each."""
    scale = 1.7
    modalities = draw.scheduler.config.modalities
    greedy = {**modalities, "image": {**modalities["image"], "temperature": 0.0}}
    scheduler = draw.scheduler.from_config(draw.scheduler.config, modalities=greedy)
    pipe = UnifiedTextToImagePipeline.from_pipe(draw, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    codes = pipe(PROMPTS, guidance_scale=scale, output_type="codes").images
    canvas = pipe.processor.text_to_image(PROMPTS)
    part = canvas.window_slice(1)
    vocabulary = pipe.transformer.vocabulary
    logits = []
    for rows in (canvas, pipe.processor.unconditional(canvas)):
        ids = rows.input_ids.clone()
        ids[:, part] = vocabulary.to_input_ids(codes[0].flatten(1), "image.0")
        with torch.no_grad():
            states = pipe.transformer(
                ids,
                noise_levels=torch.zeros(ids.shape),
                modality_ids=rows.modality_ids,
                position_ids=rows.position_ids,
                attention_plan=AttentionPlan.from_canvas(rows),
            ).hidden_states
            logits.append(pipe.transformer.compute_logits(states[:, part], "image"))
    conditional, unconditional = logits
    guided = unconditional + scale * (conditional - unconditional)
    assert torch.equal(guided.argmax(-1).view(codes[0].shape), codes[0])
    assert not torch.equal(conditional.argmax(-1), guided.argmax(-1))


def test_holes_are_filled_from_what_is_before_them(draw):
    """A causal model does not see the picture behind a hole."""
    fill = UnifiedInpaintPipeline.from_pipe(draw)
    fill.set_progress_bar_config(disable=True)
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, 1, 32, 32, dtype=torch.bool)
    mask[:, :, 8:16, 8:24] = True
    behind = pixels.clone()
    behind[:, :, 16:] = 0.5
    results = [
        fill("a red apple", image, mask, generator=seeded(4), output_type="codes").images[0]
        for image in (pixels, behind)
    ]
    assert torch.equal(results[0][:, 1, 1:3], results[1][:, 1, 1:3])


def test_what_closes_a_picture_comes_after_it_in_both_branches(draw):
    canvas = draw.processor.text_to_image(PROMPTS)
    for rows in (canvas, draw.processor.unconditional(canvas)):
        part = rows.window_slice(1)
        assert torch.equal(rows.order[:, part.stop], rows.order[:, part].max(dim=1).values + 1)
        assert rows.order[:, part].diff(dim=1).eq(1).all()
