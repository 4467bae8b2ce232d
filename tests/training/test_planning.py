"""Plans: parameters and tokens are those of the run, FLOPs and bytes those PyTorch counts."""

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from multimodal_dlm import cli
from multimodal_dlm.diffusion.losses import token_nll
from multimodal_dlm.errors import ConfigError
from multimodal_dlm.models.attention_plan import AttentionPlan
from multimodal_dlm.models.fused import plain_functions
from multimodal_dlm.models.presets import PRESETS, get_preset
from multimodal_dlm.models.transformer import UnifiedTransformerModel
from multimodal_dlm.training.config import load_train_config
from multimodal_dlm.training.costs import (
    BackboneShape,
    Work,
    batch_bytes,
    state_bytes,
    training_flops,
)
from multimodal_dlm.training.devices import DEVICES, get_device
from multimodal_dlm.training.planning import plan
from multimodal_dlm.training.run import describe
from multimodal_dlm.vocabulary import UnifiedVocabulary
from tests.training.memory_tracking import PeakMemory, gradients_and_parameters

ROOT = Path(__file__).parents[2]
COLUMNS = {"text": 700, "image": 960}
ROWS, LENGTH = 4, 64
OPTIONS = {
    "plain": {"noise_conditioning": "none"},
    "modulated": {"noise_conditioning": "ada_norm_single"},
    "grouped": {"noise_conditioning": "additive", "qk_norm": True, "num_key_value_heads": 2},
}


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def smoke(*overrides: str):
    return load_train_config("configs/smoke.yaml", overrides)


def without_data(*overrides: str):
    """Longest rows in place of the data's: read in no time."""
    return smoke("--data.data_root", "none", *overrides)


class Step:
    """Forward and backward of one micro-batch, and what the formulas need to know of it."""

    def __init__(self, preset: str, options: dict, *, checkpointing: bool = False, bf16=False):
        vocabulary = UnifiedVocabulary.build(
            segments={name: [(f"{name}.0", size)] for name, size in COLUMNS.items()}
        )
        self.model = UnifiedTransformerModel(
            vocabulary=vocabulary.to_dict(), **(get_preset(preset) | options)
        )
        if checkpointing:
            self.model.enable_gradient_checkpointing()
        self.bf16 = bf16
        self.ids = torch.randint(0, 1500, (ROWS, LENGTH))
        self.levels = (torch.arange(ROWS)[:, None] / ROWS).expand(ROWS, LENGTH).contiguous()
        self.positions = torch.randint(0, 8, (ROWS, LENGTH, 3))
        order = (torch.arange(LENGTH) < LENGTH // 2).long().expand(ROWS, LENGTH)
        self.plan = AttentionPlan.build(order=order)
        is_target = torch.arange(LENGTH) % 4 == 0
        is_text = torch.arange(LENGTH) < LENGTH // 2
        self.parts = {"text": is_target & is_text, "image": is_target & ~is_text}
        targets = tuple(
            (COLUMNS[name], ROWS * int(part.sum())) for name, part in self.parts.items()
        )
        self.work = Work(ROWS, LENGTH, targets, levels=ROWS)
        self.shape = BackboneShape.of(self.model)

    def run(self) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.bf16):
            states = self.model(
                self.ids,
                noise_levels=self.levels,
                position_ids=self.positions,
                attention_plan=self.plan,
            ).hidden_states
            loss = torch.zeros(())
            for name, part in self.parts.items():
                chosen = states[:, part].flatten(0, 1)
                columns = torch.randint(0, COLUMNS[name], (len(chosen),))

                def head(values, name=name):
                    return self.model.compute_logits(values, name)

                nll = token_nll(chosen, head, columns, num_columns=COLUMNS[name])
                loss = loss + nll.sum()
        loss.backward()


CASES = [("tiny", name) for name in OPTIONS] + [("small", "modulated")]


