"""The page in a browser: four tabs over the tasks, and what gradio must not do."""

import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from multimodal_dlm.app.rendering import CSS, render_empty, render_frame, render_mistake
from multimodal_dlm.app.tasks import (
    MAX_CHARACTERS,
    MAX_PICTURES,
    MAX_STEPS,
    RELEASED,
    SCHEDULERS,
    Controls,
    Frame,
    Studio,
)
from multimodal_dlm.app.uploads import (
    MAX_UPLOAD_BYTES,
    UNREADABLE,
    check_drawn,
    drawn_mask,
    open_upload,
)
from multimodal_dlm.errors import ConfigError, DataError, MultimodalDLMError
from multimodal_dlm.intake import over_white

logger = logging.getLogger(__name__)

EXAMPLES = ("a red apple", "a fluent emoji of a cat face", "a rocket", "two strawberries")
QUESTIONS = ("what is this?", "what colour is the background?", "is it an animal?")
QUEUE_SIZE = 16
BROKEN = Path("unreadable")  # What an upload becomes that not even gradio can open.


def load_gradio() -> Any:
    """Gradio, its statistics and its look-ups of new versions switched off before the import.

    Raises:
        ConfigError: When it is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("GRADIO_TEMP_DIR", tempfile.mkdtemp(prefix="multimodal_dlm_page_"))
    try:
        import gradio
    except ModuleNotFoundError as error:
        raise ConfigError(
            "The page needs gradio, which is not installed. Run `pip install 'multimodal-dlm[ui]'`."
        ) from error
    return gradio


def shown(run: Callable[[], Iterator[Frame]]) -> Iterator[tuple[str, Image.Image | None]]:
    """The steps of a run as HTML, with the first picture at the end; a mistake is a sentence.

    Args:
        run: Starts the run; may raise.
    """
    try:
        for frame in run():
            first = frame.pictures[0] if frame.is_final and frame.pictures else None
            yield render_frame(frame), first
    except MultimodalDLMError as error:
        yield render_mistake(str(error)), None
    except Exception:
        logger.exception("A run of the page failed.")
        yield render_mistake("This did not work, and it is not your mistake."), None


def build_page(studio: Studio, title: str) -> Any:
    """The page as gradio blocks, not yet served.

    Args:
        studio: Runs the tasks.
        title: What the page calls itself, such as the name of the pipeline.
    """
    gr = load_gradio()
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(600, 600)) as page:
        gr.Markdown(
            f"# {title}\nOne model draws pictures from text, reads pictures, and does both at once,"
            " step by step. Gray is what is not written yet."
        )
        last = gr.State(None)
        with gr.Tab("Draw"):
            _draw_tab(gr, studio, last)
        with gr.Tab("Read"):
            _read_tab(gr, studio, last)
        with gr.Tab("Invent"):
            _invent_tab(gr, studio, last)
        with gr.Tab("Inpaint"):
            _inpaint_tab(gr, studio, last)
    return page.queue(max_size=QUEUE_SIZE, default_concurrency_limit=1)


def launch_options(host: str, port: int | None, key: str | None) -> dict[str, Any]:
    """Arguments of gradio's `launch`.

    Raises:
        ConfigError: When other machines could reach the page without a key.
    """
    if host not in ("127.0.0.1", "localhost", "::1") and not key:
        raise ConfigError(
            f"`key` must be given when `host` lets other machines in; got host `{host}` and no key."
            " Add --key WORD, or leave `host` out."
        )
    gr = load_gradio()
    # Fonts of this machine only: nothing on the page comes from elsewhere.
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    return {
        "server_name": host,
        "server_port": port,
        "auth": ("demo", key) if key else None,
        "auth_message": "Name: demo" if key else None,
        "share": False,
        "show_error": False,
        "quiet": True,
        "allowed_paths": [],
        "max_file_size": MAX_UPLOAD_BYTES,
        "strict_cors": True,
        "enable_monitoring": False,
        "ssr_mode": False,
        "mcp_server": False,
        "pwa": False,
        "footer_links": [],
        "theme": theme,
        "css": CSS,
    }


def _draw_tab(gr: Any, studio: Studio, last: Any) -> None:
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            prompt = _line(gr, "Prompt", EXAMPLES[0], "draw-prompt")
            button = gr.Button("Draw", variant="primary", elem_id="draw-button")
            gr.Examples([[text] for text in EXAMPLES], prompt, label="Examples")
            negative = _line(gr, "Move away from (may be empty)", "", "draw-negative")
            controls = _controls(gr, steps=16, guidance=2.0, count=1)
        with gr.Column(scale=3, min_width=320):
            result = gr.HTML(render_empty("The picture appears here."), elem_id="draw-result")

    def draw(text: str, negative: str, *values: Any) -> Iterator[Any]:
        yield from shown(lambda: studio.draw(text, Controls(*values), negative))

    _on(gr, (button.click, prompt.submit), draw, [prompt, negative, *controls], result, last)


def _read_tab(gr: Any, studio: Studio, last: Any) -> None:
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            image = _upload(gr, "read-image")
            take = gr.Button("Take the last drawn picture", size="sm", elem_id="read-last")
            question = _line(gr, "Question (empty for a caption)", "", "read-question")
            button = gr.Button("Read", variant="primary", elem_id="read-button")
            gr.Examples([[text] for text in QUESTIONS], question, label="Examples")
            controls = _controls(gr, steps=0, guidance=1.0, count=None)
        with gr.Column(scale=3, min_width=320):
            result = gr.HTML(render_empty("The text appears here."), elem_id="read-result")

    def read(path: Any, question: str, *values: Any) -> Iterator[Any]:
        yield from shown(lambda: studio.read(open_upload(path), question, Controls(*values)))

    _on(gr, (button.click, question.submit), read, [image, question, *controls], result, None)
    take.click(lambda picture: picture, last, image, **_private())


def _invent_tab(gr: Any, studio: Studio, last: Any) -> None:
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            gr.Markdown("A picture and its caption, both from nothing: the caption first.")
            button = gr.Button("Invent", variant="primary", elem_id="invent-button")
            controls = _controls(gr, steps=32, guidance=1.0, count=2)
        with gr.Column(scale=3, min_width=320):
            result = gr.HTML(render_empty("The pairs appear here."), elem_id="invent-result")

    def invent(*values: Any) -> Iterator[Any]:
        yield from shown(lambda: studio.invent(Controls(*values)))

    _on(gr, (button.click,), invent, controls, result, last)


def _inpaint_tab(gr: Any, studio: Studio, last: Any) -> None:
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            gr.Markdown("Paint over the part to draw anew.")
            editor = _editor(gr)
            take = gr.Button("Take the last drawn picture", size="sm", elem_id="inpaint-last")
            prompt = _line(gr, "What the whole picture shows", EXAMPLES[0], "inpaint-prompt")
            button = gr.Button("Inpaint", variant="primary", elem_id="inpaint-button")
            controls = _controls(gr, steps=16, guidance=2.0, count=2)
        with gr.Column(scale=3, min_width=320):
            result = gr.HTML(render_empty("The results appear here."), elem_id="inpaint-result")

    def inpaint(drawing: Any, prompt: str, *values: Any) -> Iterator[Any]:
        def run() -> Iterator[Frame]:
            image, mask = _painted(drawing)
            return studio.inpaint(image, mask, prompt, Controls(*values))

        yield from shown(run)

    _on(gr, (button.click, prompt.submit), inpaint, [editor, prompt, *controls], result, last)
    take.click(_as_drawing, last, editor, **_private())


def _as_drawing(picture: Image.Image | None) -> Any:
    """A picture large enough to paint on."""
    if picture is None:
        return None
    return picture.resize((512, 512), Image.Resampling.NEAREST)


def _painted(drawing: Any) -> tuple[Image.Image, Image.Image]:
    """Picture and mask of an editor's value; transparency is laid over white."""
    if isinstance(drawing, DataError):
        raise drawing
    if drawing == BROKEN:
        raise DataError(UNREADABLE)
    if not drawing or drawing["background"] is None:
        raise DataError("There is no picture yet. Choose one, or take the last drawn picture.")
    mask = drawn_mask(drawing["layers"])
    return over_white(drawing["background"]).resize(mask.size), mask


