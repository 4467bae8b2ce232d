"""The folders in `tokenizers/`, on the committed real pictures and texts."""

from pathlib import Path

import pytest
import torch

from multimodal_dlm.datasets import ShardReader, open_manifest
from multimodal_dlm.tokenizers.image import ImageTokenizer, pixels_from_images
from multimodal_dlm.tokenizers.quantizers import codebook_perplexity, codebook_usage
from multimodal_dlm.tokenizers.text import load_text_tokenizer, text_fingerprint

ROOT = Path(__file__).parents[2]
PLAIN = {"add_special_tokens": False, "split_special_tokens": True}
MAX_TEXT_TOKENS = 32


@pytest.fixture(scope="module")
def image_tokenizer():
    folder = ROOT / "tokenizers" / "image"
    return ImageTokenizer.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def readers():
    sources = open_manifest(ROOT / "datasets" / "sample.yaml").sources
    return {name: ShardReader(source.splits["test"]) for name, source in sources.items()}


@pytest.fixture(scope="module")
def pictures(readers):
    reader = readers["emoji"]
    return pixels_from_images([reader[i].image for i in range(len(reader))])


def test_the_image_tokenizer_is_the_one_it_says(image_tokenizer):
    assert image_tokenizer.config["fingerprint"] == image_tokenizer.compute_fingerprint()
    assert image_tokenizer.codebook_sizes == (2560,)
    assert image_tokenizer.grid_size == (8, 8)
    assert sum(p.numel() for p in image_tokenizer.parameters()) < 6e6


def test_pictures_of_test_concepts_come_back_above_22_db(image_tokenizer, pictures):
    codes = image_tokenizer.encode(pictures)
    error = (image_tokenizer.decode(codes) - pictures).pow(2).mean(dim=(1, 2, 3))
    assert (-10 * error.log10()).mean() > 22
    assert codebook_usage(codes[0], 2560) > 0.2
    assert codebook_perplexity(codes[0], 2560) > 200


def test_released_codes_do_not_depend_on_the_batch(image_tokenizer, pictures):
    together = image_tokenizer.encode(pictures)[0]
    alone = torch.cat([image_tokenizer.encode(picture[None])[0] for picture in pictures[:8]])
    assert torch.equal(together[:8], alone)


def test_the_text_tokenizer_holds_the_sample(readers):
    tokenizer = load_text_tokenizer(ROOT / "tokenizers" / "text")
    assert tokenizer.init_kwargs["fingerprint"] == text_fingerprint(tokenizer)
    assert len(tokenizer) == 2048
    reader = readers["emoji"]
    captions = [caption for i in range(len(reader)) for caption in reader.record(i).captions]
    for caption in captions:
        ids = tokenizer.encode(caption, **PLAIN)
        assert len(ids) < MAX_TEXT_TOKENS
        assert tokenizer.decode(ids).strip() == caption


@pytest.mark.parametrize("kind", ["image", "text"])
def test_released_folders_hold_a_card_and_no_code(kind):
    folder = ROOT / "tokenizers" / kind
    assert (folder / "README.md").read_text().startswith("---\n")
    kinds = {path.suffix for path in folder.iterdir()}
    assert kinds <= {".json", ".md", ".safetensors"}
    assert not [path for path in folder.glob("*.json") if "_name_or_path" in path.read_text()]
