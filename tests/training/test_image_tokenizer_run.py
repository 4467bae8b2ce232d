"""The same loop trains an image tokenizer: pixels in, a released folder out."""

import dataclasses

import torch

from multimodal_dlm.tokenizers.image import ImageTokenizer
from multimodal_dlm.training.config import ModelConfig, ObjectiveConfig
from multimodal_dlm.training.run import train
from tests.training.runs import IMAGE_SIZE, run_config


def test_an_image_tokenizer_is_trained_by_the_same_loop(run_root):
    config = run_config(run_root, "image_tokenizer", num_train_steps=8)
    config = dataclasses.replace(
        config,
        model=ModelConfig(
            component="image_tokenizer",
            options={
                "image_size": IMAGE_SIZE,
                "channels": (8, 8),
                "encoder_layers": (1, 1),
                "decoder_layers": (1, 1),
                "quantizer": {"type": "fsq", "levels": [4, 4, 3]},
            },
        ),
        objective=ObjectiveConfig("reconstruction", {"perceptual_weight": 0.0}),
    )
    result = train(config)
    assert result["is_finished"]
    assert result["psnr"] > 5
    tokenizer = ImageTokenizer.from_pretrained(result["export"])
    assert tokenizer.fingerprint == tokenizer.compute_fingerprint()
    codes = tokenizer.encode(torch.rand(1, 3, IMAGE_SIZE, IMAGE_SIZE))
    assert codes[0].shape == (1, 4, 4)
