"""Models of one direction, and causal ones: what applies is measured, what does not says why."""

import importlib.util
import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import yaml

from multimodal_dlm import cli
from multimodal_dlm.datasets import open_manifest
from multimodal_dlm.errors import ConfigError
from multimodal_dlm.evaluation.harness import run_suite
from multimodal_dlm.evaluation.held_out import HeldOut
from multimodal_dlm.evaluation.measurement import Metric, get_measure, register_measure
from multimodal_dlm.evaluation.measures.likelihood import measure_likelihood
from multimodal_dlm.evaluation.suites import open_suite
from multimodal_dlm.pipelines import UnifiedImageToTextPipeline
from multimodal_dlm.tasks import TASKS
from tests.conftest import REPOSITORY
from tests.evaluation.toy import write_squares
from tests.pipelines.tiny import tiny_components

READING = ("caption", "vqa", "unconditional_text")
DRAWING = ("text_to_image", "unconditional_image")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return open_manifest(write_squares(tmp_path_factory.mktemp("data")))


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
    """Folder of a causal pipeline."""
    folder = tmp_path_factory.mktemp("causal")
    parts = tiny_components(condition_attention="causal", logits_shift=1, noise_conditioning="none")
    UnifiedImageToTextPipeline(**parts).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    folder = REPOSITORY / "benchmarks"
    spec = importlib.util.spec_from_file_location("baselines", folder / "baselines.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(folder))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(folder))
    return module


def write_suite(folder, *measures, **options):
    lines = {
        measure: {"measure": measure, "source": "squares", "split": "test", **options}
        for measure in measures
    }
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump({"name": "some", "measurements": lines}))
    return path


def test_the_quick_suite_says_what_each_kind_of_model_is_measured_by():
    """Names of the measurements that are left out, by what the model was trained for."""

    def left_out(tasks, *, is_causal=False):
        return {
            entry.name
            for entry in open_suite("quick").entries
            if get_measure(entry.measure).reason_against(entry.options, tasks, is_causal=is_causal)
        }

    read = {
        "vqa.easy_vqa", "calibration.easy_vqa", "vqa.emoji_scenes", "caption.scenes",
        "caption.unseen_combinations", "caption.length", "statements.scenes",
    }  # fmt: skip
    drawn = {
        "text_to_image.unseen_combinations", "text_to_image.scenes",
        "inpainting.unseen_combinations",
    }  # fmt: skip
    both = {"cycle.unseen_combinations", "steps.unseen_combinations", "joint"}
    assert left_out(TASKS) == set()
    assert left_out(READING) == drawn | both
    assert left_out(DRAWING) == read | both
    assert left_out(READING + DRAWING) == {"joint"}
    assert left_out(TASKS, is_causal=True) == {"steps.unseen_combinations"}


def test_likelihoods_are_those_of_what_was_trained(manifest):
    pipe = UnifiedImageToTextPipeline(**tiny_components())
    data = HeldOut(manifest.sources["squares"], "test")
    found = {
        tasks: measure_likelihood(pipe, data, num_draws=2, tasks=tasks).metrics
        for tasks in (TASKS, READING, DRAWING, READING + DRAWING)
    }
    whole, read, drawn = found[TASKS], found[READING], found[DRAWING]
    assert found[READING + DRAWING] == whole
    assert set(drawn) == {"image_given_text_nats"}
    assert set(whole) - set(read) == {"image_given_text_nats", "joint_nats"}
    for part in (read, drawn):
        assert {name: whole[name] for name in part} == part


def test_reasons_are_reported_and_comparisons_take_what_is_common(
    manifest, causal, benchmark, tmp_path
):
    suite = open_suite(str(write_suite(tmp_path, "answers", "reconstruction", "steps")))
    pipe = UnifiedImageToTextPipeline.from_pretrained(causal)
    said, out = [], tmp_path / "out"
    whole = run_suite(pipe, manifest, suite, out / "unified", progress=said.append)
    report = run_suite(pipe, manifest, suite, out / "generation", tasks=DRAWING)
    assert whole["left_out"] == {
        "steps": "a causal model takes one step a token, whatever is asked for"
    }
    assert said[0].startswith("steps: left out, a causal model")
    assert set(report["left_out"]) == {"answers", "steps"}
    assert report["left_out"]["answers"] == (
        "it needs a model trained for vqa; this one is for text_to_image, unconditional_image"
    )
    assert not any(name.startswith("answers") for name in report["metrics"])
    assert "trained for vqa" in (out / "generation/report.html").read_text()
    found = benchmark.compared({"unified": "", "generation": ""}, out, "unified")
    assert set(found["generation"]) == set(report["metrics"]) < set(whole["metrics"])
    with pytest.raises(ConfigError, match="Did you mean `caption`"):
        run_suite(pipe, manifest, suite, out, tasks=["captions"])
    with pytest.raises(ConfigError, match="task of measure `wrong`"):
        register_measure("wrong", "UnifiedImageToTextPipeline", ["drawing"])


