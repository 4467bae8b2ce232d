"""What is decided at which noise level: probes of hidden states, and one-step reconstructions."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from multimodal_dlm.canvas import Canvas, noise_levels
from multimodal_dlm.diffusion.masking import exact_count_mask
from multimodal_dlm.evaluation.encoding import encode_images
from multimodal_dlm.evaluation.held_out import HeldOut
from multimodal_dlm.evaluation.measurement import (
    Curve,
    Measurement,
    Metric,
    mean_metric,
    register_measure,
)
from multimodal_dlm.evaluation.probes import encode_labels, probe
from multimodal_dlm.evaluation.text_metrics import name_of_sample
from multimodal_dlm.models.attention_plan import AttentionPlan
from multimodal_dlm.pipelines import UnifiedTextToImagePipeline
from multimodal_dlm.processing import Codes, UnifiedProcessor

TEXT_LENGTH = 8


@register_measure(
    "noise_spectrum",
    "UnifiedTextToImagePipeline",
    only_diffusion="a causal model has no noise level",
)
@torch.no_grad()
def measure_noise_spectrum(
    pipeline: UnifiedTextToImagePipeline,
    data: HeldOut,
    *,
    attributes: Sequence[str] = ("group", "style", "background"),
    num_levels: int = 9,
) -> Measurement:
    """Sweep the noise level of the picture; the caption is all masks.

    At each level, for each attribute of the record's meta: accuracy and nats of a linear probe on
    the mean hidden state of the picture (the noisy target), and of the caption's masks (what a
    caption would be written from, the picture being its noisy condition). `reconstructed` fills all
    masks with their most likely codes at once and reads the result, as a clean picture, with the
    probe of clean pictures; `codes_right` is the share of the masked codes that come back exactly
    (`chance`: any code of its codebook, each as likely). Folds and resamples go by name: pictures
    of one name (`name_of_sample`) stay together. Baseline `majority` is the most frequent label.
    Metrics are named `WHAT.ATTRIBUTE.LEVEL`.

    Args:
        pipeline: Any text-to-image pipeline.
        data: Pictures whose records have the attributes in their meta.
        attributes: Entries of the meta.
        num_levels: Levels from 0 to 1, at least 2.

    Raises:
        DataError: When an attribute has fewer than two frequent values, or the pictures fewer than
            four names.
    """
    samples = data.samples()
    shown = [name_of_sample(sample) for sample in samples]
    places = {name: place for place, name in enumerate(sorted(set(shown)))}
    units = [places[name] for name in shown]
    codes = encode_images(pipeline, [sample.image for sample in samples], data.batch_size)
    labels = {
        name: encode_labels([str(sample.record.meta.get(name)) for sample in samples])
        for name in attributes
    }
    levels = [round(place / (num_levels - 1), 4) for place in range(num_levels)]
    states = [_sweep(pipeline, codes, level, data) for level in levels]
    metrics: dict[str, Metric] = {}
    lines: dict[str, dict[str, list[float]]] = {"accuracy": {}, "nats": {}, "reconstructed": {}}
    for name, (rows, classes) in labels.items():
        majority = float(torch.bincount(classes).max()) / len(rows)
        groups = [units[row] for row in rows]
        for level, state in zip(levels, states, strict=True):
            for where, vectors in (("picture", state.picture), ("caption", state.caption)):
                found = probe(vectors[rows], classes, seed=data.seed, groups=groups)
                accuracy = mean_metric(
                    found.right, groups=groups, baselines={"majority": majority}, seed=data.seed
                )
                metrics[f"{where}.{name}.{level:g}"] = accuracy
                label = f"{name}, {where}"
                lines["accuracy"].setdefault(label, []).append(accuracy.value)
                lines["nats"].setdefault(label, []).append(found.information)
            # Probes of clean pictures read what one step makes of the noisy ones.
            read = probe(
                states[0].picture[rows],
                classes,
                seed=data.seed,
                other=state.filled[rows],
                groups=groups,
            )
            hits = [a == b for a, b in zip(read.predicted or [], classes.tolist(), strict=True)]
            again = mean_metric(
                hits, groups=groups, baselines={"majority": majority}, seed=data.seed
            )
            metrics[f"reconstructed.{name}.{level:g}"] = again
            lines["reconstructed"].setdefault(name, []).append(again.value)
    sizes = pipeline.image_tokenizer.codebook_sizes  # Grids of all levels are of one size.
    chance = {"chance": sum(1 / size for size in sizes) / len(sizes)}
    right = [
        mean_metric(state.codes_right, groups=units, baselines=chance, seed=data.seed)
        for state in states
    ]
    for level, metric in list(zip(levels, right, strict=True))[1:]:
        metrics[f"codes_right.{level:g}"] = metric
    lines["reconstructed"]["codes right"] = [metric.value for metric in right]
    titles = {
        "accuracy": ("Read from hidden states by a linear probe", "accuracy"),
        "nats": ("Information that a linear probe reads", "nats, H(y) - CE(y | state)"),
        "reconstructed": ("Right after one step that fills all masks", "accuracy"),
    }
    curves = {
        titles[key][0]: Curve("noise level of the picture", titles[key][1], levels, lines[key])
        for key in titles
    }
    return Measurement(metrics, curves=curves)


class _States:
    """Hidden states and reconstructions of all pictures at one noise level.

    Args:
        picture: Mean state of the picture's positions, (pictures, width).
        caption: Mean state of the caption's masks.
        filled: Mean state of the picture after one step, fed in again as clean.
        codes_right: Share of masked codes found again, of each picture; 1 where none is masked.
    """

    def __init__(self) -> None:
        self.picture = self.caption = self.filled = torch.empty(0)
        self.codes_right: list[float] = []


def _sweep(
    pipeline: UnifiedTextToImagePipeline, codes: Codes, level: float, data: HeldOut
) -> _States:
    """States of every picture with the share `level` of its codes masked."""
    processor, states = pipeline.processor, _States()
    parts: dict[str, list[Tensor]] = {"picture": [], "caption": [], "filled": []}
    for part in data.batches(len(codes[0])):
        batch = tuple(grid[part] for grid in codes)
        clean = _with_codes(processor, batch).to(pipeline.device)
        is_image = torch.isin(
            clean.window_ids, torch.tensor(processor.image_windows, device=clean.device)
        )
        counts = (level * is_image.sum(dim=1)).round().long()
        rows = [
            exact_count_mask(
                is_image[row : row + 1].cpu(),
                counts[row : row + 1].cpu(),
                generator=generator,
            )
            for row, generator in enumerate(data.generators(part))
        ]
        masked = torch.cat(rows).to(clean.device)
        mask_id = processor.vocabulary.mask_token_id("image")
        noisy = clean.replace(input_ids=clean.input_ids.masked_fill(masked, mask_id))
        hidden = _forward(pipeline, noisy)
        is_text = clean.window_ids == processor.answer_window
        parts["picture"].append(_mean(hidden, is_image))
        parts["caption"].append(_mean(hidden, is_text))
        filled = _fill(pipeline, noisy, hidden, masked)
        hits = ((filled.input_ids == clean.input_ids) & masked).sum(dim=1)
        totals = masked.sum(dim=1)
        states.codes_right += torch.where(totals > 0, hits / totals.clamp(min=1), 1.0).tolist()
        parts["filled"].append(_mean(_forward(pipeline, filled), is_image))
    for name, tensors in parts.items():
        setattr(states, name, torch.cat(tensors).float().cpu())
    return states


def _with_codes(processor: UnifiedProcessor, codes: Codes) -> Canvas:
    """A joint canvas whose pictures are known and whose captions are masks."""
    length = min(TEXT_LENGTH, processor.layout["max_window"]["text"])
    clean = processor.image_to_text(codes, gen_length=length)
    return clean.replace(order=torch.zeros_like(clean.order))


def _forward(
    pipeline: UnifiedTextToImagePipeline, canvas: Canvas
) -> Float[Tensor, "batch length width"]:
    output = pipeline.transformer(
        canvas.input_ids,
        noise_levels=noise_levels(canvas, pipeline.transformer.vocabulary),
        modality_ids=canvas.modality_ids,
        position_ids=canvas.position_ids,
        attention_plan=AttentionPlan.from_canvas(canvas),
    )
    return output.hidden_states


def _fill(
    pipeline: UnifiedTextToImagePipeline,
    noisy: Canvas,
    hidden: Float[Tensor, "batch length width"],
    masked: Bool[Tensor, "batch length"],
) -> Canvas:
    """Every masked code replaced by the most likely one of its level."""
    processor, vocabulary = pipeline.processor, pipeline.transformer.vocabulary
    ids = noisy.input_ids.clone()
    for level, window in enumerate(processor.image_windows):
        chosen = masked & (noisy.window_ids == window)
        if bool(chosen.any()):
            segment = vocabulary.segment(f"image.{level}")
            start = segment.offset - vocabulary.columns("image").start
            logits = pipeline.transformer.compute_logits(hidden[chosen], "image")
            ids[chosen] = logits[:, start : start + segment.size].argmax(dim=1) + segment.offset
    return noisy.replace(input_ids=ids)


def _mean(
    hidden: Float[Tensor, "batch length width"], chosen: Bool[Tensor, "batch length"]
) -> Float[Tensor, "batch width"]:
    weight = chosen[..., None].to(hidden.dtype)
    return (hidden * weight).sum(dim=1) / weight.sum(dim=1)
