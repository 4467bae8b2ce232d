"""Every shipped config says what it is, loads, and describes a run over the committed sample."""

import dataclasses
import re
from pathlib import Path

import pytest

from multimodal_dlm.errors import ConfigError
from multimodal_dlm.training.config import (
    LRScheduleConfig,
    OptimizerConfig,
    StabilityConfig,
    TrainConfig,
    config_changes,
    load_train_config,
)
from multimodal_dlm.training.run import describe
from tests.training.runs import run_config

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "configs/accelerate"  # Not runs: see test_launch_files.py.
CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.parent != LAUNCH)
SAMPLE = "datasets/sample.yaml"


def test_all_configs_are_found():
    names = [path.relative_to(ROOT / "configs").as_posix() for path in CONFIGS]
    stages = "finish compare teach end shapes draw names relations read show settle paint".split()
    assert names == [
        *(
            f"baselines/{each}.yaml"
            for each in ("causal", "generation", "understanding", "unified")
        ),
        "finetune.yaml",
        "lora.yaml",
        "reasoning_block.yaml",
        "reasoning_causal.yaml",
        *(f"released/{number:02d}_{stage}.yaml" for number, stage in enumerate(stages, 2)),
        "released.yaml",
        "smoke.yaml",
        "tokenizers/image.yaml",
        "tokenizers/image_decoder.yaml",
    ]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_says_what_it_trains_and_how(path):
    comment = [line for line in path.read_text().splitlines() if line.startswith("#")]
    text = "\n".join(comment)
    command = f"multimodal-dlm train --config {path.relative_to(ROOT).as_posix()}"
    assert path.read_text().startswith("# Trains: ")
    for needed in ("# Command: ", command, "# Time: ", "# Metric: "):
        assert needed in text
    assert re.search(r"# Time: \S+ \S+ \S+", text)  # Not a word that stands for one.
    for named in re.findall(r"configs/[\w/]+\.yaml", text):
        assert (ROOT / named).is_file()
    assert f"# Then: {path.relative_to(ROOT).as_posix()}" not in text


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_describes_a_run(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load_train_config(path, ["--data.manifest", SAMPLE])
    if config.model.init_from is not None and not Path(config.model.init_from).is_dir():
        # A later stage starts from what an earlier one exports, which is not in the repository.
        model = dataclasses.replace(config.model, init_from=None)
        config = dataclasses.replace(config, model=model)
    if config.export.average_with is not None:  # Nor this.
        export = dataclasses.replace(config.export, average_with=None)
        config = dataclasses.replace(config, export=export)
    for folder in (config.tokenizers.text, config.tokenizers.image):
        assert folder is None or Path(folder).is_dir()
    if config.model.component == "image_tokenizer":
        assert config.objective.name == "reconstruction"
        return
    values = describe(config)
    assert values["tokens_per_step"] > config.data.batch_size * 10
    assert values["padding_share"] < 0.4
    assert len(values["data"]) > 2


def test_a_later_stage_starts_from_what_another_config_exports_or_from_the_repository():
    configs = [load_train_config(path) for path in CONFIGS]
    exported = {config.export.folder for config in configs}
    begun = {
        folder
        for config in configs
        for folder in (config.model.init_from, config.export.average_with)
        if folder is not None
    }
    later = {folder for folder in begun if folder.startswith("runs/")}
    assert len(later) > 5
    assert later <= exported
    assert all((ROOT / folder).is_dir() for folder in begun - later)


def test_overrides_win_and_mistakes_are_explained(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("output_dir: out\nnum_train_steps: 3\noptimizer: {lr: 1e-3}\n")
    config = load_train_config(path, ["--optimizer.lr", "2e-3", "--data.batch_size", "5"])
    assert (config.optimizer.lr, config.data.batch_size, config.num_train_steps) == (2e-3, 5, 3)
    assert config.optimizer.betas == (0.9, 0.98)
    unclipped = load_train_config(path, ["--optimizer.max_grad_norm", ".inf"])
    assert unclipped.optimizer.max_grad_norm == float("inf")
    with pytest.raises(ConfigError, match="There is no config"):
        load_train_config(tmp_path / "none.yaml")
    path.write_text("output_dir: out\nnum_train_steps: 3\noptimiser: {lr: 1e-3}\n")
    with pytest.raises(ConfigError, match="optimiser"):
        load_train_config(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_train_steps": 0}, "`num_train_steps` must be at least 1; got 0"),
        ({"ema_decay": 1.0}, r"`ema_decay` must lie in \[0, 1\); got 1.0"),
        ({"seed": -1}, "`seed` must be at least 0; got -1"),
        (
            {"optimizer": OptimizerConfig(max_grad_norm=0.0)},
            "positive; got 0.0. Write .inf",
        ),
        ({"optimizer": OptimizerConfig(max_grad_norm=-1.0)}, "`optimizer.max_grad_norm` must be"),
        (
            {"optimizer": OptimizerConfig(betas=(0.9, 1.0))},
            r"`optimizer.betas` must lie in \[0",
        ),
        ({"optimizer": OptimizerConfig(eps=0.0)}, "`optimizer.eps` must be positive; got 0.0"),
        ({"optimizer": OptimizerConfig(weight_decay=-0.1)}, "`optimizer.weight_decay` must not be"),
        (
            {"lr_schedule": LRScheduleConfig(num_warmup_steps=-1)},
            "num_warmup_steps` must be at",
        ),
        (
            {"lr_schedule": LRScheduleConfig(final_share=2.0)},
            "`lr_schedule.final_share` must",
        ),
        (
            {"stability": StabilityConfig(max_skipped_share=-0.1)},
            "`stability.max_skipped_share`",
        ),
        (
            {"stability": StabilityConfig(spike_deviations=-1)},
            "`stability.spike_deviations`",
        ),
    ],
)
def test_values_out_of_range_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**({"output_dir": "out", "num_train_steps": 1} | changes))


def test_changes_that_matter_are_told_from_those_that_do_not(tmp_path):
    old = run_config(tmp_path).to_dict()
    new = run_config(tmp_path, "elsewhere", log_every_steps=7, seed=2).to_dict()
    assert config_changes(old, new) == {"seed": (1, 2)}