def test_evaluate_takes_the_tasks_of_a_causal_pipeline(capsys, tmp_path, causal):
    manifest = write_squares(tmp_path / "data")
    suite = write_suite(tmp_path, "answers", "likelihood", "inpainting", limit=2)
    arguments = [
        str(causal), "--suite", str(suite), "--manifest", str(manifest), "--tasks",
        "text_to_image,unconditional_image", "--output", str(tmp_path / "out"), "--device", "cpu",
    ]  # fmt: skip
    assert cli.main(["evaluate", *arguments, "--format", "json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report["left_out"]) == {"answers"}
    assert "likelihood.image_given_text_nats" in report["metrics"]
    assert "likelihood.text_nats" not in report["metrics"]
    assert "inpainting.hole_psnr" in report["metrics"]
    assert report["settings"]["tasks"] == list(DRAWING)
    assert cli.main(["evaluate", *arguments]) == 0
    assert "answers: left out, it needs a model trained for vqa" in capsys.readouterr().out


def test_the_benchmark_takes_tasks_from_the_configs(benchmark):
    assert benchmark.trained_tasks("unified") == benchmark.trained_tasks("causal")
    assert set(benchmark.trained_tasks("understanding")) == set(READING)
    assert set(benchmark.trained_tasks("generation")) == set(DRAWING)
    assert set(benchmark.trained_tasks("unified")) == set(READING + DRAWING)
    suite = open_suite("baselines")
    names = {entry.name for entry in suite.entries}
    assert all(any(metric.startswith(f"{name}.") for name in names) for metric in benchmark.SHOWN)
    for entry in suite.entries:
        assert get_measure(entry.measure).name == entry.measure


def test_pictures_a_second_are_those_of_the_fastest_setting_that_aligns_as_well(benchmark):
    def metric(value):
        return Metric(value, None, None, 9).to_dict()

    described = {
        f"drawing.steps_{steps}": {"measure": "text_to_image", "num_inference_steps": steps}
        for steps in (4, 16, 8)
    }
    values = {4: 0.1, 8: 0.3, 16: 0.4}
    name = benchmark.ALIGNMENT
    unified = {f"drawing.steps_{n}.{name}": metric(value) for n, value in values.items()}
    reports = {
        "unified": {"settings": {"measurements": described}, "metrics": unified},
        "causal": {
            "settings": {"measurements": described},
            "metrics": {f"{benchmark.DRAWN}.{name}": metric(0.25)},
        },
        "understanding": {"settings": {"measurements": described}, "metrics": {}},
    }
    pipes = {
        role: SimpleNamespace(processor=SimpleNamespace(layout={"condition_attention": attention}))
        for role, attention in (("unified", "prefix"), ("causal", "causal"))
    }
    settings = benchmark.drawing_settings(reports, pipes)
    assert [each["steps"] for each in settings["unified"]] == [4, 8, 16]
    assert [each["steps"] for each in settings["causal"]] == [None]
    assert "understanding" not in settings
    # A suite cut to the pictures says no steps: those of the pipeline, unless it is causal.
    one = {"settings": {"measurements": {}}, "metrics": {f"{benchmark.DRAWN}.{name}": metric(0.4)}}
    cut = benchmark.drawing_settings({"unified": one, "causal": one}, pipes)
    assert [cut[role][0]["steps"] for role in pipes] == [16, None]
    for role in settings.values():
        for each in role:
            each["steps"] = each["steps"] or 64  # As `time_drawing` does.
            each["pictures_per_second"] = 64 / each["steps"]
    found = benchmark.equal_alignment(settings, "causal")
    assert found["unified"]["steps"] == 8
    assert found["causal"]["pictures_per_second"] == 1
    assert benchmark.equal_alignment(settings, "unified")["causal"] is None
    shown = benchmark.table(reports, {"reference": "causal", "equal_alignment": found})
    words = shown.splitlines()[-1].split()
    assert " ".join(words).endswith("alignment of causal 8 in 8 steps 1 in 64 steps -")
    assert shown.splitlines()[0].split()[:4] == ["metric", "unified", "causal", "understanding"]