def _private() -> dict[str, Any]:
    """Of every event: one model, one run at a time, no programming interface."""
    return {
        "api_visibility": "private",
        "concurrency_id": "model",
        "concurrency_limit": 1,
        "show_progress": "hidden",
    }


def _on(
    gr: Any, triggers: Any, function: Callable[..., Any], inputs: list[Any], result: Any, last: Any
) -> None:
    """Run a function at each of the triggers, and show its steps."""

    def without_picture(*values: Any) -> Iterator[str]:
        for html, _ in function(*values):
            yield html

    def with_picture(*values: Any) -> Iterator[Any]:
        for html, picture in function(*values):
            yield html, gr.skip() if picture is None else picture

    if last is None:
        gr.on(triggers, without_picture, inputs, result, **_private())
    else:
        gr.on(triggers, with_picture, inputs, [result, last], **_private())


def _line(gr: Any, label: str, value: str, name: str) -> Any:
    return gr.Textbox(
        value, label=label, lines=1, max_lines=1, max_length=MAX_CHARACTERS, elem_id=name
    )


def _controls(gr: Any, *, steps: int, guidance: float, count: int | None) -> list[Any]:
    """Sliders and the scheduler, in the order of `Controls`."""
    with gr.Accordion("Settings", open=False):
        found = [
            gr.Slider(
                0, MAX_STEPS, steps, step=1, label="Steps", info="0 takes the task's own number"
            ),
            gr.Slider(0, 10, guidance, step=0.5, label="Guidance", info="1 is off"),
            gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**31 - 1),
            gr.Dropdown(list(SCHEDULERS), value=RELEASED, label="Scheduler"),
        ]
        if count is not None:
            found.append(gr.Slider(1, MAX_PICTURES, count, step=1, label="Pictures"))
    return found


