"""What every pipeline promises, whatever its task."""

import itertools
import json

import pytest
import torch
from diffusers.callbacks import PipelineCallback
from torch import Tensor

from multimodal_dlm.errors import CheckpointError, ConfigError
from multimodal_dlm.pipelines import (
    RowSeeds,
    UnifiedImageToTextPipeline,
    UnifiedTextToImagePipeline,
    load_pipeline,
)
from multimodal_dlm.schedulers import AbsorbingAncestralScheduler, ConfidenceScheduler
from multimodal_dlm.tokenizers.text import train_text_tokenizer
from tests.pipelines.registry import CASES, Case, plain, same
from tests.pipelines.tiny import seeded, tiny_components

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.pipeline.__name__)

SAMPLED = {
    "text": {"temperature": 1.0, "choice_temperature": 1.0, "eos_column": 0, "fill_column": 1},
    "image": {"mask_schedule": "cosine", "temperature": 1.0, "choice_temperature": 4.5},
}


def run(pipe, case: Case, *indexes: int, **changed):
    return pipe(**{**case.arguments(*indexes), **case.plain, **changed})


def sampled_pipe(make, case: Case):
    """A pipeline that draws text too, so that randomness matters in every window."""
    return make(case.pipeline, scheduler=ConfidenceScheduler(modalities=SAMPLED))


@every_case
def test_registers_exactly_the_four_components(make, case):
    pipe = make(case.pipeline)
    assert set(pipe.components) == {"transformer", "scheduler", "tokenizer", "image_tokenizer"}


@every_case
def test_same_generator_gives_the_same_result_and_another_does_not(make, case):
    pipe = sampled_pipe(make, case)
    first = run(pipe, case, 0, generator=seeded(7))
    assert same(first, run(pipe, case, 0, generator=seeded(7)))
    others = [run(pipe, case, 0, generator=seeded(seed)) for seed in range(3)]
    assert not all(same(first, other) for other in others)


@every_case
def test_global_randomness_is_neither_used_nor_touched(make, case):
    pipe = sampled_pipe(make, case)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = run(pipe, case, 0, generator=seeded(7))
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    assert same(first, run(pipe, case, 0, generator=seeded(7)))


@every_case
def test_row_of_a_batch_equals_the_single_call(make, case):
    pipe = sampled_pipe(make, case)
    together = plain(run(pipe, case, 0, 1, 2, generator=seeded(3, 4, 5)))
    for row in range(3):
        alone = plain(run(pipe, case, row, generator=seeded(3 + row)))
        for whole, part in zip(together, alone, strict=True):
            assert (
                whole[row : row + 1].tolist() == part.tolist()
                if isinstance(whole, Tensor)
                else whole[row : row + 1] == part
            )


@every_case
def test_one_generator_serves_the_rows_in_turn(make, case):
    pipe = sampled_pipe(make, case)
    together = plain(run(pipe, case, 0, 1, generator=torch.Generator().manual_seed(9)))
    shared = torch.Generator().manual_seed(9)
    for row in range(2):
        alone = plain(run(pipe, case, row, generator=shared))
        assert [list(part[0:1]) for part in map(_as_list, alone)] == [
            list(whole[row : row + 1]) for whole in map(_as_list, together)
        ]


def _as_list(value):
    return value.tolist() if isinstance(value, Tensor) else value


@every_case
def test_recorded_row_seeds_replace_the_generator(make, case):
    pipe = sampled_pipe(make, case)
    seeds = [int(torch.randint(2**63 - 1, (), generator=generator)) for generator in seeded(3, 4)]
    expected = run(pipe, case, 0, 1, generator=seeded(3, 4))
    assert same(expected, run(pipe, case, 0, 1, generator=RowSeeds(tuple(seeds))))


@every_case
def test_dict_and_tuple_hold_the_same(make, case):
    pipe = make(case.pipeline)
    output = run(pipe, case, 0, 1, generator=seeded(0, 1))
    values = run(pipe, case, 0, 1, generator=seeded(0, 1), return_dict=False)
    assert isinstance(values, tuple)
    assert same(output, values)