@pytest.mark.parametrize(
    ("preset", "options", "checkpointing"),
    [(*case, again) for case in CASES for again in (False, True) if case[0] == "tiny" or not again],
)
def test_flops_are_those_that_pytorch_counts(preset, options, checkpointing):
    step = Step(preset, OPTIONS[options], checkpointing=checkpointing)
    step.model.set_attention_backend("eager")  # The counter does not know the CPU's own kernel.
    with FlopCounterMode(display=False) as counter:
        step.run()
    planned = training_flops(step.shape, step.work, checkpointing=checkpointing)
    assert planned == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_flops_of_chunked_logits_are_counted(monkeypatch):
    monkeypatch.setattr("multimodal_dlm.training.costs.CHUNK_ELEMENTS", 8 * 960)
    monkeypatch.setattr(token_nll, "__kwdefaults__", {"chunk_elements": 8 * 960})
    step = Step("tiny", OPTIONS["plain"])
    step.model.set_attention_backend("eager")
    with FlopCounterMode(display=False) as counter:
        step.run()
    assert training_flops(step.shape, step.work) == pytest.approx(
        counter.get_total_flops(), rel=0.05
    )


@pytest.mark.parametrize(("preset", "options"), CASES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_is_what_pytorch_keeps(preset, options, checkpointing):
    step = Step(preset, OPTIONS[options], checkpointing=checkpointing)
    assert measure(step) == pytest.approx(planned_bytes(step, checkpointing), rel=0.1)


@pytest.mark.parametrize("preset", ["tiny"])
def test_memory_in_bf16_is_what_pytorch_keeps(preset):
    step = Step(preset, OPTIONS["modulated"], bf16=True)
    with plain_functions():  # The plain path, which every GPU takes.
        found = measure(step)
    assert found == pytest.approx(planned_bytes(step, False), rel=0.1)


def measure(step: Step) -> int:
    step.model.set_attention_backend("native")
    step.run()  # Gradients exist from the first micro-batch on.
    with PeakMemory(gradients_and_parameters(step.model)) as memory:
        step.run()
    return memory.peak


def planned_bytes(step: Step, checkpointing: bool) -> float:
    parts = batch_bytes(
        step.shape,
        step.work,
        mixed_precision="bf16" if step.bf16 else "no",
        checkpointing=checkpointing,
        has_norm_kernel=False,
    )
    return sum(parts.values())


def test_states_are_what_a_step_makes():
    step = Step("tiny", OPTIONS["modulated"])
    optimizer = torch.optim.AdamW(step.model.parameters())
    step.run()
    optimizer.step()
    moments = sum(
        value.nbytes
        for state in optimizer.state.values()
        for value in state.values()
        if value.dim() > 0
    )
    weights = sum(parameter.nbytes for parameter in step.model.parameters())
    gradients = sum(parameter.grad.nbytes for parameter in step.model.parameters())
    one = {"sharding": "none", "devices": 1, "mixed_precision": "no", "has_ema": True}
    state = state_bytes(step.shape, **one)
    assert state["parameters"] == state["averaged_weights"] == weights
    assert (state["gradients"], state["optimizer"]) == (gradients, moments)
    assert state["exchange_buffers"] == 0
    shards = state_bytes(step.shape, **(one | {"sharding": "fsdp", "devices": 8}))
    assert shards["optimizer"] == moments / 8
    assert sum(shards.values()) < sum(state.values()) / 2


@pytest.mark.parametrize("preset", ["tiny", "small"])
def test_a_plan_agrees_with_the_dry_run(preset):
    config = smoke("--model.preset", preset)
    described = describe(config)
    values = plan(config, get_device("h100"), 4).values
    for name in ("num_parameters", "tokens_per_step", "rows_per_step"):
        assert values[name] == described[name], name
    assert values["tokens_from"] == "data"
    alone = plan(config, get_device("h100"), 1).values
    assert alone["padding_share"] == described["padding_share"]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_can_be_planned(preset):
    config = without_data(
        "--model.preset", preset, "--data.batch_size", "512", "--sharding", "fsdp"
    )
    made = plan(config, get_device("h200"), 64)
    assert made.is_possible
    six = 6 * made.values["num_parameters"]
    assert 0.5 * six < made.values["training_flops_per_token"] < 3 * six or preset == "tiny"


def test_speed_is_arithmetic():
    config = without_data()
    one = plan(config, get_device("h100"), 1, utilisation=0.5, token_budget=1e9).values
    assert one["tokens_per_s"] == pytest.approx(
        989.4e12 * 0.5 / one["training_flops_per_token"], rel=1e-9
    )
    assert one["days"] == pytest.approx(1e9 / one["tokens_per_s"] / 86_400)
    two = plan(config, get_device("h100"), 2, utilisation=0.5).values
    assert two["tokens_per_s"] == pytest.approx(2 * one["tokens_per_s"], rel=0.1)
    own = get_device("cpu", peak_tflops=0.25, memory_gib=4)
    assert plan(config, own, 1).values["device_memory_gib"] == 4
    assert own.peak_flops("no") == own.peak_flops("bf16") == 0.25e12


def test_what_does_not_fit_is_said_and_the_change_makes_it_fit():
    config = without_data("--model.preset", "8b", "--data.batch_size", "512")
    made = plan(config, get_device("a100-40"), 16)
    assert not made.is_possible
    assert "A device must hold" in made.problems[0]
    assert made.problems[0].endswith("; a100-40 has 39.4 GiB.")
    changes = [word for text in made.changes for word in text.strip("`").split()]
    changed = without_data("--model.preset", "8b", "--data.batch_size", "512", *changes)
    assert plan(changed, get_device("a100-40"), 16).is_possible
    few = plan(config, get_device("rtx4090"), 1)
    assert few.changes[0].startswith("use ")
    assert any("`--sharding fsdp`" in text for text in few.changes)


def test_rows_that_do_not_divide_are_said():
    config = without_data("--evaluation.every_steps", "5")
    made = plan(config, get_device("h100"), 3)
    assert made.problems == [
        "`data.batch_size` must be divisible by the 3 devices; got 16. Use 18.",
        "`evaluation.num_rows` must be divisible by the 3 devices; got 64. Use 66.",
    ]


def test_without_the_data_the_longest_rows_are_planned():
    there = plan(smoke(), get_device("h100"), 1).values
    values = plan(without_data(), get_device("h100"), 1).values
    assert values["tokens_from"] == "layout"
    assert values["tokens_per_step"] == 16 * (2 + 64 + 40)
    assert values["memory_gib"]["total"] > there["memory_gib"]["total"]


def test_wrong_arguments_are_explained():
    config, device = smoke(), get_device("h100")
    with pytest.raises(ConfigError, match="Unknown device `h10`. Did you mean `h100`"):
        get_device("h10")
    with pytest.raises(ConfigError, match="`memory_gib` must be positive; got 0"):
        get_device("h100", memory_gib=0)
    with pytest.raises(ConfigError, match="`devices` must be at least 1; got 0"):
        plan(config, device, 0)
    with pytest.raises(ConfigError, match=r"`utilisation` must lie in \(0, 1\]; got 1.5"):
        plan(config, device, 1, utilisation=1.5)
    with pytest.raises(ConfigError, match="`token_budget` must be positive; got -1"):
        plan(config, device, 1, token_budget=-1)
    pictures = load_train_config("configs/tokenizers/image.yaml")
    with pytest.raises(ConfigError, match="`model.component` must be `transformer`"):
        plan(pictures, device, 1)


def test_the_page_and_the_help_list_every_device(capsys):
    page = (ROOT / "docs/planning.md").read_text()
    assert cli.main(["plan", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, device in DEVICES.items():
        assert f"| `{name}` | {device.memory_gib:g} | {device.peak_tflops['bf16']:g} |" in page
        assert name in text


def test_the_command_speaks_to_people_and_programs(capsys):
    arguments = ["plan", "--config", "configs/smoke.yaml", "--data.data_root", "none"]
    assert cli.main(arguments) == 0
    text = capsys.readouterr().out
    for word in ("parameters", "tokens a second", "GiB", "optimizer", "fits"):
        assert word in text
    assert cli.main([*arguments, "--format", "json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["devices"] == 1
    assert values["is_possible"]
    assert cli.main([*arguments, "--devices", "5"]) == 2
    assert "must be divisible by the 5 devices" in capsys.readouterr().out
