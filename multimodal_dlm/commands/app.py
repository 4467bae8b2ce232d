"""The command that serves the demo page."""

from typing import TYPE_CHECKING

from multimodal_dlm.commands.loading import RELEASED_PIPELINE, load, require_folder
from multimodal_dlm.commands.reporting import Report, say

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


def add_options(parser: "ArgumentParser", name: str) -> None:
    """Add the options of the command."""
    parser.add_function_arguments(run_app, as_group=False)


def run_app(
    *,
    pipeline: str = RELEASED_PIPELINE,
    host: str = "127.0.0.1",
    port: int | None = None,
    key: str | None = None,
    device: str = "auto",
    open_browser: bool = True,
) -> Report:
    """Serve a page that draws, reads, invents and inpaints, step by step; Ctrl-C ends it.

    Args:
        pipeline: folder of a saved pipeline, or `owner/name` on the Hub
        host: address to listen at; the default lets only this machine in, another one needs a key
        port: port to listen at; null takes the first free one from 7860
        key: password of the page, for the name `demo`; null asks for none
        device: auto, cpu, cuda, cuda:1
        open_browser: open the page in the browser
    """
    require_folder(pipeline)
    from multimodal_dlm.app.page import build_page, launch_options
    from multimodal_dlm.app.tasks import Studio

    options = launch_options(host, port, key)
    studio = Studio(load("UnifiedTextToImagePipeline", pipeline, device))
    studio.warm_up()
    page = build_page(studio, pipeline.rstrip("/").rpartition("/")[2])
    _, address, _ = page.launch(**options, inbrowser=open_browser, prevent_thread_lock=True)
    say(f"the page is at {address}; Ctrl-C ends it")
    try:
        page.block_thread()
    finally:
        page.close(verbose=False)
    return Report({"address": address}, f"{address} closed")
