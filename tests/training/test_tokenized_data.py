"""Training from pre-tokenized shards: bit for bit that from raw ones, with the right tokenizers."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from multimodal_dlm.datasets.manifest import Manifest, open_manifest
from multimodal_dlm.datasets.tokenize_engines import tokenize_manifest
from multimodal_dlm.datasets.tokenizing import TokenizerFolders
from multimodal_dlm.errors import CheckpointError, ConfigError, DataError
from multimodal_dlm.training.components import build_job
from multimodal_dlm.training.config import ModelConfig, ObjectiveConfig, TrainConfig
from multimodal_dlm.training.run import describe, train
from tests.training.runs import run_config, write_data, write_tokenizers

TIMES = ("elapsed_s", "eta_s", "tokens_per_s")


@pytest.fixture(scope="module")
def tokenized(run_root, tmp_path_factory) -> Path:
    """The mixture of `run_root`, pre-tokenized."""
    folder = tmp_path_factory.mktemp("tokenized")
    tokenizers = TokenizerFolders(str(run_root / "text"), str(run_root / "image"))
    tokenize_manifest(run_root / "mixture.yaml", folder, tokenizers)
    return folder / "mixture.yaml"


def over(config: TrainConfig, manifest: Path) -> TrainConfig:
    return dataclasses.replace(
        config, data=dataclasses.replace(config.data, manifest=str(manifest))
    )


def values_of(run: Path) -> list[dict]:
    """Logged values without the times."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in TIMES} for r in rows]


def test_training_from_raw_and_from_pre_tokenized_is_the_same(run_root, tokenized, tmp_path):
    raw = run_config(run_root, output_dir=str(tmp_path / "raw"))
    made = over(run_config(run_root, output_dir=str(tmp_path / "made")), tokenized)
    results = [train(config) for config in (raw, made)]
    assert values_of(tmp_path / "raw") == values_of(tmp_path / "made")
    assert len(values_of(tmp_path / "raw")) == 3
    weights = [
        load_file(Path(r["export"]) / "transformer" / "diffusion_pytorch_model.safetensors")
        for r in results
    ]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name


def test_a_run_goes_on_from_the_other_kind_of_shards(run_root, tokenized):
    """Both kinds have one order and one identity, so a state of either fits the other."""
    raw = build_job(run_config(run_root)).source
    made = build_job(over(run_config(run_root), tokenized)).source
    assert raw.state(3) == made.state(3)
    assert made.restore(raw.state(3)) == 3
    assert (
        open_manifest(tokenized).fingerprint == open_manifest(run_root / "mixture.yaml").fingerprint
    )
    for step in range(3):
        for one, other in zip(raw.batches(step), made.batches(step), strict=True):
            assert one.keys == other.keys
            assert torch.equal(one.inputs.input_ids, other.inputs.input_ids)


def test_raw_shards_are_tokenized_once_for_each_pair_of_tokenizers(tmp_path):
    write_data(tmp_path)
    write_tokenizers(tmp_path)
    config = run_config(tmp_path)

    def cached() -> dict[Path, int]:
        return {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*") if p.is_file()}

    build_job(config)
    written = cached()
    assert len(written) == 3  # Shards of the training split.
    build_job(config)
    assert cached() == written
    damaged = min(written)
    content = bytearray(damaged.read_bytes())
    content[700] ^= 1
    damaged.write_bytes(content)
    build_job(config)
    content[700] ^= 1
    assert damaged.read_bytes() == bytes(content)  # Written again, the same.


def test_other_tokenizers_are_refused(run_root, tokenized, tmp_path):
    manifest = open_manifest(tokenized)
    (source,) = manifest.sources.values()
    assert source.codebooks is not None
    for kind in ("text", "image"):
        other = dataclasses.replace(source.codebooks, **{kind: "f" * 64})
        changed = dataclasses.replace(source, details={**source.details, "tokenized": other})
        with pytest.raises(CheckpointError, match=rf"with the run's {kind} tokenizer.*{'f' * 12}"):
            _check(run_root, Manifest("m", {"squares": changed}))


def _check(run_root: Path, manifest: Manifest) -> None:
    from multimodal_dlm.training.tokenized_data import check_tokenized

    tokenizers = TokenizerFolders(str(run_root / "text"), str(run_root / "image"))
    check_tokenized(manifest, tokenizers.load().codebooks)


def test_a_run_with_other_tokenizers_is_refused_before_it_starts(run_root, tokenized, tmp_path):
    write_tokenizers(tmp_path)
    from multimodal_dlm.tokenizers.text import train_text_tokenizer

    train_text_tokenizer(["zebra zebra zebra"], vocab_size=260).save_pretrained(tmp_path / "text")
    config = over(run_config(run_root), tokenized)
    other = dataclasses.replace(config.tokenizers, text=str(tmp_path / "text"))
    with pytest.raises(CheckpointError, match="Set `tokenizers.text` to that tokenizer's folder"):
        build_job(dataclasses.replace(config, tokenizers=other))


def test_texts_that_do_not_fit_are_refused_before_the_first_step(run_root, tokenized):
    config = run_config(run_root)
    for manifest in (run_root / "mixture.yaml", tokenized):
        short = dataclasses.replace(config.model, max_text=4)
        with pytest.raises(ConfigError, match=r"`squares` has \w+ of up to \d+ tokens"):
            build_job(over(dataclasses.replace(config, model=short), manifest))
    shard = open_manifest(tokenized).sources["squares"].splits["train"][0]
    fits = dataclasses.replace(config.model, max_text=max(shard.longest.values()) + 1)
    build_job(over(dataclasses.replace(config, model=fits), tokenized))


def test_dry_run_of_both_kinds_counts_the_same(run_root, tokenized, tmp_path):
    config = run_config(run_root)
    data = dataclasses.replace(config.data, cache_dir=str(tmp_path / "none"))
    raw = describe(dataclasses.replace(config, data=data))
    made = describe(over(config, tokenized))
    names = ("tokens_per_step", "padding_share", "num_parameters", "data")
    assert [raw[name] for name in names] == [made[name] for name in names]
    assert not (tmp_path / "none").exists()


def test_image_tokenizers_need_pictures(run_root, tokenized):
    config = over(run_config(run_root), tokenized)
    model = ModelConfig(component="image_tokenizer")
    objective = ObjectiveConfig("reconstruction", {"perceptual_weight": 0.0})
    with pytest.raises(DataError, match=r"source `squares` is pre-tokenized.*its raw manifest"):
        build_job(dataclasses.replace(config, model=model, objective=objective))


def test_blank_codes_are_only_for_descriptions(run_root):
    batches = build_job(run_config(run_root), is_dry_run=True).source.batches(0)
    real = build_job(run_config(run_root)).source.batches(0)
    assert [b.keys for b in batches] == [b.keys for b in real]
    assert not np.array_equal(batches[0].inputs.input_ids, real[0].inputs.input_ids)
