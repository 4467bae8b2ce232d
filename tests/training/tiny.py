"""A tiny vocabulary, processor and backbone for the tests of training."""

import torch

from multimodal_dlm.canvas import Canvas
from multimodal_dlm.models.presets import get_preset
from multimodal_dlm.models.transformer import UnifiedTransformerModel
from multimodal_dlm.processing import TrainingRow
from tests.core.toy import GRID, toy_processor

TEXTS = ("a cat", "dog", "red", "an owl")
TASKS = ("text_to_image", "caption", "vqa", "joint", "unconditional_image", "unconditional_text")


def tiny_model(*, logits_shift: int = 0, seed: int = 0, std: float = 0.3, **options):
    """The tiny preset over the toy vocabulary; `std` makes random weights matter."""
    processor = toy_processor()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = UnifiedTransformerModel(
            vocabulary=processor.vocabulary.to_dict(),
            layout=processor.layout,
            logits_shift=logits_shift,
            **(get_preset("tiny") | options),
        )
        for name, weight in model.named_parameters():
            if weight.dim() > 1 or "scale_shift" in name:
                torch.nn.init.normal_(weight, std=std)
    return model


def rows_of(tasks=TASKS, seed: int = 0) -> list[TrainingRow]:
    """One training row per task, with random codes."""
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for index, task in enumerate(tasks):
        codes = torch.randint(0, 20, GRID, generator=draw).numpy()
        rows.append(
            TrainingRow(
                task=task,
                codes=None if task == "text" else (codes,),
                instruction="what?" if task in ("vqa", "text") else None,
                text=TEXTS[index % len(TEXTS)],
                window_draw=0.5,
            )
        )
    return rows


def canvas_of(tasks=TASKS, seed: int = 0) -> Canvas:
    """The clean training canvas of `rows_of`."""
    return toy_processor().training_canvas(rows_of(tasks, seed))


def generators(seeds) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(int(seed)) for seed in seeds]
