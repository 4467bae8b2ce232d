"""Sharing through the Hub client, its HTTP calls intercepted; nothing leaves the process."""

import hashlib
import json

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError

from multimodal_dlm import cli
from multimodal_dlm.errors import CheckpointError, ConfigError
from multimodal_dlm.pipelines import (
    CardInfo,
    UnifiedImageToTextPipeline,
    UnifiedTextToImagePipeline,
    load_pipeline,
)
from tests.evaluation.toy import write_squares
from tests.hub.conftest import COMMIT
from tests.pipelines.tiny import seeded, tiny_components

EXPECTED = {
    "README.md",
    "SHA256SUMS",
    "model_card.json",
    "model_index.json",
    "image_tokenizer/config.json",
    "image_tokenizer/diffusion_pytorch_model.safetensors",
    "scheduler/scheduler_config.json",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model.safetensors",
}


@pytest.fixture(scope="module")
def pipe():
    made = UnifiedTextToImagePipeline(**tiny_components())
    made.set_progress_bar_config(disable=True)
    return made


def draw(pipe):
    pipe.set_progress_bar_config(disable=True)
    arguments = {"num_inference_steps": 4, "output_type": "codes", "generator": seeded(0)}
    return pipe("a red apple", **arguments).images[0]


def files_below(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_push_to_a_local_folder_writes_what_would_be_uploaded(pipe, tmp_path):
    target = tmp_path / "model"
    assert pipe.push_to_hub(str(target)) == str(target)
    assert files_below(target) == EXPECTED
    assert torch.equal(draw(load_pipeline(target)), draw(pipe))


def test_push_uploads_every_file_in_one_commit(pipe, hub):
    address = pipe.push_to_hub("someone/model", token="hf_x", private=True, commit_message="First")
    assert address == f"https://huggingface.co/someone/model/commit/{'c' * 40}"
    assert set(hub.files) == EXPECTED
    assert len(hub.commits) == 1
    assert hub.cards == [hub.files["README.md"].decode()]  # The client had the card validated.
    assert hub.commits[0]["summary"] == "First"
    assert hub.created[0]["name"] == "model"
    assert hub.created[0].get("private", hub.created[0].get("visibility") == "private")
    assert not any(name.endswith((".bin", ".pt", ".pkl", ".ckpt", ".py")) for name in hub.files)
    assert json.loads(hub.files["model_index.json"])["_class_name"] == type(pipe).__name__


def test_push_then_load_from_the_hub_gives_the_same_pipeline(pipe, hub, tmp_path):
    pipe.push_to_hub("someone/model", token="hf_x", card=CardInfo(title="Shared model"))
    hub.files["pipeline.py"] = b"raise SystemExit('foreign code was run')"
    hub.files["transformer/weights.bin"] = b"pickle"
    for load in (load_pipeline, UnifiedTextToImagePipeline.from_pretrained):
        loaded = load("someone/model", cache_dir=tmp_path)
        assert type(loaded) is UnifiedTextToImagePipeline
        assert torch.equal(draw(loaded), draw(pipe))
        assert loaded.card.title == "Shared model"
    assert not any(path.endswith((".py", ".bin")) for _, path in hub.requests)
    other = UnifiedImageToTextPipeline.from_pretrained("someone/model", cache_dir=tmp_path)
    assert type(other) is UnifiedImageToTextPipeline


def test_save_pretrained_can_push(pipe, hub, tmp_path):
    folder = tmp_path / "named"
    pipe.save_pretrained(folder, push_to_hub=True, repo_id="someone/model", token="hf_x")
    assert set(hub.files) == files_below(folder) == EXPECTED


def test_a_folder_with_other_files_is_pushed_without_them_and_loads(pipe, hub, tmp_path):
    folder = tmp_path / "named"
    kept = '{"name_or_path": "mine"}'
    for name in ("sample.png", ".env", ".git/config.json", "train.log", "wandb/config.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(kept)
    (folder / "prompts.json").write_text("[1]")
    pipe.save_pretrained(folder, push_to_hub=True, repo_id="someone/model", token="hf_x")
    assert set(hub.files) == {*EXPECTED, "prompts.json", "wandb/config.json"}
    assert (folder / "wandb/config.json").read_text() == kept
    loaded = load_pipeline("someone/model", cache_dir=tmp_path / "cache")
    assert torch.equal(draw(loaded), draw(pipe))


def test_a_refused_commit_is_an_error_and_leaves_nothing(pipe, hub):
    hub.fails_commit = True
    with pytest.raises(HfHubHTTPError, match="no write access"):
        pipe.push_to_hub("someone/model", token="hf_x")
    assert hub.files == {}


def test_a_file_changed_on_the_way_is_refused(pipe, hub, tmp_path):
    pipe.push_to_hub("someone/model", token="hf_x")
    name = "transformer/diffusion_pytorch_model.safetensors"
    content = bytearray(hub.files[name])
    content[-1] ^= 1
    hub.files[name] = bytes(content)
    with pytest.raises(CheckpointError, match="has changed since it was saved"):
        load_pipeline("someone/model", cache_dir=tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trust_remote_code": True}, "foreign code is never run"),
        ({"custom_pipeline": "someone/code"}, "foreign code is never run"),
        ({"use_safetensors": False}, "pickles are never read"),
        ({"dtpe": torch.bfloat16}, "Did you mean `dtype`"),
    ],
)
def test_unsafe_and_unknown_options_are_refused(options, message, tmp_path):
    for load in (load_pipeline, UnifiedTextToImagePipeline.from_pretrained):
        with pytest.raises(ConfigError, match=message):
            load(tmp_path, **options)


def test_missing_folders_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="there is no such folder"):
        load_pipeline("./no/such/folder")
    with pytest.raises(CheckpointError, match="must hold a `model_index.json`"):
        load_pipeline(tmp_path)


