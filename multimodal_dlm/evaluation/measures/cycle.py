"""Text to picture to text: does the name survive being drawn and read again?"""

from typing import Any

from multimodal_dlm.evaluation.held_out import HeldOut
from multimodal_dlm.evaluation.measurement import Measurement, mean_metric, register_measure
from multimodal_dlm.evaluation.measures.captions import meaning_cosines
from multimodal_dlm.evaluation.measures.likelihood import trained_caption
from multimodal_dlm.evaluation.measures.text_to_image import draw_pictures, to_images
from multimodal_dlm.evaluation.sheets import contact_sheet
from multimodal_dlm.evaluation.text_metrics import exact_match, name_of_caption
from multimodal_dlm.models import minilm
from multimodal_dlm.pipelines import UnifiedImageToTextPipeline, UnifiedTextToImagePipeline

NUM_SHOWN = 18


@register_measure(
    "cycle",
    "UnifiedTextToImagePipeline",
    ["text_to_image", "caption"],
    weights={minilm.PACKAGE: None},
)
def measure_cycle(pipeline: UnifiedTextToImagePipeline, data: HeldOut) -> Measurement:
    """MiniLM cosine of a caption's name with that of the model's caption of its own drawing.

    `cosine` and `exact`; beside them `real`, the same for the model's caption of the real picture
    (what reading alone loses), and `other_name`, the name of the next row (what any name gets). The
    reader is the model itself: drawer and reader may share a mistake.

    Args:
        pipeline: Draws, and reads, with its default settings.
        data: Pictures with captions.

    Raises:
        DataError: When the split is empty.
        ConfigError: When MiniLM is not installed.
    """
    samples = data.samples()
    prompts = [trained_caption(data.source, sample.record) for sample in samples]
    drawn = draw_pictures(pipeline, prompts, data)
    read: Any = UnifiedImageToTextPipeline.from_pipe(pipeline)
    read.set_progress_bar_config(disable=True)
    captions = data.texts(read, to_images(drawn))
    truths = [name_of_caption(prompt) for prompt in prompts]
    said = {
        "model": [name_of_caption(text) for text in captions],
        "real": [
            name_of_caption(t) for t in data.texts(read, to_images([s.image for s in samples]))
        ],
        "other_name": [*truths[1:], truths[0]],
    }
    cosines = meaning_cosines(said, truths)
    exact = {
        who: [float(exact_match(name, truth)) for name, truth in zip(names, truths, strict=True)]
        for who, names in said.items()
    }
    metrics = {}
    for name, rows in (("cosine", cosines), ("exact", exact)):
        baselines = {who: values for who, values in rows.items() if who != "model"}
        metrics[name] = mean_metric(rows["model"], baselines=baselines, seed=data.seed)
    labels = [f"{p} -> {c}" for p, c in zip(prompts, captions, strict=True)]
    images = to_images(drawn)[:NUM_SHOWN]
    return Measurement(
        metrics, {"drawn and read": contact_sheet(images, labels[:NUM_SHOWN], columns=6)}
    )
