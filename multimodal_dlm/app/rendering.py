"""Frames as HTML: pictures enlarged without smoothing, steps as a film, masks as boxes."""

import base64
import io
import re
from html import escape

from PIL import Image

from multimodal_dlm.app.tasks import Frame
from multimodal_dlm.pipelines.image_metadata import recipe_chunk
from multimodal_dlm.processing import MASK_MARKER

CSS = """
.result { min-height: 320px; }
.result .pictures { display: flex; flex-wrap: wrap; gap: 14px; }
.result figure { margin: 0; width: min(100%, 256px); }
.result figure img { width: 100%; aspect-ratio: 1; image-rendering: pixelated; display: block;
  border: 1px solid var(--border-color-primary); border-radius: 6px; background: #fff; }
.result figcaption { font-size: 0.95em; margin-top: 4px; overflow-wrap: anywhere; }
.result .text { font-size: 1.35em; line-height: 1.5; margin: 6px 0 12px; overflow-wrap: anywhere; }
.result .masked { display: inline-block; width: 0.8em; height: 0.85em; margin: 0 1px;
  border-radius: 2px; background: #c9ccd3; vertical-align: -0.08em; }
.result .state { opacity: 0.75; font-size: 0.9em; margin: 10px 0 6px;
  font-variant-numeric: tabular-nums; }
.result .bar { height: 4px; border-radius: 2px; background: var(--border-color-primary); }
.result .bar div { height: 100%; border-radius: 2px; background: var(--color-accent); }
.result .film { display: flex; flex-wrap: wrap; gap: 5px; margin-top: 12px; }
.result .film img { width: 56px; height: 56px; image-rendering: pixelated; border-radius: 3px;
  border: 1px solid var(--border-color-primary); }
.result .empty { opacity: 0.7; padding: 18px 2px; }
.result .mistake { border-left: 4px solid #d9480f; padding: 8px 12px; border-radius: 3px;
  background: color-mix(in srgb, #d9480f 9%, transparent); }
#read-image img { width: 100%; height: 100%; object-fit: contain; image-rendering: pixelated; }
footer { display: none !important; }
"""


def render_frame(frame: Frame) -> str:
    """A step or the result, as it stands on the page."""
    parts = []
    if frame.pictures:
        labels = frame.texts if frame.texts else ("",) * len(frame.pictures)
        figures = [
            _figure(picture, label, frame.is_final)
            for picture, label in zip(frame.pictures, labels, strict=True)
        ]
        parts.append(f'<div class="pictures">{"".join(figures)}</div>')
    else:
        parts += [f'<div class="text">{_masked(text)}</div>' for text in frame.texts]
    parts.append(_state(frame))
    if frame.film:
        images = "".join(
            f'<img src="{_data_url(picture)}" alt="step {number}" title="step {number}">'
            for number, picture in enumerate(frame.film, start=1)
        )
        parts.append(f'<div class="film">{images}</div>')
    kind = "final" if frame.is_final else "draft"
    return f'<div class="result {kind}">{"".join(parts)}</div>'


def render_mistake(message: str) -> str:
    """What went wrong, in one sentence."""
    return f'<div class="result"><div class="mistake" role="alert">{escape(message)}</div></div>'


def render_empty(text: str) -> str:
    """The place of a result before there is one."""
    return f'<div class="result"><div class="empty">{escape(text)}</div></div>'


def _figure(picture: Image.Image, label: str, is_final: bool) -> str:
    caption = f"<figcaption>{_masked(label)}</figcaption>" if label else ""
    alt = re.sub(r"\s+", " ", label).strip() or "picture"
    image = f'<img src="{_data_url(picture, keep=is_final)}" alt="{escape(alt)}">'
    return f"<figure>{image}{caption}</figure>"


def _state(frame: Frame) -> str:
    if frame.is_final:
        passes = f", {frame.num_forwards} forward passes" if frame.num_forwards else ""
        return f'<div class="state">{frame.step} steps{passes}, {frame.seconds:.1f} s</div>'
    width = 100 * frame.step / max(frame.num_steps, 1)
    return (
        f'<div class="state">step {frame.step} of {frame.num_steps}, {frame.seconds:.1f} s</div>'
        f'<div class="bar"><div style="width: {width:.0f}%"></div></div>'
    )


def _masked(text: str) -> str:
    """A text as HTML, each masked token a gray box."""
    return escape(text).replace(escape(MASK_MARKER), '<span class="masked"></span>')


def _data_url(picture: Image.Image, *, keep: bool = False) -> str:
    """The picture in the page itself; a result keeps its recipe when it is saved from there."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", pnginfo=recipe_chunk(picture) if keep else None)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
