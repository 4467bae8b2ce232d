"""The same loop trains an image tokenizer: pixels in, a released folder out."""

import dataclasses

import pytest
import torch

from multimodal_dlm.errors import CheckpointError, ConfigError
from multimodal_dlm.tokenizers.image import ImageTokenizer
from multimodal_dlm.training.components import build_job
from multimodal_dlm.training.config import DataConfig, ModelConfig, ObjectiveConfig
from multimodal_dlm.training.run import describe, train
from tests.training.runs import (
    CRITIC,
    IMAGE_SIZE,
    Stop,
    crash_at,
    final_tensors,
    run_config,
    tokenizer_config,
)


def test_an_image_tokenizer_is_trained_by_the_same_loop(run_root):
    result = train(tokenizer_config(run_root, num_train_steps=8))
    assert result["is_finished"]
    assert result["psnr"] > 5
    tokenizer = ImageTokenizer.from_pretrained(result["export"])
    assert tokenizer.fingerprint == tokenizer.compute_fingerprint()
    codes = tokenizer.encode(torch.rand(1, 3, IMAGE_SIZE, IMAGE_SIZE))
    assert codes[0].shape == (1, 4, 4)


def test_a_decoder_is_trained_alone_for_the_same_codes(run_root):
    config = tokenizer_config(run_root, num_train_steps=2, output_dir=str(run_root / "decoder"))
    start = ImageTokenizer.from_pretrained(run_root / "image")
    model = ModelConfig("image_tokenizer", init_from=str(run_root / "image"), frozen=("encoder",))
    result = train(dataclasses.replace(config, model=model))
    after = ImageTokenizer.from_pretrained(result["export"])
    assert after.fingerprint == start.compute_fingerprint()
    for (name, old), new in zip(
        start.state_dict().items(), after.state_dict().values(), strict=True
    ):
        assert torch.equal(old, new) == (not name.startswith("decoder.")), name


def test_what_is_frozen_must_exist_and_leave_something(run_root):
    model = ModelConfig("image_tokenizer", init_from=str(run_root / "image"))
    config = dataclasses.replace(tokenizer_config(run_root), model=model)
    for frozen, message in (
        (("encode",), r"got `encode`. It has .*`encoder`, `decoder`"),
        (("encoder", "decoder", "bottleneck"), "must leave something to train"),
    ):
        with pytest.raises(ConfigError, match=message):
            describe(dataclasses.replace(config, model=dataclasses.replace(model, frozen=frozen)))


def test_a_resumed_run_has_the_critic_it_had(run_root):
    states = []
    for name, stop in (("critic_straight", None), ("critic_resumed", 5)):
        config = dataclasses.replace(
            tokenizer_config(run_root, output_dir=str(run_root / name), sample_every_steps=1),
            objective=ObjectiveConfig("reconstruction", CRITIC),
        )
        if stop:
            with pytest.raises(Stop):
                train(config, callbacks=[crash_at(stop)])
        train(config)
        states.append(final_tensors(config))
    left, right = states
    assert any(name.startswith("objective/0.critic.") for name in left)
    assert any(name.startswith("objective/0.moments.") for name in left)
    assert left.keys() == right.keys()
    assert all(torch.equal(tensor, right[name]) for name, tensor in left.items())


def test_a_run_can_start_to_listen_to_a_critic_but_not_to_another(run_root):
    config = tokenizer_config(run_root, num_train_steps=2, output_dir=str(run_root / "late"))
    train(config)
    later = dataclasses.replace(
        config,
        objective=ObjectiveConfig("reconstruction", CRITIC),
        num_train_steps=4,
        allow_changes=True,
    )
    train(later)
    wider = ObjectiveConfig("reconstruction", {**CRITIC, "critic_channels": 8})
    with pytest.raises(CheckpointError, match=r"Undo the change of `critic_channels`"):
        train(dataclasses.replace(later, objective=wider, num_train_steps=6))


@pytest.mark.parametrize(
    ("component", "objective", "changes", "message"),
    [
        (
            "image_tokenizer",
            "masked_diffusion",
            {},
            "got `masked_diffusion`. Use `reconstruct",
        ),
        ("transformer", "reconstruction", {}, "Use `autoregressive` or `masked_diffusion`."),
        ("image_tokenizer", "reconstruction", {"compile_blocks": True}, "`compile_blocks` needs"),
        (
            *("image_tokenizer", "reconstruction"),
            *({"gradient_checkpointing": True}, "`gradient_checkpointing` needs"),
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused(run_root, component, objective, changes, message):
    config = run_config(run_root, "unfit", **changes)
    config = dataclasses.replace(
        config, model=ModelConfig(component=component), objective=ObjectiveConfig(objective)
    )
    with pytest.raises(ConfigError, match=message):
        describe(config)


def test_options_must_be_those_of_the_image_tokenizer_a_run_starts_from(run_root):
    config = run_config(run_root, "image_stage")
    config = dataclasses.replace(
        config,
        model=ModelConfig("image_tokenizer", init_from=str(run_root / "image")),
        objective=ObjectiveConfig("reconstruction", {"perceptual_weight": 0.0}),
    )
    same = dataclasses.replace(config.model, options={"channels": (8, 8)})
    assert describe(dataclasses.replace(config, model=same))["num_parameters"] > 0
    other = dataclasses.replace(config.model, options={"channels": (8, 4)})
    with pytest.raises(ConfigError, match=r"got \[8, 4\] and \[8, 8\] in"):
        describe(dataclasses.replace(config, model=other))


def gradient(model):
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return found


def test_rows_of_weight_0_are_left_out_and_every_other_row_weighs_the_same(run_root):
    """12 samples in batches of 8: the last 4 rows of batch 1 only fill it."""
    data = DataConfig(str(run_root / "mixture.yaml"), batch_size=8, micro_batch_size=3)
    job = build_job(tokenizer_config(run_root, data=data))
    model, objective, batches = job.model.double(), job.objective, job.source.batches(1)
    assert [batch.counted for batch in batches] == [[0, 1, 2], [0], []]
    inputs = [batch.inputs.double() for batch in batches]
    alone = torch.cat([inputs[0], inputs[1][:1]])
    whole = objective(model, alone, generator=torch.Generator())
    whole.loss.backward()
    expected = gradient(model)
    plan = objective.prepare(batches, seed=0, step=1, gather=list, num_processes=1)
    assert plan.loss_scales == [0.75, 0.25, 0.0]
    loss, totals = 0.0, {}
    for pixels, context, scale in zip(inputs, plan.contexts, plan.loss_scales, strict=True):
        output = objective(model, pixels, generator=torch.Generator(), **context)
        (output.loss * scale).backward()
        loss += float(output.loss.detach()) * scale
        for name, term in output.terms.items():
            total, count = totals.get(name, (0.0, 0.0))
            totals[name] = total + float(term.total), count + float(term.count)
    assert loss == pytest.approx(float(whole.loss.detach()))
    assert torch.allclose(gradient(model), expected, rtol=1e-9, atol=1e-12)
    assert totals["l1"][1] == 4
    assert totals["l1"][0] / 4 == pytest.approx(whole.terms["l1"].value)