@every_case
def test_save_and_load_gives_the_same_result(make, case, tmp_path):
    pipe = make(case.pipeline)
    expected = run(pipe, case, 0, 1, generator=seeded(0, 1))
    pipe.save_pretrained(tmp_path)
    for loaded in (case.pipeline.from_pretrained(tmp_path), load_pipeline(tmp_path)):
        loaded.set_progress_bar_config(disable=True)
        assert type(loaded) is case.pipeline
        assert same(expected, run(loaded, case, 0, 1, generator=seeded(0, 1)))
        assert loaded.transformer.config["vocabulary"] == pipe.transformer.config["vocabulary"]


@every_case
def test_num_forwards_is_within_the_bound_and_guidance_off_costs_one_per_step(make, case):
    pipe = make(case.pipeline)
    arguments = case.arguments(0, 1)
    steps = arguments.get("num_inference_steps", arguments.get("gen_length"))
    run(pipe, case, 0, 1, generator=seeded(0, 1), guidance_scale=1.0)
    assert 0 < pipe.num_forwards <= steps
    unguided = pipe.num_forwards
    run(pipe, case, 0, 1, generator=seeded(0, 1), guidance_scale=2.0)
    assert unguided < pipe.num_forwards <= 2 * steps


@every_case
def test_callback_sees_every_step(make, case):
    pipe = make(case.pipeline)
    seen = []

    def callback(pipe, step, timestep, tensors):
        masked = pipe.transformer.vocabulary.is_masked(tensors["input_ids"]).sum()
        seen.append((step, timestep, int(masked), pipe.current_timestep))
        return tensors

    run(pipe, case, 0, generator=seeded(0), guidance_scale=1.0, callback_on_step_end=callback)
    assert [step for step, *_ in seen] == list(range(pipe.num_forwards))
    times = [timestep for _, timestep, _, _ in seen]
    assert times == sorted(times, reverse=True)
    assert times[0] == 1.0
    assert times == [current for *_, current in seen]
    masked = [count for _, _, count, _ in seen]
    assert masked == sorted(masked, reverse=True)
    assert masked[-1] == 0
    assert len(set(masked)) == len(masked)  # Every forward commits at least one token.
    assert pipe.current_timestep is None


@every_case
def test_callback_can_stop_and_the_result_is_still_whole(make, case):
    pipe = make(case.pipeline)

    def callback(pipe, step, timestep, tensors):
        pipe._interrupt = step == 1
        return tensors

    stopped = run(
        pipe, case, 0, generator=seeded(0), guidance_scale=1.0, callback_on_step_end=callback
    )
    assert pipe.interrupt
    assert pipe.num_forwards in (2, 3)  # One more where a window had not begun.
    whole = run(pipe, case, 0, generator=seeded(0), guidance_scale=1.0)
    assert [type(part) for part in plain(stopped)] == [type(part) for part in plain(whole)]
    assert not pipe.interrupt


@every_case
def test_diffusers_callback_objects_work(make, case):
    pipe = make(case.pipeline)

    class Count(PipelineCallback):
        tensor_inputs = ["input_ids"]

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            self.count = step_index + 1
            return callback_kwargs

    counter = Count(cutoff_step_ratio=None, cutoff_step_index=10**6)
    run(pipe, case, 0, generator=seeded(0), guidance_scale=1.0, callback_on_step_end=counter)
    assert counter.count == pipe.num_forwards


@every_case
def test_progress_bar_counts_steps_and_can_be_switched_off(components, case, capsys):
    pipe = case.pipeline(**components)
    run(pipe, case, 0, generator=seeded(0))
    assert "it/s" in capsys.readouterr().err
    pipe.set_progress_bar_config(disable=True)
    run(pipe, case, 0, generator=seeded(0))
    assert capsys.readouterr().err == ""


@every_case
def test_every_scheduler_runs(make, case):
    pipe = make(case.pipeline, scheduler=AbsorbingAncestralScheduler())
    assert plain(run(pipe, case, 0, 1, generator=seeded(0, 1)))


