"""Text in blocks and token by token: the pipeline against the forwards that define it."""

import pytest
import torch

from multimodal_dlm.canvas import causal_order
from multimodal_dlm.errors import ConfigError
from multimodal_dlm.layout import make_layout
from multimodal_dlm.models.attention_plan import AttentionPlan
from multimodal_dlm.models.kv_cache import ExactCacheConfig
from multimodal_dlm.models.presets import get_preset
from multimodal_dlm.models.transformer import UnifiedTransformerModel
from multimodal_dlm.pipelines import UnifiedTextGenerationPipeline
from multimodal_dlm.schedulers import ConfidenceScheduler
from tests.pipelines.tiny import GRID, tiny_components

PROMPTS = ["what colour is the circle?", "is there a square?", "a red apple"]
RULE = {"commit_rule": "threshold", "commit_rule_options": {"threshold": 0.2}}
TEXT = {"eos_column": 0, "fill_column": 1}


def pipeline(*, attention="prefix", blocks=(), shift=0, **settings):
    parts = tiny_components()
    layout = make_layout(
        max_text=40,
        num_image_tokens=GRID[0] * GRID[1],
        unconditional_text=4,
        condition_attention=attention,
        block_lengths=blocks,
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = UnifiedTransformerModel(
            vocabulary=parts["transformer"].vocabulary.to_dict(),
            layout=layout,
            logits_shift=shift,
            **get_preset("tiny"),
        )
        for name, weight in model.named_parameters():
            if weight.dim() > 1 or "scale_shift" in name:
                torch.nn.init.normal_(weight, std=0.3)
    scheduler = ConfidenceScheduler(modalities={"text": {**TEXT, **settings}})
    made = UnifiedTextGenerationPipeline(
        **(parts | {"transformer": model.double().eval(), "scheduler": scheduler})
    )
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize("block_length", [None, 4])
def test_blocks_with_and_without_the_cache_are_the_same(block_length):
    pipe = pipeline(blocks=(8, 4), **RULE)
    options = {"gen_length": 24, "block_length": block_length, "output_type": "seq"}
    expected = pipe(PROMPTS, **options).sequences
    num_forwards = pipe.num_forwards
    columns = []
    pipe.transformer.enable_cache(ExactCacheConfig(num_prefixes=0))
    pipe.transformer.blocks[0].register_forward_pre_hook(
        lambda _, inputs: columns.append(tuple(inputs[0].shape[:2]))
    )
    found = pipe(PROMPTS, **options).sequences
    assert torch.equal(found, expected)
    assert columns.pop(0) == (1, 1)  # `<bos>`, which all rows share.
    assert pipe.num_forwards == num_forwards == len(columns)
    # Later forwards compute the open block, and with it the one that has just been finished.
    length = block_length or 8
    assert {count for _, count in columns[1:]} <= {length, 2 * length}
    assert sum(count > length for _, count in columns[1:]) <= 24 // length - 1


def test_a_block_reads_only_what_is_before_it():
    """The first block is the same whatever the length of the text may be."""
    pipe = pipeline(blocks=(8, 4))
    short, long = (
        pipe(PROMPTS, gen_length=length, output_type="seq").sequences for length in (24, 32)
    )
    is_ended = (short[:, :8] == 0).any(dim=1)
    assert torch.equal(short[~is_ended, :16], long[~is_ended, :16])
    assert torch.equal(short[:, :8], long[:, :8])


def test_a_causal_model_decodes_what_its_objective_predicts():
    pipe = pipeline(attention="causal", shift=1)
    for cached in (False, True):
        if cached:
            pipe.transformer.enable_cache(ExactCacheConfig())
        sequences = pipe(PROMPTS, gen_length=24, output_type="seq").sequences
        canvas = pipe.processor.text(PROMPTS, gen_length=24)
        assert torch.equal(canvas.order, causal_order(canvas))
        window = canvas.window_slice(pipe.processor.answer_window)
        ids = canvas.input_ids.clone()
        start = pipe.processor.vocabulary.columns("text").start
        ids[:, window] = sequences + start
        states = pipe.transformer(
            ids,
            noise_levels=torch.zeros(ids.shape, dtype=torch.float64),
            position_ids=canvas.position_ids,
            attention_plan=AttentionPlan.from_canvas(canvas),
        ).hidden_states
        logits = pipe.transformer.compute_logits(states[:, window], "text")
        greedy = logits.argmax(-1)
        greedy[greedy == 1] = 0  # A `<fill>` with nothing before it ends the text.
        for row, sequence in enumerate(sequences.tolist()):
            end = sequence.index(0)
            last = 23  # The last place takes `<eos>` whatever the model says.
            assert greedy[row, : min(end + 1, last)].tolist() == sequence[: min(end + 1, last)]
            assert set(sequence[end + 1 :]) <= {1}


def test_wrong_blocks_and_scores_are_refused():
    pipe = pipeline(blocks=(8, 4))
    with pytest.raises(ConfigError, match=r"trained with \(8, 4\); got 16"):
        pipe(PROMPTS[0], block_length=16)
    with pytest.raises(ConfigError, match="`score` needs a model that writes a text in one piece"):
        pipe.score("text", text="a red apple")


def test_templates_of_different_numbers_of_blocks_are_those_written_alone():
    pipe = pipeline(blocks=(8, 4))
    templates = ["a [MASK]", "is [MASK] a red apple a white square on a green [MASK] apple?"]
    canvas = pipe.processor.infill(templates)
    assert len(canvas.order[:, canvas.window_slice(pipe.processor.answer_window)].unique()) > 1
    together = pipe(template=templates, output_type="seq").sequences
    for template, row in zip(templates, together, strict=True):
        (alone,) = pipe(template=template, output_type="seq").sequences
        assert torch.equal(row[: len(alone)], alone)
