"""Suites run on a tiny pipeline: the same twice, resumed, and refused when they make no sense."""

import json
import re
from itertools import pairwise

import pytest
import torch
import yaml

from multimodal_dlm.datasets import open_manifest
from multimodal_dlm.environment import environment, hash_sources
from multimodal_dlm.errors import ConfigError, DataError
from multimodal_dlm.evaluation import harness
from multimodal_dlm.evaluation.harness import run_suite
from multimodal_dlm.evaluation.held_out import HeldOut
from multimodal_dlm.evaluation.html_report import line_plot
from multimodal_dlm.evaluation.measurement import Metric, get_measure, mean_metric
from multimodal_dlm.evaluation.measures.inpainting import hole_masks, hole_psnr
from multimodal_dlm.evaluation.suites import open_suite, suite_of_data
from multimodal_dlm.pipelines import UnifiedImageToTextPipeline
from multimodal_dlm.schedulers import ConfidenceScheduler
from tests.evaluation.toy import write_squares
from tests.pipelines.tiny import tiny_components


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return open_manifest(write_squares(tmp_path_factory.mktemp("data")))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    UnifiedImageToTextPipeline(**tiny_components()).save_pretrained(folder)
    return folder


def whole_suite(tmp_path):
    lines = {
        f"{measure}.squares": {"measure": measure, "source": "squares", "split": "test"}
        for measure in (
            "answers",
            "calibration",
            "captions",
            "inpainting",
            "lengths",
            "reconstruction",
        )
    }
    lines["likelihood"] = {
        "measure": "likelihood", "source": "squares", "split": "test", "num_draws": 2,
    }  # fmt: skip
    lines["joint"] = {"measure": "joint", "source": "squares", "split": "train", "limit": 4}
    path = tmp_path / "whole.yaml"
    path.write_text(yaml.safe_dump({"name": "whole", "measurements": lines}))
    return open_suite(str(path))


def lasting(report):
    return {name: value for name, value in report.items() if name not in ("times", "environment")}


def test_two_runs_give_the_same_report_and_a_third_measures_nothing(
    manifest, saved, tmp_path, monkeypatch
):
    pipe = UnifiedImageToTextPipeline.from_pretrained(saved)
    suite = whole_suite(tmp_path)
    said = []
    reports = []
    for name in ("one", "two", "one"):
        monkeypatch.setattr("sys.argv", ["evaluate", "--output", f"{name}{len(reports)}"])
        out = tmp_path / name
        reports.append(run_suite(pipe, manifest, suite, out, folder=saved, progress=said.append))
    assert lasting(reports[0]) == lasting(reports[1])
    assert reports[0] == reports[2] | {"environment": reports[0]["environment"]}
    for report in reports[1:]:
        first, other = reports[0]["environment"], report["environment"]
        assert {name for name in first if first[name] != other[name]} == {"command"}
    assert reports[0]["failed"] == []
    assert sum("measured already" in text for text in said) == len(suite.entries)
    assert (
        json.loads((tmp_path / "one/report.json").read_text())["metrics"] == (reports[0]["metrics"])
    )
    for metric in reports[0]["metrics"].values():
        assert metric["n"] > 0
        assert metric["low"] is None or metric["low"] <= metric["value"] <= metric["high"]
    assert reports[0]["metrics"]["joint.different"]["low"] is None
    assert (tmp_path / "one/parts/calibration.squares.0.svg").read_text().startswith("<svg")
    page = (tmp_path / "one/report.html").read_text()
    assert not re.search(r"(src|href)=.?https?:", page)
    for entry in suite.entries:
        assert f'id="{entry.name}"' in page


def test_a_part_is_measured_again_when_anything_it_depends_on_changes(
    manifest, saved, tmp_path, monkeypatch
):
    pipe = UnifiedImageToTextPipeline.from_pretrained(saved)
    suite = suite_of_data(manifest).only(["tokenizer"])

    def run(**changes):
        said = []
        options = {"folder": saved, "progress": said.append, **changes}
        run_suite(pipe, manifest, suite, tmp_path, **options)
        return "measured already" not in said[0]

    assert run()
    assert not run()
    assert run(seed=1)
    assert run(batch_size=2, seed=1)
    assert run(folder=None)
    assert run()
    assert not run()
    for change in ({"commit": "other"}, {"packages": {"torch": "9.9"}}):
        with monkeypatch.context() as patch:
            patch.setattr(harness, "environment", lambda change=change: environment() | change)
            assert run()
    with monkeypatch.context() as patch:
        patch.setattr(harness, "hash_sources", lambda: "another")
        assert run()
    assert run()
    with monkeypatch.context() as patch:
        patch.setattr("sys.argv", ["another", "command"])
        assert not run()
    with monkeypatch.context() as patch:
        patch.setattr(pipe, "scheduler", ConfidenceScheduler(modalities={"text": {}}))
        assert run()
    assert run()
    made = environment() | {"sources": ""}
    before = harness._state(pipe, made)
    pipe.to(torch.float64)
    after = harness._state(pipe, made)
    assert {name for name in before if before[name] != after[name]} == {"dtype"}
    pipe.to(torch.float32)
    (tmp_path / "parts/tokenizer.squares.json").write_text("{")
    assert run()
    next((tmp_path / "parts").glob("*.png")).unlink()
    assert run()


