"""Real components of tiny size with random weights, for the tests of pipelines and sharing."""

from typing import Any

import torch

from multimodal_dlm.layout import make_layout
from multimodal_dlm.models.presets import get_preset
from multimodal_dlm.models.transformer import UnifiedTransformerModel
from multimodal_dlm.schedulers import ConfidenceScheduler
from multimodal_dlm.tokenizers.image import ImageTokenizer
from multimodal_dlm.tokenizers.text import text_fingerprint, train_text_tokenizer
from multimodal_dlm.vocabulary import UnifiedVocabulary

MAX_TEXT = 20
IMAGE_SIZE = 32
GRID = (4, 4)
TEXTS = [
    "a red apple on a white background",
    "a green pear and a blue circle",
    "what colour is the circle?",
    "is there a square? yes no",
]


def tiny_components(seed: int = 0, *, condition_attention: str = "prefix", **options: Any) -> dict:
    """The four components, keyed as pipelines name them; `options` are the backbone's."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = train_text_tokenizer(TEXTS, vocab_size=330)
        image_tokenizer = ImageTokenizer(
            image_size=IMAGE_SIZE,
            channels=(8, 8),
            encoder_layers=(1, 1),
            decoder_layers=(1, 1),
            quantizer={"type": "fsq", "levels": [4, 4, 3]},
        )
        image_tokenizer.mark_released()
        vocabulary = UnifiedVocabulary.build(
            {
                "text": [("text", len(tokenizer))],
                "image": [("image.0", image_tokenizer.codebook_sizes[0])],
            },
            {"eos": ("text", 0), "fill": ("text", 1)},
            {"text": text_fingerprint(tokenizer), "image": image_tokenizer.fingerprint},
        )
        transformer = UnifiedTransformerModel(
            vocabulary=vocabulary.to_dict(),
            layout=make_layout(
                max_text=MAX_TEXT,
                num_image_tokens=GRID[0] * GRID[1],
                unconditional_text=4,
                condition_attention=condition_attention,
            ),
            **(get_preset("tiny") | options),
        )
        # Larger than at the start of training: prompts and noise levels must matter.
        for name, weight in transformer.named_parameters():
            if weight.dim() > 1 or "scale_shift" in name:
                torch.nn.init.normal_(weight, std=0.3)
    scheduler = ConfidenceScheduler()
    return {
        "transformer": transformer.eval(),
        "scheduler": scheduler,
        "tokenizer": tokenizer,
        "image_tokenizer": image_tokenizer.eval(),
    }


def seeded(*seeds: int) -> list[torch.Generator]:
    """One generator per seed."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]
