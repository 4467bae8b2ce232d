"""Pictures carry their recipe, and the recipe makes the same picture again."""

import copy
import json

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch.testing._internal.two_tensor import TwoTensor

from multimodal_dlm.errors import ConfigError, DataError
from multimodal_dlm.pipelines import (
    RowSeeds,
    UnifiedTextToImagePipeline,
    manifest,
    read_recipe,
    save_image,
)
from multimodal_dlm.pipelines.image_metadata import RECIPE_KEY
from multimodal_dlm.pipelines.manifest import weights_fingerprint
from tests.pipelines.tiny import seeded


@pytest.fixture
def draw(make):
    return make(UnifiedTextToImagePipeline)


def test_recipe_in_the_file_draws_the_same_picture(draw, tmp_path):
    shared = torch.Generator().manual_seed(5)
    images = draw(
        ["a red apple", "a green pear"],
        negative_prompt="a blue circle",
        num_inference_steps=5,
        guidance_stop=0.8,
        guidance_schedule="linear",
        generator=shared,
    ).images
    path = save_image(images[1], tmp_path / "made" / "pear.png")
    recipe = read_recipe(path)
    assert recipe["prompt"] == "a green pear"
    assert recipe["negative_prompt"] == "a blue circle"
    assert recipe["guidance_schedule"] == "linear"
    assert recipe["pipeline"] == "UnifiedTextToImagePipeline"
    assert recipe["model_fingerprint"] == draw.model_fingerprint
    assert recipe["image_tokenizer_fingerprint"] == weights_fingerprint(draw.image_tokenizer)
    names = ("prompt", "negative_prompt", "num_inference_steps", "guidance_scale")
    names += ("guidance_start", "guidance_stop", "guidance_schedule")
    again = draw(
        **{name: recipe[name] for name in names}, generator=RowSeeds((recipe["row_seed"],))
    )
    assert np.array_equal(np.asarray(again.images[0]), np.asarray(Image.open(path)))


def test_recipe_survives_editing_in_memory_and_can_be_left_out(draw, tmp_path):
    image = draw("a", num_inference_steps=2, generator=seeded(0)).images[0]
    assert read_recipe(save_image(image.copy(), tmp_path / "copy.png"))["prompt"] == "a"
    given = {"note": "grün", "seed": 3}
    assert read_recipe(save_image(image, tmp_path / "given.png", given)) == given
    path = save_image(image, tmp_path / "private.png", {})
    with pytest.raises(DataError, match="carries no recipe"):
        read_recipe(path)


def test_recipes_are_json(draw):
    image = draw("a", num_inference_steps=2).images[0]
    assert json.loads(json.dumps(image.info["recipe"])) == image.info["recipe"]


def test_other_formats_are_refused_with_the_name_to_use(tmp_path):
    with pytest.raises(ConfigError, match=r"Use `apple.png`"):
        save_image(Image.new("RGB", (4, 4)), tmp_path / "apple.jpg")
    with pytest.raises(ConfigError, match="JSON values only"):
        save_image(Image.new("RGB", (4, 4)), tmp_path / "apple.png", {"x": torch.zeros(1)})
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(DataError, match="not a readable picture"):
        read_recipe(tmp_path / "text.png")
    Image.new("P", (4, 4)).save(tmp_path / "named.png", format="GIF")
    with pytest.raises(DataError, match="must be PNG, JPEG or WebP"):
        read_recipe(tmp_path / "named.png")
    with pytest.raises(DataError, match="there is no file"):
        read_recipe(tmp_path / "none.png")


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "1" * 10_000])
def test_damaged_recipes_are_refused(text, tmp_path):
    info = PngInfo()
    info.add_itxt(RECIPE_KEY, text)
    Image.new("RGB", (4, 4)).save(tmp_path / "damaged.png", pnginfo=info)
    with pytest.raises(DataError, match="recipe of .* is damaged"):
        read_recipe(tmp_path / "damaged.png")


def test_fingerprint_follows_the_weights_and_not_their_dtype(make):
    from tests.pipelines.tiny import tiny_components

    pipe = UnifiedTextToImagePipeline(**tiny_components())
    pipe.transformer.to(torch.bfloat16)
    low = pipe.model_fingerprint
    pipe.transformer.to(torch.float32)
    assert pipe.model_fingerprint == low
    with torch.no_grad():
        pipe.transformer.norm.weight.add_(1.0)
    assert pipe.model_fingerprint != low


def test_fingerprint_follows_another_backbone_and_exchanged_tensors(monkeypatch):
    from tests.pipelines.tiny import tiny_components

    pipe = UnifiedTextToImagePipeline(**tiny_components())
    first, found = pipe.transformer, {pipe.model_fingerprint}
    pipe.transformer = copy.deepcopy(first)
    pipe.transformer.norm.weight.data = pipe.transformer.norm.weight.data + 1
    found.add(pipe.model_fingerprint)
    pipe.transformer.norm.weight.data = pipe.transformer.norm.weight.data + 1
    found.add(pipe.model_fingerprint)
    pipe.transformer.to(torch.bfloat16)
    found.add(pipe.model_fingerprint)
    assert len(found) == 4
    monkeypatch.setattr(manifest, "weights_fingerprint", lambda module: pytest.fail("again"))
    assert pipe.model_fingerprint in found
    pipe.transformer = first
    assert pipe.model_fingerprint in found


def test_a_wrapped_weight_has_a_fingerprint_that_follows_what_it_wraps():
    """As int8 layers are: a tensor without storage of its own around values and scales."""
    layer = torch.nn.Linear(2, 2, bias=False)
    values, scales = torch.ones(2, 2), torch.full((2, 2), 2.0)
    layer.weight = torch.nn.Parameter(TwoTensor(values, scales), requires_grad=False)
    found = {manifest.remembered_fingerprint(layer)}
    assert found == {manifest.weights_fingerprint(layer)}
    layer.weight.b[0, 0] = 3.0
    found.add(manifest.remembered_fingerprint(layer))
    layer.weight = torch.nn.Parameter(TwoTensor(scales, values), requires_grad=False)
    found.add(manifest.remembered_fingerprint(layer))
    assert len(found) == 3