def test_changes_that_are_not_committed_are_told_apart(tmp_path):
    for name in ("evaluation/a.py", "models/native/a.cpp", "app/a.py", "training/a.py"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("1")
    found = [hash_sources(tmp_path)]

    def is_another(name, text):
        (tmp_path / name).write_text(text)
        found.append(hash_sources(tmp_path))
        return found[-1] != found[-2]

    assert is_another("evaluation/a.py", "2")
    assert is_another("models/native/a.cpp", "2")
    assert is_another("canvas.py", "")
    assert not is_another("app/a.py", "2")
    assert not is_another("training/a.py", "2")
    assert not is_another("evaluation/a.txt", "2")
    assert hash_sources() == hash_sources()
    assert {"timm", "pillow", "torchvision", "tokenizers"} <= set(environment()["packages"])


def test_suites_of_the_package_name_measures_that_exist():
    for name in ("default", "quick", "tokenizer"):
        suite = open_suite(name)
        assert suite.name == name
        for entry in suite.entries:
            get_measure(entry.measure)
        if name != "tokenizer":
            asked = {entry.name for entry in suite.only(["vqa"]).entries}
            assert asked == {"vqa.easy_vqa", "vqa.emoji_scenes"}


def test_a_suite_that_makes_no_sense_is_refused_before_anything_is_measured(manifest, tmp_path):
    pipe = UnifiedImageToTextPipeline(**tiny_components())

    def refuse(**line):
        path = tmp_path / "wrong.yaml"
        given = {"measure": "captions", "source": "squares", "split": "test", **line}
        kept = {key: value for key, value in given.items() if value is not None}
        path.write_text(yaml.safe_dump({"name": "wrong", "measurements": {"a": kept}}))
        with pytest.raises((ConfigError, DataError)) as caught:
            run_suite(pipe, manifest, open_suite(str(path)), tmp_path / "out")
        return str(caught.value)

    assert "Did you mean `captions`?" in refuse(measure="caption")
    assert "Did you mean `squares`?" in refuse(source="square")
    assert "Did you mean `test`?" in refuse(split="tests")
    assert "Did you mean `limit`?" in refuse(limits=3)
    assert "must have split" in refuse(split=None)
    path = tmp_path / "broken.yaml"
    for text in ("[", "3", "name: a", "{name: a, measurements: 3}", "{name: a, measurements: []}"):
        path.write_text(text)
        with pytest.raises(DataError, match="must be YAML with `name` and `measurements`"):
            open_suite(str(path))
    for name, line in (("../a", {}), ("A", {}), ("a.", {}), ("a", 3)):
        path.write_text(yaml.safe_dump({"name": "b", "measurements": {name: line}}))
        with pytest.raises(DataError, match="must be named by words"):
            open_suite(str(path))
    with pytest.raises(DataError, match="there is no file"):
        open_suite("missing.yaml")


def test_a_limit_cuts_what_a_suite_asks_for():
    suite = open_suite("default").at_most(120)
    limits = {entry.name: entry.options["limit"] for entry in suite.entries}
    assert set(limits.values()) == {16, 64, 100, 120}
    assert open_suite("default").at_most(None) == open_suite("default")


def test_rows_are_drawn_the_same_in_any_batch(manifest):
    source = manifest.sources["squares"]
    draws = []
    for size in (1, 2, 5):
        data = HeldOut(source, "test", batch_size=size, seed=3)
        parts = [data.generators(rows) for rows in data.batches(5)]
        assert [len(part) for part in parts][0] == size
        draws.append([float(torch.rand(1, generator=g)) for part in parts for g in part])
    assert draws[0] == draws[1] == draws[2]
    assert len(set(draws[0])) == 5
    assert list(HeldOut(source, "test").reader("nope")) == []


def test_a_mean_and_its_baselines():
    metric = mean_metric([1, 0, 1, 1], baselines={"chance": 0.5, "blind": [True, False, False, 0]})
    assert metric.value == 0.75
    assert metric.baselines == {"chance": 0.5, "blind": 0.25}
    assert Metric(1 / 3, None, None, 3).to_dict()["value"] == 0.33333


def test_labels_of_lines_never_overlap_nor_leave_the_plot():
    for lines in ({"a": [0, 1], "b": [1, 1], "c": [2, 1]}, {str(n): [1, 0] for n in range(6)}):
        svg = line_plot({"x_label": "x", "y_label": "y", "x": [0, 1], "lines": lines})
        ends = sorted(map(float, re.findall(r'<text x="478" y="([\d.]+)"', svg)))
        assert len(ends) == len(lines)
        assert all(below - above >= 12.9 for above, below in pairwise(ends))
        assert ends[-1] < 260


def test_a_plot_that_goes_below_zero_shows_where_zero_is():
    for low, has_line, has_tick in ((0.2, False, True), (-1.0, True, True), (-0.05, True, False)):
        lines = {"a": [low, 1.0]}
        svg = line_plot({"x_label": "x", "y_label": "y", "x": [3, 4], "lines": lines})
        assert ("stroke-dasharray" in svg) == has_line
        assert (">0</text>" in svg) == has_tick


def test_holes_are_a_quarter_and_their_error_is_taken_inside():
    masks = hole_masks(20, 32, seed=0)
    assert masks.sum(dim=(1, 2, 3)).tolist() == [256] * 20
    assert len({tuple(mask.nonzero()[0].tolist()) for mask in masks}) > 10
    assert torch.equal(masks[:5], hole_masks(5, 32, seed=0))
    pixels = torch.zeros(1, 3, 32, 32)
    other = torch.where(masks[:1], 0.1, 1.0).expand(1, 3, 32, 32)
    assert hole_psnr(pixels, other, masks[:1]) == pytest.approx([20.0], abs=1e-3)
