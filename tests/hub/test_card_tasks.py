"""What cards say of tasks and sampling: what the model was trained for, and its layout allows."""

import ast
import inspect
import re

import pytest
import yaml

from multimodal_dlm.datasets import open_manifest
from multimodal_dlm.layout import make_layout
from multimodal_dlm.pipelines import (
    CardInfo,
    UnifiedInpaintPipeline,
    UnifiedJointPipeline,
    UnifiedTextGenerationPipeline,
    UnifiedTextToImagePipeline,
    image_to_text,
    text_generation,
)
from multimodal_dlm.pipelines.card_tasks import CardTasks
from multimodal_dlm.pipelines.model_card import render_card
from multimodal_dlm.schedulers import ConfidenceScheduler
from multimodal_dlm.training.components import trained_tasks
from tests.conftest import REPOSITORY
from tests.pipelines.tiny import tiny_components

READING = ("caption", "vqa", "unconditional_text")


def tasks_of(*tasks, max_text=40, **layout):
    made = make_layout(max_text=max_text, num_image_tokens=64, **layout)
    return CardTasks(tasks, made)


def rows(table):
    return [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines()[2:]]


def config(**text):
    return ConfidenceScheduler(modalities={"image": {}, "text": text}).config


def test_a_card_whose_tasks_are_not_known_lists_all():
    tasks = tasks_of()
    assert rows(tasks.table()) == [
        "text-to-image", "captioning", "question answering", "text, infilling", "joint generation",
        "inpainting",
    ]  # fmt: skip
    assert tasks.sampling(config()) == (
        "Text-to-image and inpainting: 16 steps, guidance 2.0. Captions: 24 positions, answers: 8,"
        " one step per position, guidance off. Joint: 32 steps, the caption first."
    )


def test_cards_list_what_was_trained():
    text = tasks_of("text")
    assert rows(text.table()) == ["text, infilling"]
    assert text.tags()[0] == "text-generation"
    assert text.sampling(config()) == "Texts: 24 positions, one step per position, guidance off."
    assert text.usage().count("```python") == 1
    assert "image" not in text.usage().replace("from PIL import Image", "")
    assert text.summary() == "One discrete diffusion transformer to write texts."
    reading = tasks_of(*READING)
    assert rows(reading.table()) == ["captioning", "question answering", "text, infilling"]
    assert {"text-to-image", "any-to-any"}.isdisjoint(reading.tags())
    assert "Text-to-image" not in reading.sampling(config())
    assert "Inpaint" not in reading.usage()
    assert rows(tasks_of("vqa").table()) == ["question answering"]
    assert "pipe(image)" not in tasks_of("vqa").usage()
    drawing = tasks_of("text_to_image", "unconditional_image")
    assert rows(drawing.table()) == ["text-to-image", "inpainting"]
    assert drawing.sampling(config()) == "Text-to-image and inpainting: 16 steps, guidance 2.0."
    for tasks in (text, reading, drawing):
        for code in re.findall(r"```python\n(.*?)\n```", tasks.usage(), re.DOTALL):
            ast.parse(code)


def test_left_to_right_models_and_blocks_are_described_as_they_run():
    causal = tasks_of("text_to_image", "caption", "text", condition_attention="causal")
    assert causal.sampling(config()) == (
        "Text-to-image and inpainting: one step per token (64 a picture), guidance 2.0."
        " Captions: 24 positions, one step per position, left to right, guidance off."
    )
    assert "picture before the holes" in causal.table()
    assert "template" not in causal.usage()
    assert "masked-diffusion" not in causal.tags()
    assert "diffusion" not in causal.summary()
    blocks = tasks_of("text", max_text=20, block_lengths=[16, 8, 4])
    assert blocks.sampling(config()) == (
        "Texts: 20 positions, in blocks of 16 (trained with 8 and 4 too), at most one step per"
        " position, guidance off."
    )
    rule = config(commit_rule="threshold", commit_rule_options={"threshold": 0.9})
    assert "at most one step per position" in tasks_of("caption").sampling(rule)


def test_numbers_are_those_of_the_signatures(monkeypatch):
    def changed(*pipelines, **defaults):
        for pipeline in pipelines:
            signature = inspect.signature(pipeline.__call__)
            parts = [
                part.replace(default=defaults[name]) if name in defaults else part
                for name, part in signature.parameters.items()
            ]
            monkeypatch.setattr(
                pipeline.__call__, "__signature__", signature.replace(parameters=parts),
                raising=False,
            )  # fmt: skip

    changed(UnifiedTextToImagePipeline, num_inference_steps=12, guidance_scale=3.0)
    changed(UnifiedInpaintPipeline, guidance_scale=1.0)
    changed(UnifiedJointPipeline, num_inference_steps=9)
    changed(UnifiedTextGenerationPipeline, guidance_scale=1.5)
    monkeypatch.setattr(image_to_text, "CAPTION_LENGTH", 30)
    monkeypatch.setattr(text_generation, "TEXT_LENGTH", 50)
    assert tasks_of().sampling(config()) == (
        "Text-to-image: 12 steps, guidance 3.0. Inpainting: 16 steps, guidance off. Captions: 30"
        " positions, answers: 8, texts: 40, one step per position, guidance off, guidance 1.5."
        " Joint: 9 steps, the caption first."
    )


def test_the_whole_card_follows_its_tasks():
    pipe = UnifiedTextToImagePipeline(**tiny_components())
    pipe.card = CardInfo(tasks=READING)
    card = render_card(pipe, {})
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["pipeline_tag"] == front["tags"][0] == "image-to-text"
    assert "inpainting" not in card
    assert "Captions: 20 positions, answers: 8," in card
    pipe.card = CardInfo(tasks=("text",))
    assert "Pictures are" not in render_card(pipe, {})


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("baselines_understanding", set(READING)),
        ("baselines_generation", {"text_to_image", "unconditional_image"}),
        ("reasoning", {"text"}),
    ],
)
def test_training_writes_the_tasks_of_its_data(name, expected, tmp_path):
    manifest = open_manifest(REPOSITORY / f"datasets/{name}.yaml")
    assert set(trained_tasks(manifest)) == expected
    # With what the start knows, where it says so.
    assert trained_tasks(manifest, str(tmp_path)) == ()
    CardInfo().save(tmp_path)
    assert trained_tasks(manifest, str(tmp_path)) == ()
    CardInfo(tasks=("joint",)).save(tmp_path)
    assert set(trained_tasks(manifest, str(tmp_path))) == {*expected, "joint"}
