"""Batches: functions of the step alone, the same from raw and from pre-tokenized shards."""

import dataclasses

import torch

from multimodal_dlm.training.batches import drop_empty_columns, iterate_steps
from multimodal_dlm.training.components import build_job
from tests.training.runs import run_config
from tests.training.tiny import canvas_of


def test_batches_are_a_function_of_the_step(run_root):
    config = run_config(run_root)
    source, again = build_job(config).source, build_job(config).source
    ahead = [batches for _, batches in iterate_steps(source, 0, 4)]
    resumed = [batches for _, batches in iterate_steps(again, 2, 4)]
    for left, right in zip(ahead[2:], resumed, strict=True):
        for one, other in zip(left, right, strict=True):
            assert one.keys == other.keys
            assert torch.equal(one.inputs.input_ids, other.inputs.input_ids)
    assert sorted(row for batch in ahead[0] for row in batch.rows) == list(range(8))
    assert again.restore(again.state(3)) == 3


def test_ranks_share_out_the_global_batch(run_root):
    config = run_config(run_root)
    whole = build_job(config).source.batches(1)
    parts = [build_job(config, rank=rank, world_size=2).source.batches(1) for rank in range(2)]
    keyed = {row: key for batch in whole for row, key in zip(batch.rows, batch.keys, strict=True)}
    shared = {
        row: key
        for part in parts
        for batch in part
        for row, key in zip(batch.rows, batch.keys, strict=True)
    }
    assert shared == keyed


def test_like_shapes_share_a_micro_batch(run_root):
    config = run_config(run_root)
    data = dataclasses.replace(config.data, micro_batch_size=None)
    whole = build_job(dataclasses.replace(config, data=data)).source.batches(0)
    cut = build_job(config).source.batches(0)
    assert sum(b.num_tokens for b in cut) == sum(b.num_tokens for b in whole)
    slots = [sum(batch.inputs.input_ids.numel() for batch in batches) for batches in (cut, whole)]
    assert slots[0] < slots[1]


def test_empty_columns_are_dropped_and_nothing_else():
    canvas = canvas_of(("caption", "vqa"))
    part = drop_empty_columns(canvas.select_rows(torch.tensor([0])))
    kept = ~canvas.is_padding[0]
    assert torch.equal(part.input_ids[0], canvas.input_ids[0, kept])
    assert torch.equal(part.position_ids[0], canvas.position_ids[0, kept])
    assert drop_empty_columns(part) is part