def test_components_of_foreign_libraries_are_refused(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    index["scheduler"] = ["subprocess", "Popen"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="Foreign code is never run"):
        UnifiedTextToImagePipeline.from_pretrained(tmp_path, verify=False)


def test_pickles_are_never_written(pipe, tmp_path):
    with pytest.raises(ConfigError, match="writes no pickles"):
        pipe.save_pretrained(tmp_path / "x", safe_serialization=False)
    assert not (tmp_path / "x").exists()


def test_a_cached_repository_loads_without_the_network(pipe, hub, tmp_path):
    pipe.push_to_hub("someone/model", token="hf_x")
    load_pipeline("someone/model", cache_dir=tmp_path)
    hub.requests.clear()
    loaded = load_pipeline("someone/model", cache_dir=tmp_path, local_files_only=True)
    assert hub.requests == []
    assert torch.equal(draw(loaded), draw(pipe))


def test_an_up_to_date_cache_downloads_no_file_again(pipe, hub, tmp_path):
    pipe.push_to_hub("someone/model", token="hf_x")
    load_pipeline("someone/model", cache_dir=tmp_path)
    hub.requests.clear()
    load_pipeline("someone/model", cache_dir=tmp_path)
    assert not [path for method, path in hub.requests if "/resolve/" in path and method == "GET"]


def test_a_report_says_what_was_measured_of_the_hub(pipe, hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    pipe.push_to_hub("someone/model", token="hf_x")
    manifest = write_squares(tmp_path / "data")
    given = ["evaluate", "someone/model", "--suite", "data", "--only", "tokenizer"]
    given += ["--manifest", str(manifest), "--output", str(tmp_path / "out"), "--format", "json"]
    assert cli.main(given) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert report["pipeline"]["name"] == f"someone/model@{COMMIT}"
    weights = "transformer/diffusion_pytorch_model.safetensors"
    digest = hashlib.sha256(hub.files[weights]).hexdigest()
    assert report["pipeline"]["files"][weights] == digest
    assert "measured already" not in captured.err
    assert cli.main(given) == 0
    assert "measured already" in capsys.readouterr().err


def test_subfolders_and_pull_requests_reach_the_hub(pipe, hub):
    pipe.push_to_hub("someone/model", token="hf_x", subfolder="small", create_pr=True)
    assert set(hub.files) == {f"small/{name}" for name in EXPECTED}
    assert hub.asks_review