def _upload(gr: Any, name: str) -> Any:
    image = gr.Image(
        label="Picture", type="filepath", image_mode=None, sources=["upload", "clipboard"],
        format="png", height=260, buttons=[], elem_id=name,
    )  # fmt: skip
    return _forgiving(image)


def _editor(gr: Any) -> Any:
    brush = gr.Brush(default_size=60, colors=["#d9480f"], default_color="#d9480f",
                     color_mode="fixed")  # fmt: skip
    editor = gr.ImageEditor(
        label="Paint", type="pil", image_mode="RGBA",
        sources=["upload", "clipboard"], transforms=[], layers=False, brush=brush, format="png",
        canvas_size=(512, 512), height=380, buttons=[], elem_id="inpaint-editor",
    )  # fmt: skip
    read = editor.convert_and_format_image

    def read_checked(drawn: Any, *args: Any, **kwargs: Any) -> Any:
        if drawn is not None:
            check_drawn(getattr(drawn, "path", drawn))
        return read(drawn, *args, **kwargs)

    editor.convert_and_format_image = read_checked
    return _forgiving(editor)


def _forgiving(component: Any) -> Any:
    """Hand on what is wrong with a file, or that gradio cannot open it; the run then says so."""
    read = component.preprocess

    def preprocess(payload: Any) -> Any:
        try:
            return read(payload)
        except DataError as error:
            return error
        except Exception:  # noqa: BLE001 - any decoder's complaint about a hostile file
            return BROKEN

    component.preprocess = preprocess
    return component
