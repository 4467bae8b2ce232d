"""Packed rows give the losses and gradients of unpacked ones, with less padding."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from multimodal_dlm.models.attention_plan import AttentionPlan
from multimodal_dlm.training.batches import drop_empty_columns
from multimodal_dlm.training.components import build_job
from multimodal_dlm.training.objectives import Autoregressive, MaskedDiffusion
from multimodal_dlm.training.objectives.base import Batch
from multimodal_dlm.training.packing import first_fit, pack_rows
from multimodal_dlm.training.run import train
from tests.training.runs import final_tensors, run_config
from tests.training.tiny import canvas_of, generators, tiny_model

TEXT_TASKS = ("text", "unconditional_text", "caption", "text", "vqa", "text_to_image", "text")


def canvas():
    return drop_empty_columns(canvas_of(TEXT_TASKS))


def loss_and_gradients(objective, model, pack_length):
    rows = canvas()
    packing = None if pack_length is None else pack_rows(rows.is_padding, pack_length)
    batch = Batch(
        rows, ("",) * 7, TEXT_TASKS, tuple(range(7)), (0.1,) * 7, packing=packing
    ).to(torch.device("cpu"))  # fmt: skip
    plan = objective.prepare([batch], seed=3, step=1, gather=list, num_processes=1)
    model.zero_grad()
    output = objective(model, rows, generator=generators(range(7)), **plan.contexts[0])
    output.loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return output, gradients, batch


@pytest.mark.parametrize("kind", ["masked_diffusion", "autoregressive"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)]
)  # fmt: skip
@pytest.mark.parametrize("pack_length", [1, 40, 60, 1000])
def test_packed_losses_and_gradients_equal_unpacked_ones(kind, dtype, tolerance, pack_length):
    shift = int(kind == "autoregressive")
    options = {"noise_conditioning": "ada_norm_single", "logits_shift": shift}
    model = tiny_model(std=0.1, **options).to(dtype)
    noise = {"caption": 0.8, "vqa": 0.5}
    masked = MaskedDiffusion(hole_share=0.5, condition_noise=noise)
    objective = Autoregressive() if shift else masked
    left, left_gradients, _ = loss_and_gradients(objective, model, None)
    right, right_gradients, batch = loss_and_gradients(objective, model, pack_length)
    assert batch.packing is not None
    assert (len(batch.packing.source) == 7) == (pack_length == 1)
    assert (len(batch.packing.source) == 1) == (pack_length == 1000)
    assert float(left.loss.detach()) == pytest.approx(float(right.loss.detach()), rel=tolerance)
    assert left_gradients.keys() == right_gradients.keys()
    scale = max(float(gradient.abs().max()) for gradient in left_gradients.values())
    for name, gradient in left_gradients.items():
        error = float((gradient - right_gradients[name]).abs().max())
        assert error <= tolerance * max(1.0, scale), name
    for name, term in left.terms.items():
        assert right.terms[name].value == pytest.approx(term.value, rel=max(tolerance, 1e-6))


def test_packed_rows_do_not_see_each_other_and_keep_their_positions():
    rows = canvas()
    packing = pack_rows(rows.is_padding, 1000)
    packed = packing.pack_canvas(rows)
    assert packed.batch_size == 1
    assert not bool(packed.is_padding.any())
    mask = AttentionPlan.from_canvas(packed).mask
    assert mask is not None
    assert bool((mask[0, 0] <= (packed.document_ids[0][:, None] == packed.document_ids[0])).all())
    assert packed.document_ids.unique().numel() == 7
    kept = ~rows.is_padding
    for name in ("input_ids", "position_ids", "order", "modality_ids"):
        back = packing.unpack(getattr(packed, name))
        assert torch.equal(back[kept], getattr(rows, name)[kept]), name
    assert bool((packing.unpack(packed.input_ids)[~kept] == 0).all())


def test_one_token_of_another_document_changes_nothing():
    """The check that the plan, not luck, keeps documents apart: without it the loss differs."""
    rows, model = canvas(), tiny_model(std=0.3).double()
    packing = pack_rows(rows.is_padding, 1000)
    packed = packing.pack_canvas(rows)

    def states(canvas):
        return model(
            canvas.input_ids,
            noise_levels=torch.zeros(canvas.input_ids.shape),
            modality_ids=canvas.modality_ids,
            position_ids=canvas.position_ids,
            attention_plan=AttentionPlan.from_canvas(canvas),
        ).hidden_states

    changed = packed.input_ids.clone()
    inside = packed.document_ids[0] == packed.document_ids[0, 0]
    changed[0, 0] = changed[0, -1]
    apart = states(packed), states(packed.replace(input_ids=changed))
    assert torch.equal(apart[0][0, ~inside], apart[1][0, ~inside])
    together = packed.replace(document_ids=torch.zeros_like(packed.document_ids))
    mixed = states(together), states(together.replace(input_ids=changed))
    assert not torch.equal(mixed[0][0, ~inside], mixed[1][0, ~inside])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 60))
def test_every_row_is_packed_once_and_no_row_is_overfull(lengths, capacity):
    bins = first_fit(lengths, capacity)
    assert sorted(item for members in bins for item in members) == list(range(len(lengths)))
    for members in bins:
        assert sum(lengths[item] for item in members) <= capacity or len(members) == 1
    if max(lengths) <= capacity:  # At most one bin is no more than half full.
        loads = sorted(sum(lengths[item] for item in members) for members in bins)
        assert all(2 * load > capacity for load in loads[1:])
    is_padding = torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]
    packing = pack_rows(is_padding, capacity)
    kept = packing.source[packing.source >= 0]
    assert sorted(kept.tolist()) == (~is_padding).flatten().nonzero().flatten().tolist()


def test_a_packed_run_trains_alike_with_less_padding(run_root):
    """The log says how much was padding."""
    plain = run_config(run_root, "unpacked", num_train_steps=2, log_every_steps=1)
    data = dataclasses.replace(plain.data, micro_batch_size=None)
    plain = dataclasses.replace(plain, data=data)
    packed = dataclasses.replace(
        plain,
        output_dir=str(run_root / "packed"),
        data=dataclasses.replace(data, pack_length=96),
    )
    assert all(batch.packing is not None for batch in build_job(packed).source.batches(0))
    train(plain)
    train(packed)
    left, right = final_tensors(plain), final_tensors(packed)
    for name, tensor in left.items():
        if name.startswith("model"):
            assert torch.allclose(tensor, right[name], rtol=1e-3, atol=1e-4), name
    rows = [
        json.loads((Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()[0])
        for config in (plain, packed)
    ]
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], rel=1e-5)
    assert rows[1]["padding_share"] < rows[0]["padding_share"] < 1
    effective = rows[0]["density/weight"] ** 2 / rows[0]["density/squared_weight"]
    assert 0 < effective <= rows[0]["density/targets"] * (1 + 1e-6) < 1
