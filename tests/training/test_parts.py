"""The small parts of the loop: learning rate, averaged weights, parameter groups, reports."""

import json

import pytest
import torch
from torch import nn

from multimodal_dlm.errors import CheckpointError, ConfigError
from multimodal_dlm.training.ema import ExponentialMovingAverage
from multimodal_dlm.training.lr_schedule import learning_rate
from multimodal_dlm.training.objectives import Term
from multimodal_dlm.training.optimizer import build_optimizer, parameter_groups
from multimodal_dlm.training.optimizer_state import optimizer_tensors, restore_optimizer
from multimodal_dlm.training.randomness import row_generator, step_generator
from multimodal_dlm.training.tracking import (
    MetricsFile,
    TermMeter,
    duration,
    human_line,
    join_sums,
)
from tests.training.tiny import tiny_model


def rates(**changes) -> list[float]:
    options = {
        "peak": 1.0, "num_train_steps": 100, "num_warmup_steps": 10, "final_share": 0.1
    } | changes  # fmt: skip
    return [learning_rate(step, **options) for step in range(options["num_train_steps"])]


def test_the_rate_warms_up_peaks_and_ends_at_its_share():
    values = rates()
    assert values[0] == pytest.approx(1 / 11)
    assert values[10] == 1.0
    assert values[-1] == pytest.approx(0.1)
    assert values[:11] == sorted(values[:11])
    assert values[10:] == sorted(values[10:], reverse=True)
    assert rates(num_train_steps=1) == [1.0]
    with pytest.raises(ConfigError, match="`final_share` must lie"):
        rates(final_share=1.5)


def test_averages_follow_their_formula():
    model = nn.Linear(2, 2, bias=False)
    nn.init.ones_(model.weight)
    ema = ExponentialMovingAverage(model, 0.25)
    expected = 1.0
    for number in range(1, 4):
        nn.init.constant_(model.weight, float(number + 1))
        ema.update(model)
        decay = min(0.25, (1 + number) / (10 + number))
        expected = decay * expected + (1 - decay) * (number + 1)
    assert torch.allclose(ema.weights["weight"], torch.full((2, 2), expected))
    with ema.applied(model):
        assert torch.equal(model.weight, ema.weights["weight"])
    assert torch.equal(model.weight, torch.full((2, 2), 4.0))
    with pytest.raises(CheckpointError, match="must have the model's tensor names"):
        ema.load({"other": torch.zeros(1)}, 1)


def test_only_weight_matrices_decay():
    model = tiny_model(noise_conditioning="ada_norm_single")
    decayed, others = parameter_groups(model, 0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    in_decayed = {names[id(parameter)] for parameter in decayed["params"]}
    in_others = {names[id(parameter)] for parameter in others["params"]}
    assert in_decayed | in_others == set(names.values())
    assert all(name.endswith("weight") for name in in_decayed)
    assert any("scale_shift_table" in name for name in in_others)
    assert any("norm" in name for name in in_others)
    assert others["weight_decay"] == 0.0


def test_optimizer_state_survives_the_round_trip():
    def made():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
        return model, build_optimizer(model, lr=0.1, betas=(0.9, 0.9), eps=1e-8, weight_decay=0.1)

    def step(model, optimizer):
        model(torch.ones(2, 3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    model, optimizer = made()
    step(model, optimizer)
    tensors, groups = optimizer_tensors(model, optimizer)
    assert json.loads(json.dumps(groups))
    other, restored = made()
    other.load_state_dict(model.state_dict())
    restore_optimizer(other, restored, tensors, json.loads(json.dumps(groups)))
    step(model, optimizer)
    step(other, restored)
    for left, right in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(left, right)


def test_a_restored_optimizer_keeps_the_settings_of_its_own_config():
    def made(**settings):
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
        optimizer = build_optimizer(model, lr=0.1, **settings)
        model(torch.ones(2, 3)).sum().backward()
        optimizer.step()
        return model, optimizer

    old = made(betas=(0.9, 0.9), eps=1e-8, weight_decay=0.1)
    model, optimizer = made(betas=(0.8, 0.7), eps=1e-6, weight_decay=0.3)
    tensors, groups = optimizer_tensors(*old)
    restore_optimizer(model, optimizer, tensors, json.loads(json.dumps(groups)))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    assert all(group["betas"] == (0.8, 0.7) for group in optimizer.param_groups)
    assert all(group["eps"] == 1e-6 for group in optimizer.param_groups)
    restored, _ = optimizer_tensors(model, optimizer)
    assert all(torch.equal(tensor, restored[name]) for name, tensor in tensors.items())


def test_draws_depend_on_seed_step_and_row_alone():
    def first(generator):
        return float(torch.rand(1, generator=generator))

    assert first(row_generator(1, 2, 3)) == first(row_generator(1, 2, 3))
    values = {first(row_generator(s, t, r)) for s in range(3) for t in range(3) for r in range(3)}
    assert len(values) == 27
    assert first(step_generator(1, 2)) != first(row_generator(1, 2, 0))


def test_terms_are_joined_as_sums():
    meters = TermMeter(), TermMeter()
    meters[0].add({"a": Term(torch.tensor(2.0), torch.tensor(1)), "b": torch.tensor(5.0)})
    meters[0].add({"a": Term(torch.tensor(1.0), torch.tensor(2))})
    meters[1].add({"a": Term(torch.tensor(3.0), torch.tensor(3))})
    assert join_sums(meter.sums() for meter in meters) == {"a": 1.0, "b": 5.0}


def test_the_metrics_file_drops_what_a_resume_repeats(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2}\n{"step": 4}\n{"step": 6}\n{"ste')
    metrics = MetricsFile(path, first_step=4)
    metrics.write({"step": 6, "loss": 1.0})
    assert [json.loads(row)["step"] for row in path.read_text().splitlines()] == [2, 4, 6]


def test_the_line_for_people_names_what_matters():
    values = {
        "loss": 2.0, "nelbo/text": 1.5, "nelbo/text/vqa": 9.0, "content/text": 2.5,
        "grad_norm": 0.1, "lr": 1e-3, "tokens_per_s": 6000.0, "eta_s": 3900.0,
    }  # fmt: skip
    assert human_line(5, 10, values) == (
        "step 5/10 | loss 2.0000 | text 1.500 | text* 2.500 | grad 0.10 | lr 1.00e-03"
        " | 6,000 tok/s | left 1 h 05 min"
    )
    assert duration(250) == "4 min 10 s"
    assert duration(float("inf")) == "unknown"
