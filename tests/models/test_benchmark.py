"""Every benchmark runs as its page says and reports what its readers look up."""

import importlib
import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from multimodal_dlm.models.kv_cache import ExactCacheConfig
from multimodal_dlm.models.memory import keep_freed_memory

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
SAMPLE = FOLDER.parent / "datasets" / "sample" / "emoji.yaml"
TINY_STEP = [
    "--preset", "tiny", "--noise-conditioning", "none", "--rows", "4", "--micro-batch", "2",
    "--length", "12", "--steps", "1", "--memory", "--memory-vocabulary", "9000",
    "--memory-tokens", "256",
]  # fmt: skip
OPTIONS = {
    "tokenized_reading": ["--batches", "1", "--repeats", "1"],
    "reader": [
        "--preset",
        "tiny",
        "--rows",
        "4",
        "--rounds",
        "1",
        "--restores",
        "20",
    ],
    "allocators": ["--steps", "2", "--rounds", "1"],
    "training_step": TINY_STEP,
    "text_to_image": ["--batches", "1", "2", "--repeats", "1", "--steps", "2", "--curve", "1"],
    "cached_pictures": ["--prompts", "1", "--steps", "3", "--repeats", "1", "--batches", "1"],
    "image_to_text": ["--repeats", "1"],
    "layer_variants": [
        "--variants",
        "bfloat16",
        "float32_int8_weights",
        "--steps",
        "2",
        "--batches",
        "1",
        "--repeats",
        "1",
        "--pictures",
        "4",
    ],
    "kill_storm": ["--kills", "3", "--steps", "12"],
    "text_generation": ["--preset", "tiny", "--quick"],
    "step_flops": [str(FOLDER.parent / "configs/smoke.yaml"), "--steps", "2"],
}


@pytest.fixture
def report(tmp_path, monkeypatch, capsys):
    """Runs a script as `python benchmarks/NAME.py` does and returns what it wrote."""

    def run(name, *options):
        path = tmp_path / "report.json"
        monkeypatch.syspath_prepend(str(FOLDER))
        monkeypatch.setattr("sys.argv", [name, *OPTIONS[name], *options, "--json", str(path)])
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
        written = json.loads(path.read_text())
        assert json.loads(capsys.readouterr().out) == written
        assert written["machine"]["threads"] == torch.get_num_threads()
        assert written["versions"]["torch"] == torch.__version__
        return written

    return run


def test_every_script_is_listed():
    helpers = {
        "amused", "decoding", "drawing_quality", "live_bytes", "reasoning_setup", "reporting",
        "research_loop", "step_parts", "storm_run",
    }  # fmt: skip
    scripts = {path.stem for path in FOLDER.glob("*.py")} - helpers
    # `baselines` needs trained models: tests/evaluation/test_one_direction.py.
    assert scripts == {*OPTIONS, "baselines"}
    page = (FOLDER / "README.md").read_text()
    assert all(f"`{name}.py`" in page for name in scripts)


def test_a_training_step(report):
    found = report("training_step")
    assert found["utilisation"] > 0
    assert found["tokens_per_second"] > 0
    weights = 2 * (4 * 64 * 64 + 3 * 64 * 128)
    assert found["matmul_flops_per_step"] > 6 * weights * 4 * 12
    assert set(found["ratios"]) == {"research_loop", "research_loop_same_dtype", "bert"}
    assert all(ratio > 0 for ratio in found["ratios"].values())
    memory = found["memory"]
    assert memory["vocabulary"] == 9000
    logits = 128 * 2 * 9000 * 4 / 2**20  # float32, once; the full step holds several such
    assert memory["peak_mebibytes"]["full_logits"] - memory["peak_mebibytes"]["ours"] > logits
    assert memory["ratio"] < 0.5


@pytest.mark.slow
def test_allocators(report, tmp_path):
    library = next((Path(torch.__file__).parent / "lib").glob("libgomp*"))
    found = report("allocators", "--library", str(library))
    assert found["ratio"] > 0
    counts = {name: len(rates) for name, rates in found["tokens_per_second"].items()}
    assert counts == {"glibc": 1, "other": 1}
    assert found["config"]["library"] == library.name
    (tmp_path / "no.so").write_text("no library")
    with pytest.raises(SystemExit, match="no.so"):
        report("allocators", "--library", str(tmp_path / "no.so"))


