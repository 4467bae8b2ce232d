"""The sampling loop that research code for masked text-to-image models usually has, plainly.

What the pipeline is compared with: the same weights, tokenizers, prompts, guidance, cosine schedule
and temperatures (Chang et al. 2022, MaskGIT, arXiv 2202.04200, section 3.2). Each step runs the
whole row once with and once without the condition, one after the other, keeps nothing from the step
before, and computes the logits of every position over the whole vocabulary before it looks at those
of the picture. Rows are as short as their prompts allow; such code often pads them to the longest.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from multimodal_dlm.canvas import Canvas, noise_levels
from multimodal_dlm.models.attention_plan import AttentionPlan
from multimodal_dlm.models.fused import plain_functions
from multimodal_dlm.pipelines.pixels import from_pixels


class Pictures(NamedTuple):
    """What a call gives back, as pipelines name it."""

    images: Any


class ResearchLoop:
    """Draws pictures with a copy of a pipeline's weights.

    Args:
        pipeline: Whose transformer is copied; tokenizers and canvases are its own.
        dtype: Of the copies.
        num_steps: Steps.
        guidance_scale: g in u + g (c - u); 1.0 leaves the second forward out.
        temperature: Of the draws; 0 takes the likeliest token. None for that of the pipeline.
        choice_temperature: Of the noise on the confidence, shrinking to 0 with the steps. None for
            that of the pipeline.
    """

    def __init__(
        self,
        pipeline: Any,
        *,
        dtype: torch.dtype = torch.float32,
        num_steps: int = 16,
        guidance_scale: float,
        temperature: float | None = None,
        choice_temperature: float | None = None,
    ) -> None:
        options = pipeline.scheduler.config["modalities"]["image"]
        self.processor = pipeline.processor
        self.transformer = copy.deepcopy(pipeline.transformer).to(dtype).eval()
        self.image_tokenizer = copy.deepcopy(pipeline.image_tokenizer).to(dtype).eval()
        self.num_steps = num_steps
        self.guidance_scale = guidance_scale
        self.temperature = options["temperature"] if temperature is None else temperature
        self.choice_temperature = (
            options["choice_temperature"] if choice_temperature is None else choice_temperature
        )

    @torch.no_grad()
    def __call__(
        self,
        prompts: Sequence[str],
        *,
        generator: torch.Generator | Sequence[torch.Generator],
        output_type: str = "pil",
    ) -> Pictures:
        """One picture a prompt; of several generators the first draws for all rows."""
        if not isinstance(generator, torch.Generator):
            generator = generator[0]
        with plain_functions():  # Other code does not have our kernels.
            codes = self.draw(prompts, generator)
        if output_type == "codes":
            return Pictures((codes,))
        return Pictures(from_pixels(self.image_tokenizer.decode((codes,)), output_type))

    def draw(self, prompts: Sequence[str], generator: torch.Generator) -> Tensor:
        """Codes (batch, height, width)."""
        vocabulary = self.processor.vocabulary
        conditional = self.processor.text_to_image(prompts)
        unconditional = self.processor.unconditional(conditional)
        window = conditional.window_slice(self.processor.image_windows[0])
        first = vocabulary.columns("image").start
        mask = vocabulary.mask_token_id("image")
        image_ids = conditional.input_ids[:, window]
        plans = [AttentionPlan.from_canvas(canvas) for canvas in (conditional, unconditional)]
        for step in range(self.num_steps):
            logits = self.logits(conditional, plans[0], image_ids)[:, window]
            if self.guidance_scale != 1.0:
                other = self.logits(unconditional, plans[1], image_ids)[:, window]
                logits = other + self.guidance_scale * (logits - other)
            logits = logits[..., first : first + vocabulary.num_columns("image")]
            image_ids = self.commit(logits, image_ids, step, first, mask, generator)
        return (image_ids - first).view(len(prompts), *self.processor.image_grids[0])

    def logits(self, canvas: Canvas, plan: AttentionPlan, image_ids: Tensor) -> Tensor:
        """Logits of every position over the whole vocabulary, float32."""
        ids = canvas.input_ids.clone()
        ids[:, canvas.window_slice(self.processor.image_windows[0])] = image_ids
        canvas = canvas.replace(input_ids=ids)
        with plain_functions():
            states = self.transformer(
                ids,
                noise_levels=noise_levels(canvas, self.processor.vocabulary),
                position_ids=canvas.position_ids,
                attention_plan=plan,
            ).hidden_states
        return F.linear(states, self.transformer.embed_tokens.weight).float()

    def commit(
        self,
        logits: Tensor,
        image_ids: Tensor,
        step: int,
        first: int,
        mask: int,
        generator: torch.Generator,
    ) -> Tensor:
        """Draw a token everywhere, keep the surest, mask the others again."""
        is_masked = image_ids == mask
        if self.temperature == 0.0:
            drawn = logits.argmax(dim=-1)
        else:
            shares = (logits / self.temperature).softmax(dim=-1)
            drawn = torch.multinomial(shares.flatten(0, 1), 1, generator=generator)
            drawn = drawn.view(image_ids.shape)
        confidence = logits.log_softmax(dim=-1).gather(-1, drawn[..., None]).squeeze(-1)
        uniform = torch.rand(image_ids.shape, generator=generator).clamp(min=1e-20)
        share_left = 1.0 - (step + 1) / self.num_steps
        noise = -torch.log(-torch.log(uniform))
        confidence = confidence + self.choice_temperature * share_left * noise
        confidence = confidence.masked_fill(~is_masked, math.inf)
        num_left = math.floor(
            image_ids.shape[1] * math.cos(math.pi / 2 * (step + 1) / self.num_steps) + 1e-9
        )
        num_left = min(num_left, int(is_masked.sum(dim=1).min()) - 1)
        filled = torch.where(is_masked, drawn + first, image_ids)
        surest = confidence.argsort(dim=-1, descending=True, stable=True)
        left = surest[:, image_ids.shape[1] - max(num_left, 0) :]
        return filled.scatter(1, left, mask)
