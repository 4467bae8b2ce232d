"""A character-level tokenizer and a small vocabulary shared by the core tests."""

from typing import Any

from multimodal_dlm.layout import make_layout
from multimodal_dlm.processing import UnifiedProcessor
from multimodal_dlm.vocabulary import UnifiedVocabulary

GRID = (2, 3)


class CharacterTokenizer:
    """One code per character; 0 is `<eos>`, 1 is `<fill>`."""

    def encode(self, text: str, **kwargs: Any) -> list[int]:
        return [ord(character) + 2 for character in text]

    def decode(self, token_ids: list[int], **kwargs: Any) -> str:
        return "".join(chr(code - 2) for code in token_ids)


def toy_vocabulary(levels: int = 1) -> UnifiedVocabulary:
    image = [(f"image.{level}", 20 + level) for level in range(levels)]
    return UnifiedVocabulary.build(
        {"text": [("text", 300)], "image": image}, {"eos": ("text", 0), "fill": ("text", 1)}
    )


def toy_processor(
    *, levels: int = 1, attention: str = "prefix", max_text: int = 16, blocks: tuple[int, ...] = ()
):
    tokens = GRID[0] * GRID[1] * levels
    return UnifiedProcessor(
        vocabulary=toy_vocabulary(levels),
        layout=make_layout(
            max_text=max_text,
            num_image_tokens=tokens,
            unconditional_text=4,
            condition_attention=attention,
            block_lengths=blocks,
        ),
        tokenizer=CharacterTokenizer(),
        image_grids=(GRID,) * levels,
    )
