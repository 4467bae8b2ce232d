"""The baselines of docs/baselines.md: the same rows, model and FLOPs, checked from the configs."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from multimodal_dlm.training import planning
from multimodal_dlm.training.batches import iterate_steps
from multimodal_dlm.training.components import build_job
from multimodal_dlm.training.config import TrainConfig, load_train_config
from multimodal_dlm.training.costs import BackboneShape, training_flops
from multimodal_dlm.training.devices import get_device

ROOT = Path(__file__).parents[2]
NAMES = ("unified", "causal", "understanding", "generation")
SHARES = {"unified": 1.0, "causal": 1.0, "understanding": 0.5, "generation": 0.5}
STEPS_READ = 16  # The four that a plan reads are a percent off.


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def configs(tmp_path_factory) -> dict[str, TrainConfig]:
    """The configs over mixtures of the committed sample, with the weights and tasks of the real."""
    folder = tmp_path_factory.mktemp("mixtures")
    found = {}
    for name in NAMES:
        path = ROOT / f"configs/baselines/{name}.yaml"
        real = ROOT / load_train_config(path).data.manifest
        content = yaml.safe_load(real.read_text())
        for member in content["mixture"]:
            member["manifest"] = str(ROOT / "datasets/sample" / member["manifest"])
        (folder / real.name).write_text(yaml.safe_dump(content))
        found[name] = load_train_config(path, ["--data.manifest", str(folder / real.name)])
    return found


def planned_flops(config: TrainConfig) -> float:
    """FLOPs of the whole run by `multimodal-dlm plan`."""
    values = planning.plan(config, get_device("cpu"), 1).values
    assert values["tokens_from"] == "data"
    a_step = values["training_flops_per_token"] * values["tokens_per_step"]
    return a_step * config.num_train_steps


def counted_flops(config: TrainConfig) -> float:
    """The same, micro-batch by micro-batch, with as many targets as the objective has.

    A plan takes half of the free tokens for targets, as masks are on average; left to right all
    are.
    """
    model, columns, _ = planning._open_backbone(config)
    shape, flops = BackboneShape.of(model), 0.0
    share = 1.0 if config.objective.name == "autoregressive" else 0.5
    for batch in planning._first_batches(config, 1):
        work = planning._whole(batch, list(columns.values()))
        targets = tuple((size, share * number) for size, number in work.targets)
        flops += training_flops(shape, dataclasses.replace(work, targets=targets))
    return flops / planning.STEPS_READ * config.num_train_steps


@pytest.mark.parametrize("count", [planned_flops, counted_flops])
def test_budgets_are_equal_and_halves_are_halves(configs, monkeypatch, count):
    monkeypatch.setattr(planning, "STEPS_READ", STEPS_READ)
    flops = {name: count(config) for name, config in configs.items()}
    for name, share in SHARES.items():
        assert flops[name] == pytest.approx(share * flops["unified"], rel=0.02), name


def test_the_runs_differ_in_what_is_compared_alone(configs):
    first = configs["unified"].to_dict()
    allowed: dict[str, set[str]] = {
        "unified": set(),
        "causal": {"model", "objective"},
        "understanding": {"data", "lr_schedule"},
        "generation": {"data", "lr_schedule"},
    }
    for name, config in configs.items():
        other = config.to_dict()
        changed = {key for key in first if first[key] != other[key]}
        assert changed - {"output_dir", "num_train_steps"} <= allowed[name], name
        options = {**other["model"]["options"], "logits_shift": 0}
        assert options == {**first["model"]["options"], "logits_shift": 0}
        assert other["objective"]["options"] == first["objective"]["options"]
        # Warm-up is the same share of the run.
        steps, warm_up = other["num_train_steps"], other["lr_schedule"]["num_warmup_steps"]
        assert warm_up / steps == pytest.approx(60 / 1200, rel=0.15)
    causal = configs["causal"].model
    assert causal == dataclasses.replace(
        configs["unified"].model,
        options={**configs["unified"].model.options, "logits_shift": 1},
        condition_attention="causal",
    )


def test_each_direction_has_its_rows_of_the_whole(configs):
    """Datasets, weights and task shares: nothing is left out, added or weighted otherwise."""

    def tasks(name: str) -> dict[str, tuple[int, dict[str, Any]]]:
        path = ROOT / load_train_config(f"configs/baselines/{name}.yaml").data.manifest
        members = yaml.safe_load(path.read_text())["mixture"]
        return {each["manifest"]: (each["weight"], each["tasks"]) for each in members}

    whole, drawn, read = (tasks(name) for name in ("unified", "generation", "understanding"))
    assert tasks("causal") == whole
    assert set(whole) == {"emoji.yaml", "emoji_scenes.yaml", "easy_vqa.yaml"}
    num_drawn = set()
    for manifest, (weight, shares) in whole.items():
        assert drawn[manifest][0] == read[manifest][0] == weight
        assert not drawn[manifest][1].keys() & read[manifest][1].keys()
        assert drawn[manifest][1] | read[manifest][1] == shares
        assert {task.endswith("image") for task in drawn[manifest][1]} == {True}
        assert sum(shares.values()) == 100
        num_drawn.add(sum(drawn[manifest][1].values()))
    # So many rows of each direction as the whole has, within a percent.
    (share,) = num_drawn
    steps = {name: config.num_train_steps for name, config in configs.items()}
    assert steps["generation"] == pytest.approx(steps["unified"] * share / 100, rel=0.01)
    assert steps["understanding"] == pytest.approx(steps["unified"] * (1 - share / 100), rel=0.01)


def test_left_to_right_reads_the_same_rows_in_the_same_order(configs):
    def rows(name: str) -> list[list[tuple]]:
        source = build_job(configs[name], is_dry_run=True).source
        return [
            sorted(
                (row, key, task)
                for part in parts
                for row, key, task in zip(part.rows, part.keys, part.tasks, strict=True)
            )
            for _, parts in iterate_steps(source, 0, 3)
        ]

    assert rows("unified") == rows("causal")
    assert len(rows("unified")[0]) == 64
