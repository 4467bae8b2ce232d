"""The page in a headless Chromium: `make test-app`. Not collected by the normal suite.

Needs the extras `ui` and `browser`, and Debian's `chromium` and `chromium-driver`. Screenshots of
every tab are left in `out/app`.
"""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from multimodal_dlm.app.page import build_page, launch_options
from multimodal_dlm.app.tasks import Studio
from multimodal_dlm.pipelines import UnifiedTextToImagePipeline
from tests.conftest import REPOSITORY

webdriver = pytest.importorskip("selenium.webdriver", reason="needs the extra `browser`")
from selenium.webdriver import ActionChains  # noqa: E402
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

SHOTS = REPOSITORY / "out" / "app"
FIRST_PICTURE_SECONDS = 3.0  # From the press; on two cores that do nothing else.
PATIENCE = 90


@pytest.fixture(scope="module")
def address(released_pipeline) -> Iterator[str]:
    """The page over the released pipeline, served from this process."""
    studio = Studio(UnifiedTextToImagePipeline.from_pretrained(released_pipeline))
    studio.warm_up()
    page = build_page(studio, "emoji-small")
    _, url, _ = page.launch(**launch_options("127.0.0.1", None, None), prevent_thread_lock=True)
    yield url
    page.close(verbose=False)


@pytest.fixture(scope="module")
def browser(address) -> Iterator[Any]:
    """Chromium on the page."""
    paths = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    if None in paths.values():
        pytest.skip("needs Debian's chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = paths["chromium"]
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    options.add_argument("--window-size=1200,1000")
    found = webdriver.Chrome(options=options, service=Service(paths["chromedriver"]))
    SHOTS.mkdir(parents=True, exist_ok=True)
    found.get(address)
    wait(found, "#draw-button")
    yield found
    found.quit()


def wait(browser: Any, selector: str, seconds: float = PATIENCE) -> Any:
    """The first element that fits, once there is one."""
    found = WebDriverWait(browser, seconds, 0.03).until(
        lambda _: browser.find_elements(By.CSS_SELECTOR, selector)
    )
    return found[0]


def open_tab(browser: Any, name: str) -> None:
    [tab] = [
        each for each in browser.find_elements(By.CSS_SELECTOR, "button[role=tab]")
        if each.text == name
    ]  # fmt: skip
    tab.click()
    button = wait(browser, f"#{name.lower()}-button")
    WebDriverWait(browser, PATIENCE).until(lambda _: button.is_displayed())


def keep(browser: Any, name: str) -> None:
    time.sleep(0.4)  # For the page to settle.
    browser.save_screenshot(str(SHOTS / f"{name}.png"))


def test_a_prompt_becomes_a_picture_step_by_step(browser):
    keep(browser, "page")
    press = time.monotonic()
    browser.find_element(By.ID, "draw-button").click()
    wait(browser, "#draw-result .draft figure img")
    first = time.monotonic() - press
    keep(browser, "draw_draft")
    wait(browser, "#draw-result .final figure img")
    keep(browser, "draw")
    assert len(browser.find_elements(By.CSS_SELECTOR, "#draw-result .film img")) == 16
    assert first < FIRST_PICTURE_SECONDS


def test_an_empty_prompt_gets_a_sentence(browser):
    field = browser.find_element(By.CSS_SELECTOR, "#draw-prompt textarea, #draw-prompt input")
    field.clear()
    field.send_keys(" ")
    browser.find_element(By.ID, "draw-button").click()
    assert "must have 1 to 400 characters" in wait(browser, "#draw-result .mistake").text
    field.send_keys("a red apple")
    browser.find_element(By.ID, "draw-button").click()
    wait(browser, "#draw-result .final figure img")


def test_an_uploaded_picture_is_described_and_asked_about(browser, tmp_path):
    open_tab(browser, "Read")
    browser.find_element(By.ID, "read-button").click()
    assert "There is no picture yet" in wait(browser, "#read-result .mistake").text
    path = tmp_path / "heart.png"
    Image.new("RGB", (64, 64), "red").save(path)
    upload(browser, path)
    browser.find_element(By.ID, "read-button").click()
    assert wait(browser, "#read-result .final .text").text
    browser.find_element(
        By.CSS_SELECTOR, "#read-question textarea, #read-question input"
    ).send_keys("what colour is the background?")
    browser.find_element(By.ID, "read-button").click()
    wait(browser, "#read-result .draft")
    assert wait(browser, "#read-result .final .text").text
    keep(browser, "read")


def test_a_bad_upload_gets_a_sentence(browser, tmp_path):
    open_tab(browser, "Read")
    path = tmp_path / "broken.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n and nothing more")
    wait(browser, "#read-image .icon-button-wrapper button").click()  # Clears the picture.
    upload(browser, path)
    browser.find_element(By.ID, "read-button").click()
    message = wait(browser, "#read-result .mistake").text
    assert message == "That file is not a readable picture. Choose a PNG, JPEG or WebP picture."
    keep(browser, "bad_upload")
    assert "Traceback" not in browser.page_source


def upload(browser: Any, path: Path) -> None:
    field = wait(browser, "#read-image input[type=file]")
    field.send_keys(str(path))
    wait(browser, "#read-image img")
    time.sleep(0.5)


def test_pairs_are_invented(browser):
    open_tab(browser, "Invent")
    browser.find_element(By.ID, "invent-button").click()
    wait(browser, "#invent-result .draft .masked")
    wait(browser, "#invent-result .final figcaption")
    assert len(browser.find_elements(By.CSS_SELECTOR, "#invent-result figcaption")) == 2
    keep(browser, "invent")


def test_what_is_painted_over_is_drawn_anew(browser):
    open_tab(browser, "Inpaint")
    browser.find_element(By.ID, "inpaint-last").click()
    time.sleep(3)  # The picture is loaded into the canvas, which tells nobody.
    browser.find_element(By.ID, "inpaint-button").click()
    assert "Nothing is painted over yet" in wait(browser, "#inpaint-result .mistake").text
    canvas = browser.find_element(By.CSS_SELECTOR, "#inpaint-editor canvas")
    chain = ActionChains(browser)
    chain.move_to_element_with_offset(canvas, 20, -40).click_and_hold()
    for _ in range(8):
        chain.move_by_offset(3, 12)
    chain.release().perform()
    time.sleep(1)
    browser.find_element(By.ID, "inpaint-button").click()
    wait(browser, "#inpaint-result .final figure img")
    keep(browser, "inpaint")


def test_nothing_on_the_page_comes_from_elsewhere(browser, address):
    script = "return performance.getEntriesByType('resource').map(each => each.name)"
    names = browser.execute_script(script)
    assert len(names) > 10
    assert [name for name in names if not name.startswith((address, "data:", "blob:"))] == []
