"""Named sizes."""

import pytest
import torch

from multimodal_dlm.errors import ConfigError
from multimodal_dlm.models.presets import PRESETS, get_preset
from multimodal_dlm.models.transformer import UnifiedTransformerModel
from multimodal_dlm.vocabulary import UnifiedVocabulary

MILLIONS = {
    "tiny": (0.3, 0.8),
    "small": (12, 14),
    "base": (85, 110),
    "large": (300, 350),
    "1b": (900, 1_100),
    "8b": (7_000, 8_200),
}


@pytest.mark.parametrize("name", PRESETS)
def test_sizes_are_what_their_names_say(name):
    segments = {"text": [("text", 2048)], "image": [("image.0", 2560)]}
    vocabulary = UnifiedVocabulary.build(segments=segments).to_dict()
    with torch.device("meta"):
        model = UnifiedTransformerModel(vocabulary=vocabulary, **get_preset(name))
    low, high = MILLIONS[name]
    assert low < sum(weight.numel() for weight in model.parameters()) / 1e6 < high


def test_a_preset_is_a_copy():
    get_preset("tiny")["hidden_size"] = 1
    assert get_preset("tiny")["hidden_size"] == 64


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(ConfigError, match="Did you mean `small`"):
        get_preset("smal")