@every_case
def test_bfloat16_runs_and_keeps_its_dtype(case, tmp_path):
    pipe = case.pipeline(**tiny_components()).to(torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.transformer.dtype == pipe.image_tokenizer.dtype == torch.bfloat16
    assert plain(run(pipe, case, 0, 1, generator=seeded(0, 1)))
    pipe.save_pretrained(tmp_path)
    loaded = case.pipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.transformer.dtype == torch.bfloat16
    expected = run(pipe, case, 0, generator=seeded(0))
    assert same(expected, run(loaded, case, 0, generator=seeded(0)))


def test_from_pipe_shares_the_same_objects_for_all_ordered_pairs():
    classes = [case.pipeline for case in CASES]
    shared = tiny_components()
    shared["transformer"].to(torch.bfloat16)
    pairs = list(itertools.permutations(classes, 2))
    assert len(pairs) == 20
    for source, target in pairs:
        first = source(**shared)
        second = target.from_pipe(first)
        assert type(second) is target
        for name, component in shared.items():
            assert second.components[name] is component
        assert second.transformer.dtype == torch.bfloat16
        assert second.image_tokenizer.dtype == torch.float32


def test_from_pipe_takes_exchanged_components(make):
    scheduler = AbsorbingAncestralScheduler()
    pipe = UnifiedTextToImagePipeline.from_pipe(
        make(UnifiedImageToTextPipeline), scheduler=scheduler
    )
    assert pipe.scheduler is scheduler


@pytest.mark.parametrize("condition_attention", ["prefix"])
@every_case
def test_the_exact_cache_changes_no_id(case, condition_attention):
    cache = pytest.importorskip("multimodal_dlm.models.kv_cache")
    pipe = case.pipeline(**tiny_components(condition_attention=condition_attention))
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.double()  # In float32 the last bits may decide between two columns.
    expected = run(pipe, case, 0, 1, 2, generator=seeded(0, 1, 2))
    pipe.transformer.enable_cache(cache.ExactCacheConfig())
    assert same(expected, run(pipe, case, 0, 1, 2, generator=seeded(0, 1, 2)))


def test_other_text_tokenizer_is_refused(components):
    size = len(components["tokenizer"])
    other = train_text_tokenizer(["the quick brown fox jumps over lazy dogs"] * 3, vocab_size=size)
    with pytest.raises(CheckpointError, match="`tokenizer` must have the fingerprint"):
        UnifiedTextToImagePipeline(**{**components, "tokenizer": other})
    larger = tiny_components()["tokenizer"]
    larger.add_tokens(["zzz"])
    with pytest.raises(CheckpointError, match=f"`tokenizer` must have at most {size} tokens"):
        UnifiedTextToImagePipeline(**{**components, "tokenizer": larger})


def test_other_image_tokenizer_is_refused(components):
    other = tiny_components(seed=1)["image_tokenizer"]
    with pytest.raises(CheckpointError, match="`image_tokenizer` must have the fingerprint"):
        UnifiedTextToImagePipeline(**{**components, "image_tokenizer": other})


def test_generator_list_of_the_wrong_length_is_refused(make):
    pipe = make(UnifiedTextToImagePipeline)
    with pytest.raises(ConfigError, match="a list of 1 for 2 rows"):
        pipe(["a", "b"], generator=seeded(0))
    with pytest.raises(ConfigError, match="`generator` must"):
        pipe("a", generator=[0.5])


@every_case
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"output_type": "png"}, "Unknown output_type `png`"),
        ({"num_inference_steps": 0}, "`num_inference_steps` must be an integer"),
        ({"num_inference_steps": 2.5}, "`num_inference_steps` must be an integer"),
        ({"guidance_scale": float("nan")}, "`guidance_scale` must be a finite number"),
        ({"guidance_scale": -1}, "`guidance_scale` must be a finite number"),
        ({"callback_on_step_end_tensor_inputs": ["latents"]}, "Available: `input_ids`"),
    ],
)
def test_bad_arguments_are_refused_by_name(make, case, changed, message):
    pipe = make(case.pipeline)
    with pytest.raises(ConfigError, match=message):
        run(pipe, case, 0, **changed)


def test_load_pipeline_refuses_foreign_classes(make, tmp_path):
    make(UnifiedTextToImagePipeline).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    index["_class_name"] = "UnifiedTextToImagesPipeline"
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="Did you mean `UnifiedTextToImagePipeline`"):
        load_pipeline(tmp_path)
