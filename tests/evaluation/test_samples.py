"""What a run leaves to look at."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from PIL import Image

from multimodal_dlm.datasets import open_manifest
from multimodal_dlm.evaluation.samples import (
    BackboneSamples,
    ReconstructionSamples,
    held_out_pictures,
)
from tests.evaluation.toy import write_squares
from tests.pipelines.tiny import tiny_components


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    return held_out_pictures(open_manifest(write_squares(tmp_path_factory.mktemp("data"))))


def state(folder, model, components, step=10):
    logged = {}
    return SimpleNamespace(
        step=step, output_dir=folder, components=components, log=logged.update,
        averaged=lambda: nullcontext(model), logged=logged,
    )  # fmt: skip


def test_held_out_pictures_are_not_from_training(held_out):
    assert len(held_out) == 3
    assert [each.caption for each in held_out][0] == "an emoji of a red square"
    # Different questions, so that several kinds are shown.
    assert len({each.question for each in held_out}) == 2


def test_sheets_and_captions_of_a_backbone(tmp_path, held_out):
    components = tiny_components()
    transformer = components.pop("transformer")
    callback = BackboneSamples(held_out, prompts=["a red square", "a blue square"])
    for step in (10, 20):
        run = state(tmp_path, transformer, components, step)
        callback(run)
        assert 0 <= run.logged["samples/answers_right"] <= 1
    sheets = [tmp_path / "samples" / f"step_{step:07d}.png" for step in (10, 20)]
    # The same weights and seeds draw the same sheet.
    assert Image.open(sheets[0]).tobytes() == Image.open(sheets[1]).tobytes()
    history = json.loads((tmp_path / "samples" / "captions.json").read_text())
    assert list(history) == ["0000010", "0000020"]
    assert len(history["0000010"]["captions"]) == 3
    assert history["0000010"]["answers"][0]["truth"] == "red"


def test_reconstructions_of_a_tokenizer(tmp_path, held_out):
    tokenizer = tiny_components()["image_tokenizer"]
    ReconstructionSamples(held_out, columns=2)(state(tmp_path, tokenizer, {}))
    sheet = Image.open(tmp_path / "samples" / "step_0000010.png")
    assert sheet.height > 4 * 96  # Two rows of pairs.


def test_nothing_to_reconstruct_writes_nothing(tmp_path):
    ReconstructionSamples([])(state(tmp_path, None, {}))
    assert not list(tmp_path.iterdir())
