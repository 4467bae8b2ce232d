"""What a model card says of tasks: what the model does, how it is called and how it samples.

Tasks are those the model was trained for where the card knows them, else all; what a left-to-right
model or one of blocks sees of a task comes from the layout, numbers from the pipelines' signatures.
"""

import inspect
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from multimodal_dlm.layout import text_blocks
from multimodal_dlm.pipelines.card_metrics import table
from multimodal_dlm.tasks import TASKS

TAGS = {
    "any-to-any": ("text_to_image", "caption"),
    "text-to-image": ("text_to_image",),
    "image-to-text": ("caption",),
    "visual-question-answering": ("vqa",),
}
_DEEDS = {
    "text_to_image": "draw pictures",
    "caption": "describe pictures",
    "vqa": "answer questions about pictures",
    "text": "write texts",
    "joint": "invent pictures with their captions",
}


class CardTasks:
    """The tasks of one model, in the words of its card.

    Args:
        tasks: Those it was trained for, of `tasks.TASKS`; none when that is not known.
        layout: Its layout.
    """

    def __init__(self, tasks: Collection[str], layout: Mapping[str, Any]) -> None:
        self.tasks = tuple(task for task in TASKS if not tasks or task in tasks)
        self.layout = layout
        self.is_causal = layout["condition_attention"] == "causal"
        self.blocks = () if self.is_causal else text_blocks(layout)
        self.draws = "text_to_image" in self.tasks
        self.writes = [name for name in ("text", "unconditional_text") if name in self.tasks]
        self.reads = [name for name in ("caption", "vqa") if name in self.tasks]

    # Front matter and summary.

    def tags(self) -> list[str]:
        """Tags of the Hub; the first is its `pipeline_tag`."""
        found = [tag for tag, needed in TAGS.items() if set(needed) <= set(self.tasks)]
        if not found:
            found = ["text-generation"] if self.writes else ["unconditional-image-generation"]
        kind = ["autoregressive"] if self.is_causal else ["masked-diffusion", "discrete-diffusion"]
        return [*found, *kind, "multimodal_dlm"]

    def summary(self) -> str:
        """One sentence for a card that has none of its own."""
        if len(self.tasks) == len(TASKS) and not self.is_causal:
            return (
                "One discrete diffusion transformer for text and pictures: the same weights draw"
                " pictures, describe them, answer questions, fill gaps and invent pairs."
            )
        kind = "left-to-right" if self.is_causal else "discrete diffusion"
        deeds = [deed for task, deed in _DEEDS.items() if task in self.tasks]
        return f"One {kind} transformer" + (f" to {_listed(deeds)}." if deeds else ".")

    def knows_pictures(self) -> bool:
        """Whether one of the tasks has a picture."""
        return bool(set(self.tasks) - {"text", "unconditional_text"})

    # Sections.

    def table(self) -> str:
        """The section `Tasks`."""
        rows = []
        if self.draws:
            rows.append(("text-to-image", "`UnifiedTextToImagePipeline`", "caption", "picture"))
        if "caption" in self.tasks:
            rows.append(("captioning", "`UnifiedImageToTextPipeline`", "picture", "caption"))
        if "vqa" in self.tasks:
            known = "picture, question"
            rows.append(("question answering", "`UnifiedImageToTextPipeline`", known, "answer"))
        if self.writes:
            start = "instruction" if "text" in self.tasks else "nothing"
            known = f"{start}, {self._around_gaps()}"
            rows.append(("text, infilling", "`UnifiedTextGenerationPipeline`", known, "text"))
        if "joint" in self.tasks:
            written = "picture and caption"
            rows.append(("joint generation", "`UnifiedJointPipeline`", "nothing", written))
        if self.draws:
            rest = "picture before the holes" if self.is_causal else "rest of picture"
            known = f"caption, {rest}"
            rows.append(("inpainting", "`UnifiedInpaintPipeline`", known, "holes"))
        return table(("task", "pipeline", "known", "written"), rows)

    def usage(self) -> str:
        """The section `Usage`: five lines for each pipeline."""
        parts = []
        for title, name, call in self._calls():
            code = (
                "import torch\nfrom PIL import Image\n"
                f"from multimodal_dlm.pipelines import {name}\n"
                f'pipe = {name}.from_pretrained("<this repository or folder>")\n{call}'
            )
            parts.append(f"{title}:\n\n```python\n{code}\n```")
        if self.draws:
            parts.append(
                "`image` and `mask_image` are PIL images: `Image.open(path)`; white is masked."
            )
        elif self.reads:
            parts.append("`image` is a PIL image: `Image.open(path)`.")
        return "\n\n".join(parts) or "No pipeline is for its tasks alone."

    def sampling(self, scheduler: Mapping[str, Any]) -> str:
        """Steps, lengths and guidance of a call that asks for none.

        Args:
            scheduler: Config of the pipeline's scheduler.
        """
        rules = {
            name: options.get("commit_rule") for name, options in scheduler["modalities"].items()
        }
        sentences = [*self._drawing(rules.get("image")), *self._writing(rules.get("text"))]
        if "joint" in self.tasks:
            from multimodal_dlm.pipelines.joint import STAGGERED, UnifiedJointPipeline

            steps = f"{_default(UnifiedJointPipeline, 'num_inference_steps')} steps"
            first = "caption" if STAGGERED["text"] > STAGGERED["image"] else "picture"
            if self.is_causal:  # In the order of the windows.
                steps, first = "one step per token", "picture"
            sentences.append(f"Joint: {steps}, the {first} first.")
        return " ".join(sentences)

    # Parts.

    def _around_gaps(self) -> str:
        if self.is_causal:
            return "text before the gaps"
        return "text up to the end of a gap's block" if self.blocks else "gaps"

    def _calls(self) -> list[tuple[str, str, str]]:
        """Title, pipeline and call of each usage."""
        calls = []
        if self.draws:
            call = 'pipe("a red apple", generator=torch.Generator().manual_seed(0)).images[0]'
            calls.append(("Text to image", "UnifiedTextToImagePipeline", f'{call}.save("out.png")'))
        if self.reads:
            asked = {"caption": "pipe(image)", "vqa": 'pipe(image, "what is this?")'}
            texts = ", ".join(f"{asked[task]}.texts[0]" for task in self.reads)
            calls.append(("Image to text", "UnifiedImageToTextPipeline", f"print({texts})"))
        if self.writes:
            given = 'template="a red [MASK] on a white background"'
            if self.is_causal or "unconditional_text" not in self.tasks:
                given = '"an instruction"' if "text" in self.tasks else ""
            call = f"print(pipe({given}).texts[0])"
            calls.append(("Text", "UnifiedTextGenerationPipeline", call))
        if "joint" in self.tasks:
            call = "output = pipe(num_samples=4); print(output.texts, output.images)"
            calls.append(("Joint", "UnifiedJointPipeline", call))
        if self.draws:
            call = 'pipe("a red apple", image, mask_image).images[0].save("inpainted.png")'
            calls.append(("Inpainting", "UnifiedInpaintPipeline", call))
        return calls

    def _drawing(self, commit_rule: str | None) -> list[str]:
        """Sentences on pictures, those that say the same in one."""
        if not self.draws:
            return []
        from multimodal_dlm.pipelines.inpaint import UnifiedInpaintPipeline
        from multimodal_dlm.pipelines.text_to_image import UnifiedTextToImagePipeline

        said: dict[str, list[str]] = {}
        for name, pipeline in (
            ("text-to-image", UnifiedTextToImagePipeline),
            ("inpainting", UnifiedInpaintPipeline),
        ):
            steps = f"{_default(pipeline, 'num_inference_steps')} steps"
            if self.is_causal:
                steps = f"one step per token ({self.layout['max_window']['image']} a picture)"
            elif commit_rule:
                steps = f"at most {steps}"
            guidance = _guidance(_default(pipeline, "guidance_scale"))
            said.setdefault(f"{steps}, {guidance}", []).append(name)
        return [f"{_capital(' and '.join(names))}: {text}." for text, names in said.items()]

    def _writing(self, commit_rule: str | None) -> list[str]:
        """The sentence on texts; texts alone are named where captions do not say the same."""
        from multimodal_dlm.pipelines import image_to_text, text_generation

        usual = {
            "caption": ("captions", image_to_text.CAPTION_LENGTH),
            "vqa": ("answers", image_to_text.ANSWER_LENGTH),
        }
        kinds = [usual[task] for task in self.reads]
        pipelines: list[type] = [image_to_text.UnifiedImageToTextPipeline] if kinds else []
        length = text_generation.TEXT_LENGTH
        if self.writes and (usual["caption"] not in kinds or length != usual["caption"][1]):
            kinds.append(("texts", length))
            pipelines.append(text_generation.UnifiedTextGenerationPipeline)
        if not kinds:
            return []
        longest = self.layout["max_window"]["text"]
        (first, positions), *others = [(name, min(size, longest)) for name, size in kinds]
        parts = [f"{_capital(first)}: {positions} positions"]
        parts += [f"{name}: {size}" for name, size in others]
        if self.blocks:
            also = f" (trained with {_listed(self.blocks[1:])} too)" if self.blocks[1:] else ""
            parts.append(f"in blocks of {self.blocks[0]}{also}")
        is_bound = bool(commit_rule or self.blocks) and not self.is_causal
        parts.append(f"{'at most ' if is_bound else ''}one step per position")
        if self.is_causal:
            parts.append("left to right")
        scales = dict.fromkeys(_default(pipeline, "guidance_scale") for pipeline in pipelines)
        parts += [_guidance(scale) for scale in scales]
        return [", ".join(parts) + "."]


def _default(pipeline: Any, name: str) -> Any:
    """Default of an argument of a pipeline's call."""
    return inspect.signature(pipeline.__call__).parameters[name].default


def _guidance(scale: float) -> str:
    return "guidance off" if scale == 1.0 else f"guidance {scale}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _listed(parts: Sequence[Any]) -> str:
    """`a, b and c`."""
    words = [str(part) for part in parts]
    return ", ".join(words[:-1]) + (" and " if words[1:] else "") + words[-1]