def test_live_bytes_are_counted_to_the_byte(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    live_bytes = importlib.import_module("live_bytes")
    held = torch.zeros(256)  # 1 KiB, alive throughout

    def step():
        first = held + 1  # 2 KiB
        first = first.repeat(4)  # 2 + 4 KiB at the peak, then 5
        view = first.view(2, -1)  # a view is no new storage
        return float((view[0] * 2).sum())  # 2 KiB more, and a sum of 4 bytes

    peaks = [live_bytes.peak_bytes(step, [held, held]) for _ in range(2)]
    assert peaks == [1024 + 4096 + 2048 + 4] * 2


def test_the_reader(report):
    found = report("reader")
    assert found["ratios"]["webdataset"] > 0
    assert 0 < found["loader"]["share"] < 1
    assert found["restored"]["restores"] == 20
    assert found["restored"]["differences"] == 0
    assert found["restored"]["state_bytes"] < 4096


@pytest.mark.slow
def test_tokenized_reading(report, tmp_path):
    found = report("tokenized_reading", "--tokenized", str(tmp_path / "made" / "sample.yaml"))
    assert found["ratios"]["to_raw"] > 1


@pytest.mark.slow
def test_text_to_image(report):
    found = report("text_to_image")
    names = {"research_loop", "research_loop_same_dtype_and_steps", "amused"}
    assert set(found["ratios"]) == set(found["denominators"]) == names
    assert found["ratios"] == found["ratios_by_batch"]["2"]
    assert {row["batch"] for row in found["seconds_per_picture"]} == {1, 2}
    assert {row["run"] for row in found["seconds_per_picture"]} == names | {
        "ours", "ours_default", "ours_1_steps", "amused_text_encoder",
    }  # fmt: skip
    assert all(row["median"] > 0 for row in found["seconds_per_picture"])
    sizes = found["parameters"]
    assert abs(sizes["amused_backbone"] / sizes["backbone"] - 1) < 0.02
    for step in found["one_step"]:
        assert step["operators"] > 100
        assert 0.5 < sum(row["share"] for row in step["rows"]) <= 1


@pytest.mark.slow
def test_quality_of_drawings(report, tmp_path):
    options = [
        "--repeats", "0", "--quality", "--manifest", str(SAMPLE), "--limit", "6", "--batches", "4",
        "--num-train", "24", "--candidates", "2", "--drawn", str(tmp_path / "drawn"),
    ]  # fmt: skip
    found = report("text_to_image", *options)["quality"]
    assert found["prompts"] == 6
    assert set(found["metrics"]) == set(found["drawers"]) == {
        "research_loop", "ours_default", "bfloat16_2_cosine", "bfloat16_2_step_profile",
    }  # fmt: skip
    own = found["metrics"]["research_loop"]["own_at_5"]
    assert own["is_within"]
    assert own["difference"]["value"] == own["difference"]["low"] == own["difference"]["high"] == 0
    kept = sorted(path.name for path in (tmp_path / "drawn" / "research_loop").iterdir())
    assert kept == ["00000.npy", "00004.npy", "what.json"]
    again = report("text_to_image", *options)["quality"]
    assert again == found
    with pytest.raises(SystemExit, match="holds other pictures"):
        report("text_to_image", *options, "--limit", "5")


def test_kept_drawings_are_those_of_the_same_batches(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(FOLDER))
    drawing = importlib.import_module("drawing_quality")

    def draw(prompts, generator):
        return SimpleNamespace(images=[np.full((2, 2, 3), int(prompt)) for prompt in prompts])

    def drawn(batch_size):
        data = drawing.HeldOut(None, "test", batch_size=batch_size)
        pictures = drawing.drawn_once(drawing.Drawer(draw, {}), list("01234"), data, tmp_path)
        return [int(picture[0, 0, 0]) for picture in pictures]

    assert drawn(4) == drawn(4) == list(range(5))
    with pytest.raises(SystemExit, match="holds other pictures"):
        drawn(2)


@pytest.mark.slow
def test_cached_pictures(report):
    found = report("cached_pictures")
    for rows in found["divergence"].values():
        assert set(rows) == set(found["caches"])
        assert rows["exact"]["argmax_agreement"] > 0.99  # Of float32 logits: ties may turn.
        assert rows["exact"]["kl_p95"] < 1e-6 < rows["feature"]["kl_p95"]
    columns = {row["cache"]: row["columns"] for row in found["seconds_per_picture"]}
    assert set(columns) == {"no_cache", *found["caches"]}
    assert columns["exact"] < columns["no_cache"] == 1
    assert all(0 < share <= 1 for share in columns.values())


@pytest.mark.slow
def test_image_to_text(report):
    found = report("image_to_text")
    assert set(found["ratios"]) == {
        "caption_prefix", "caption_prefix_256_tokens", "caption_prefix_8_pictures",
        "caption_prefix_256_tokens_8_pictures", "vqa_shared_image",
    }  # fmt: skip
    for row in found["rows"]:
        assert row["identical_ids"]
        assert row["forwards"] > 1
        for key in ("full_recompute", "exact_cache"):
            low, high = row[f"quartiles_{key}"]
            assert 0 < low <= row[f"seconds_{key}"] <= high
            assert row[f"operators_{key}"] > 100 * row["forwards"]
    for parts in found["step"].values():
        native = {"native projections", "native output", "native MLP"}
        assert set(parts) - {"linear", *native} == {
            "attention", "rest of the forward", "head", "sampling", "loop",
        }  # fmt: skip
        assert "linear" in parts or native <= set(parts)
        assert abs(sum(part["share"] for part in parts.values()) - 1) < 0.01
        assert all(part["operators"] > 0 for part in parts.values())


@pytest.mark.slow
def test_layer_variants(report):
    found = report("layer_variants")
    rows = {row["variant"]: row for row in found["variants"]}
    assert {"float32", "bfloat16"} <= set(rows)
    assert set(rows) | set(found["left_out"]) == {"float32", "bfloat16", "float32_int8_weights"}
    assert rows["float32"]["difference"] == [0, 0, 0]
    assert rows["float32"]["times_float32"] == {"1": 1.0}
    assert 0 < abs(rows["bfloat16"]["difference"][0]) < 0.02 * rows["float32"]["nats"]
    assert found["pictures"] == 4


def test_bf16_in_software_is_timed_only_where_it_is_named(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    module = importlib.import_module("layer_variants")
    monkeypatch.setattr(module, "load", lambda folder, dtype: lambda *_, **__: None)
    plain = {name: (dtype, module.as_loaded) for name, (dtype, _) in module.variants().items()}
    monkeypatch.setattr(module, "variants", lambda: plain)
    low = {name for name, (dtype, _) in plain.items() if dtype == torch.bfloat16}
    for reason, names, expected in (
        ("slow", None, low),
        (None, None, set()),
        ("slow", ["bfloat16"], set()),
    ):
        monkeypatch.setattr(module, "software_bf16", lambda device, reason=reason: reason)
        pipes, left_out = module.open_variants("folder", names)
        assert left_out == dict.fromkeys(expected, "slow")
        assert set(pipes) == ({"float32", *names} if names else set(plain) - expected)


def test_parts_of_a_step_are_disjoint_and_whole(monkeypatch):
    """Three steps of known parts: what an inner part does is not counted for the outer one."""
    monkeypatch.syspath_prepend(str(FOLDER))
    step_parts = importlib.import_module("step_parts")
    layer, ones = torch.nn.Linear(4, 4, bias=False), torch.ones(2, 4)

    def run(mark):
        for step in range(3):
            layer(ones)  # t, mm
            _ = ones + 1
            mark(None, step, 1.0, {})

    found = step_parts.step_parts(torch.no_grad()(run), 2)
    assert {name: part["operators"] for name, part in found.items()} == {"linear": 2, "loop": 1}
    assert abs(sum(part["share"] for part in found.values()) - 1) < 0.01


def test_text_generation(report):
    found = report("text_generation", "--methods", "autoregressive", "autoregressive_pipeline")
    assert set(found["ratios"]) == {"autoregressive", "autoregressive_pipeline"}
    assert all(ratio > 0 for ratio in found["ratios"].values())
    rows = {row["method"]: row for row in found["rows"]}
    # Random weights write on to the end, 64 tokens.
    for name in ("autoregressive", "autoregressive_pipeline"):
        assert rows[name]["tokens_per_forward"] == pytest.approx(1.0, abs=0.1)
        assert rows[name]["recompute_factor"] < 1.1
    assert rows["block_16"]["tokens_per_forward"] > 2
    # 64 tokens in four blocks, four forwards each; all but the last block computed once more.
    assert rows["block_16"]["recompute_factor"] == pytest.approx(4.75, abs=0.8)
    assert rows["block_16"]["kv_mebibytes"] == rows["autoregressive"]["kv_mebibytes"] > 0
    (stated,) = found["theory"]
    assert stated["relative_to_one"]["1"] == 1.0
    cost, needed = stated["relative_to_one"], stated["tokens_per_forward_needed"]["block_16"]
    assert needed["4_forwards"]["own_commit_forward"] == pytest.approx(cost["16"] * 1.25)
    assert needed["4_forwards"]["fused"] == pytest.approx((cost["32"] + 3 * cost["16"]) / 4)
    curve = found["tokens_per_forward"]
    (measured,) = curve["lines"]["measured"]
    assert curve["x"] == [16]
    assert measured == rows["block_16"]["tokens_per_forward"]
    (fused,) = curve["lines"]["needed"]
    assert fused == pytest.approx(cost["16"] + (cost["32"] - cost["16"]) * measured / 16)


def test_flops_of_steps_are_counted(report, monkeypatch):
    monkeypatch.chdir(FOLDER.parent)
    found = report("step_flops")
    (run,) = found["runs"].values()
    assert run["steps_counted"] == 2
    assert 0 < run["teraflops_per_step"] < 0.1
    assert run["petaflops"] * 1000 == pytest.approx(
        run["teraflops_per_step"] * run["num_train_steps"], abs=0.06
    )
    assert list(found["relative"].values()) == [1.0]


def test_the_bare_loop_writes_what_the_pipeline_writes(monkeypatch):
    """The baseline is the same decoding without the pipeline's loop."""
    monkeypatch.syspath_prepend(str(FOLDER))
    setup, decoding = (importlib.import_module(n) for n in ("reasoning_setup", "decoding"))
    _, causal = setup.random_pipelines("tiny")
    for weight in causal.transformer.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.2, generator=torch.Generator().manual_seed(1))
    causal.transformer.double()
    causal.set_progress_bar_config(disable=True)
    (prompts, _), *_ = setup.batches(setup.made_up_items(), 256, 2, 2)
    found = decoding.decode(causal, prompts, 24)
    causal.transformer.enable_cache(ExactCacheConfig())
    expected = causal(prompts, gen_length=24, output_type="seq").sequences
    assert torch.equal(found[:, :23], expected[:, :23])  # The last place takes `<eos>`.
    assert len(set(found.flatten().tolist())) > 5


@pytest.mark.slow
def test_kill_storm(report):
    found = report("kill_storm")
    assert found["kills"] == found["identical"] == sum(found["rounds"]) == 3
    assert found["differences"] == {}
    assert found["kills_by_aim"] == {"save": 1, "start": 1, "progress": 1}
    assert len(found["final_hash"]) == 64


@pytest.mark.slow
def test_kill_storm_over_two_processes(report):
    found = report("kill_storm", "--processes", "2", "--kills", "1")
    assert found["kills"] == found["identical"] == found["settings"]["processes"] - 1 == 1


def test_keeping_memory_says_whether_it_could():
    assert isinstance(keep_freed_memory(), bool)
