"""The command that writes model cards, on a real tiny pipeline."""

import json
import shutil
from pathlib import Path

import pytest

from multimodal_dlm.pipelines import UnifiedTextToImagePipeline
from multimodal_dlm.pipelines.manifest import hash_files, verify_manifest
from tests.pipelines.tiny import tiny_components
from tests.test_cli import fail, run, succeed


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved pipeline with random weights."""
    folder = tmp_path_factory.mktemp("tiny") / "pipeline"
    UnifiedTextToImagePipeline(**tiny_components()).save_pretrained(folder)
    return folder


def test_a_card_takes_its_metrics_from_a_report(capsys, tiny, tmp_path):
    folder = tmp_path / "pipeline"
    shutil.copytree(tiny, folder)
    metric = {"value": 0.5, "low": 0.25, "high": 0.75, "n": 1234, "baselines": {"blind": 0.4}}
    report = {
        "metrics": {"vqa.accuracy": metric},
        "settings": {"suite": "mine", "seed": 3, "manifest": {"name": "all", "fingerprint": "f1"}},
        "pipeline": {"name": "pipeline", "files": hash_files(folder)},
        "environment": {"commit": "abc", "processor": "A chip", "num_cpus": 2, "cuda": None},
    }
    (tmp_path / "report.json").write_text(json.dumps(report))
    succeed(capsys, "card", str(folder), "--report", str(tmp_path / "report.json"))
    row = "| vqa.accuracy | 0.5 | 0.25 to 0.75 | 1,234 | blind 0.4 |"
    assert row in (folder / "README.md").read_text()
    for value in ("mine", "3", "all", "f1", "abc", "A chip, 2 CPU cores"):
        assert f" | `{value}` |" in (folder / "README.md").read_text()
    succeed(capsys, "card", str(folder))
    assert row in (folder / "README.md").read_text()
    # The card and what it wrote have changed since: still the same pipeline.
    succeed(capsys, "card", str(folder), "--report", str(tmp_path / "report.json"))
    before = (folder / "README.md").read_text()
    other = UnifiedTextToImagePipeline(**tiny_components(seed=1))
    other.save_pretrained(tmp_path / "other")
    told = fail(
        capsys, "card", str(tmp_path / "other"), "--report", str(tmp_path / "report.json")
    )  # fmt: skip
    assert "`transformer/diffusion_pytorch_model.safetensors` is" in told
    assert f"multimodal-dlm evaluate {tmp_path / 'other'}" in told
    assert row not in (tmp_path / "other/README.md").read_text()
    assert (folder / "README.md").read_text() == before


def test_a_card_takes_in_what_its_owner_wrote_and_nothing_else(capsys, tiny, tmp_path):
    folder = tmp_path / "pipeline"
    shutil.copytree(tiny, folder)
    info = json.loads((folder / "model_card.json").read_text())
    (folder / "model_card.json").write_text(json.dumps(info | {"limits": "Only squares."}))
    succeed(capsys, "card", str(folder))
    assert "Only squares." in (folder / "README.md").read_text()
    assert verify_manifest(folder)
    (folder / "model_index.json").write_text("{}")
    status, _, err = run(capsys, "card", str(folder))
    assert status == 2
    assert "`model_index.json` in" in err


def test_card_is_written_beside_the_pipeline(capsys, tiny, tmp_path):
    values = succeed(capsys, "card", str(tiny), "--output", str(tmp_path / "card.md"))
    assert values["lines"] > 20
    assert "Vocabulary layout" in (tmp_path / "card.md").read_text()
