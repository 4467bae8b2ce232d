"""Muon for hidden matrices and AdamW for the rest, as one optimizer."""

import json

import pytest
import torch

from multimodal_dlm.errors import ConfigError
from multimodal_dlm.training.config import OptimizerConfig
from multimodal_dlm.training.optimizer import build_optimizer, hidden_matrices
from multimodal_dlm.training.optimizer_state import optimizer_tensors, restore_optimizer
from multimodal_dlm.training.run import train
from tests.training.runs import Stop, crash_at, final_tensors, run_config
from tests.training.test_image_tokenizer_run import tokenizer_config

SETTINGS = {"lr": 0.01, "betas": (0.9, 0.98), "eps": 1e-8, "weight_decay": 0.1}


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(6, 4)
        self.norm = torch.nn.LayerNorm(4)

    def forward(self, hidden_states):
        return self.norm(self.linear(hidden_states))


class Model(torch.nn.Module):
    _repeated_blocks = ["Block"]

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.block = Block()
        self.head = torch.nn.Linear(4, 3)

    def forward(self, inputs):
        return self.head(self.block(inputs))


def backward(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(5, 6, generator=generator)
    model.zero_grad()
    model(inputs).pow(2).sum().backward()


def test_only_linear_layers_of_repeated_blocks_are_hidden():
    model = Model()
    assert [id(matrix) for matrix in hidden_matrices(model)] == [id(model.block.linear.weight)]
    model.block.linear.weight.requires_grad_(False)
    assert not list(hidden_matrices(model))


def test_a_first_step_goes_along_the_singular_directions_at_one_rate():
    model = Model()
    optimizer = build_optimizer(model, name="muon", **SETTINGS)
    before = model.block.linear.weight.detach().clone()
    backward(model)
    gradient = model.block.linear.weight.grad.clone()
    optimizer.step()
    update = before * (1 - SETTINGS["lr"] * SETTINGS["weight_decay"]) - model.block.linear.weight
    update = update / (SETTINGS["lr"] * 0.2 * 6**0.5)  # Times 0.2 sqrt of the longer side.
    left, values, right = torch.linalg.svd(gradient, full_matrices=False)
    kept = values > 1e-3 * values[0]  # What a layer norm takes out has no direction.
    left, right = left[:, kept], right[kept]
    assert kept.sum() == 3
    # Five steps bring every singular value near 1, not to it; the directions are those of the SVD.
    core = left.T @ update.detach() @ right.T
    diagonal = core.diagonal()
    assert ((diagonal > 0.5) & (diagonal < 1.4)).all()
    assert (core - torch.diag(diagonal)).abs().max() < 0.05


def test_the_rest_steps_as_adamw_alone_would():
    steps = {}
    for name in ("adamw", "muon"):
        model = Model()
        optimizer = build_optimizer(model, name=name, **SETTINGS)
        backward(model)
        optimizer.step()
        steps[name] = dict(model.named_parameters())
    for name, parameter in steps["adamw"].items():
        assert torch.equal(parameter, steps["muon"][name]) == (name != "block.linear.weight"), name


def test_both_states_survive_the_round_trip():
    model = Model()
    optimizer = build_optimizer(model, name="muon", **SETTINGS)
    backward(model)
    optimizer.step()
    tensors, groups = optimizer_tensors(model, optimizer)
    assert {name.split("//")[1] for name in tensors} >= {"momentum_buffer", "exp_avg", "exp_avg_sq"}
    other = Model()
    restored = build_optimizer(other, name="muon", **SETTINGS)
    other.load_state_dict(model.state_dict())
    restore_optimizer(other, restored, tensors, json.loads(json.dumps(groups)))
    for trained, stepper in ((model, optimizer), (other, restored)):
        for seed in (1, 2):
            backward(trained, seed)
            stepper.step()
    for left, right in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(left, right)


def test_a_resumed_run_equals_a_straight_one_bit_for_bit(run_root):
    options = OptimizerConfig(name="muon", lr=5e-3)
    straight = run_config(run_root, "muon", optimizer=options)
    train(straight)
    broken = run_config(run_root, "muon_broken", optimizer=options, sample_every_steps=1)
    with pytest.raises(Stop):
        train(broken, callbacks=[crash_at(3)])
    train(broken)
    left, right = final_tensors(straight), final_tensors(broken)
    assert any(name.endswith("momentum_buffer") for name in left)
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def test_a_step_gives_back_what_its_closure_gives():
    optimizer = build_optimizer(Model(), name="muon", **SETTINGS)
    assert optimizer.step(lambda: 3.0) == 3.0


def test_matrices_in_shards_are_refused(monkeypatch):
    monkeypatch.setattr("multimodal_dlm.training.optimizer.DTensor", torch.nn.Parameter)
    with pytest.raises(ConfigError, match="lie in shards. Use `adamw`, or `sharding: none`"):
        build_optimizer(Model(), name="muon", **SETTINGS)


def test_bad_requests_get_a_sentence(run_root):
    with pytest.raises(ConfigError, match="must be `adamw` or `muon`; got `sgd`"):
        build_optimizer(Model(), name="sgd", **SETTINGS)
    with pytest.raises(ConfigError, match="needs whole matrices in repeated blocks"):
        train(tokenizer_config(run_root, optimizer=OptimizerConfig(name="muon")))
    with pytest.raises(ConfigError, match=r"`optimizer.momentum` must lie in \[0, 1\)"):
        run_config(run_root, optimizer=OptimizerConfig(momentum=1.0))
