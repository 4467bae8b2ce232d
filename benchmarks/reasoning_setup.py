"""Prompts of the recipe `reasoning` at any length, and the two pipelines that answer them."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from multimodal_dlm.datasets import iterate_samples, open_manifest
from multimodal_dlm.datasets.recipes.reasoning import TASKS, Item, pack_examples
from multimodal_dlm.layout import make_layout
from multimodal_dlm.models.presets import get_preset
from multimodal_dlm.models.transformer import UnifiedTransformerModel
from multimodal_dlm.pipelines import UnifiedTextGenerationPipeline
from multimodal_dlm.schedulers import ConfidenceScheduler
from multimodal_dlm.tokenizers.image import ImageTokenizer
from multimodal_dlm.tokenizers.text import load_text_tokenizer
from multimodal_dlm.training.components import build_vocabulary

ROOT = Path(__file__).parents[1]
BLOCKS = (16, 8, 32)
NUM_EXAMPLES = 64
Items = dict[str, tuple[list[Item], list[Item]]]
Work = list[tuple[list[str], list[Item]]]


def read_items(data_root: Path | None) -> Items | None:
    """Test items and training examples of each task; None without data."""
    if data_root is None:
        return None
    source = open_manifest(ROOT / "datasets" / "reasoning.yaml", data_root).sources["reasoning"]
    found: dict[str, dict[str, list[Item]]] = {name: defaultdict(list) for name in TASKS}
    for split in ("test", "train"):
        for sample in iterate_samples(source, split):
            task, pair = sample.record.meta["task"], sample.record.qa[0]
            if split == "train" and all(len(f["train"]) >= NUM_EXAMPLES for f in found.values()):
                break
            number = sample.record.meta["number"]
            found[task][split].append(Item(task, number, pair.question, pair.answer))
    return {name: (items["test"], items["train"]) for name, items in found.items()}


def made_up_items() -> Items:
    """Questions of digits that nobody can answer, as long as real ones."""
    rng = np.random.default_rng(0)

    def item(number: int) -> Item:
        words = rng.integers(0, 10, 46).astype(str)
        return Item("made_up", number, " ".join([*words, "="]), " ".join(words))

    return {"made_up": ([item(n) for n in range(64)], [item(n) for n in range(64, 128)])}


def batches(items: Items, context: int, batch: int, count: int) -> Work:
    """Prompts and what they ask, `count` questions of every task, one task a batch, in turn.

    The prompts of a batch have one length, so that no method has to deal with padding. Any number
    of batches from the first on asks equally much of each task, but for one batch.

    Args:
        items: Questions and worked examples of each task.
        context: Tokens of a prompt, `<bos>` and `<eos>` included, a few fewer where examples do not
            fill it.
        batch: Rows of a call.
        count: Questions of every task.
    """
    found = []
    for start in range(0, count, batch):
        for asked, examples in items.values():
            numbers = range(start, start + batch)
            chosen = [asked[n % len(asked)] for n in numbers]
            turned = [examples[n % len(examples) :] + examples for n in numbers]
            prompts = [
                pack_examples(item.question, own, context - 2)[0]
                for item, own in zip(chosen, turned, strict=True)
            ]
            found.append((prompts, chosen))
    return found


def random_pipelines(preset: str) -> tuple[Any, Any]:
    """Backbones as the two configs make them, before the first step."""
    text = load_text_tokenizer(ROOT / "tokenizers" / "reasoning")
    image: Any = ImageTokenizer.from_pretrained(ROOT / "tokenizers" / "image", dtype=torch.float32)
    vocabulary = build_vocabulary(text, image).to_dict()
    options = get_preset(preset)
    heads = options["hidden_size"] // options["num_attention_heads"]
    options |= {"noise_conditioning": "none", "axes_dims_rope": (heads,)}
    made = []
    for extra, shift in (
        ({"block_lengths": BLOCKS}, 0),
        ({"condition_attention": "causal"}, 1),
    ):
        torch.manual_seed(0)
        layout = make_layout(max_text=1024, num_image_tokens=64, **extra)
        model = UnifiedTransformerModel(
            vocabulary=vocabulary, layout=layout, logits_shift=shift, **options
        )
        made.append(
            UnifiedTextGenerationPipeline(
                transformer=model.eval(),
                scheduler=ConfidenceScheduler(),
                tokenizer=text,
                image_tokenizer=image.eval(),
            )
        )
    return made[0], made[1]


def open_pipelines(folders: Sequence[str] | None, preset: str, longest: int) -> tuple[Any, Any]:
    """Block and causal pipeline, their text windows as long as the longest prompt and text."""
    if folders:
        pair = tuple(UnifiedTextGenerationPipeline.from_pretrained(folder) for folder in folders)
    else:
        pair = random_pipelines(preset)
    for pipe in pair:
        pipe.set_progress_bar_config(disable=True)
        pipe.processor.layout["max_window"]["text"] = longest
    return pair[0], pair[1]
