"""The page, in a real browser."""

import io
import os
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from browser import open_browser
from dia_diffusion import DIAUNet2DModel, DIAUNetPipeline
from dia_diffusion.app.stepwise import StepwiseSampler
from dia_diffusion.sampling.generation import sample_batch
from dia_diffusion.sampling.schedulers import make_scheduler
from tiny_unets import GREY

gradio = pytest.importorskip("gradio", reason="gradio is not installed (pip install 'dia-diffusion[app]')")


def make_pipeline():
    from diffusers import DDPMScheduler

    torch.manual_seed(1)
    unet = DIAUNet2DModel(**GREY, num_class_embeds=3, dia_init="paper", dia_hidden_size=8)
    scheduler = make_scheduler("ddim", DDPMScheduler().config)
    return DIAUNetPipeline(unet, scheduler, {0: "cat", 1: "dog"})


@pytest.fixture(scope="module")
def opened():
    from dia_diffusion.app.dia_app import describe_model
    from dia_diffusion.app.page import make_app

    pipeline = make_pipeline()
    app = make_app(StepwiseSampler(pipeline), "animals", describe_model(pipeline, "animals"))
    with open_browser() as browser:
        _, url, _ = app.launch(quiet=True, prevent_thread_lock=True, server_name="127.0.0.1")
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        page.set_default_timeout(60_000)
        page.goto(url)
        yield page, pipeline
        app.close()


def click(page, name):
    page.get_by_role("button", name=name, exact=True).click()


def wait_for(page, words):
    page.locator("[role=status]", has_text=words).wait_for()


def downloaded(page):
    with page.expect_download() as download:
        page.get_by_role("button", name="Download", exact=True).click()
    with zipfile.ZipFile(download.value.path()) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".png"))
        return np.stack([np.asarray(Image.open(io.BytesIO(archive.read(name)))) for name in names])


def of(images):
    return images[:, 0].numpy()


def test_images_are_there_when_the_page_is_opened_with_their_classes(opened):
    page, _ = opened
    wait_for(page, "Done: 10 images of seed 0")
    assert page.locator("#images img").count() == 10
    assert page.locator("#images .caption-label").all_inner_texts() == ["cat", "dog"] * 5
    for name in ("Again", "Vary", "Download"):
        page.get_by_role("button", name=name, exact=True).wait_for()
    page.get_by_text("8x8 pixels, 2 classes; 18,605 parameters (900 of them shared attention").wait_for()


@pytest.mark.parametrize(("width", "height", "columns"), [(1280, 800, 9), (390, 844, 3)])
def test_nothing_is_cut(opened, width, height, columns):
    page, _ = opened
    page.set_viewport_size({"width": width, "height": height})
    # A seed of its own tells these images from those before.
    page.get_by_label("Seed").fill(str(width))
    click(page, "Make images")
    wait_for(page, f"Done: 10 images of seed {width}")
    scrolled = "e => [e.scrollWidth <= e.clientWidth, e.scrollHeight <= e.clientHeight + 1]"
    assert page.evaluate(f"({scrolled})(document.documentElement)")[0]
    assert page.locator("#images .grid-wrap").evaluate(scrolled) == [True, True]
    # All at one moment: the page may be scrolling.
    tops = page.locator("#images img").evaluate_all("all => all.map(e => Math.round(e.getBoundingClientRect().top))")
    assert tops.count(tops[0]) == columns
    # The picture is in sight once it is made.
    page.wait_for_function("() => document.querySelector('#images img').getBoundingClientRect().top < innerHeight / 2")
    page.set_viewport_size({"width": 1200, "height": 900})


def test_a_click_makes_images_which_can_be_had(opened):
    page, pipeline = opened
    page.get_by_label("Seed").fill("5")
    page.get_by_label("Steps").fill("50")
    page.get_by_label("Class").click()
    page.get_by_role("option", name="dog").click()
    click(page, "Make images")
    wait_for(page, "Done: 10 images of seed 5")
    assert page.locator("#images img").count() == 10
    assert np.array_equal(downloaded(page), of(sample_batch(pipeline, range(10), 50, 5, class_label=1)))
    click(page, "Again")
    wait_for(page, "Done: 10 images of seed 6")
    assert page.get_by_label("Seed").input_value() == "6"
    seen = of(sample_batch(pipeline, range(10), 50, 6, class_label=1))
    assert np.array_equal(downloaded(page), seen)
    page.locator("#images img").nth(2).click()
    click(page, "Vary")
    wait_for(page, "Done: 10 images of seed 6, varied")
    varied = downloaded(page)
    assert np.array_equal(varied[0], seen[2])
    assert len({image.tobytes() for image in varied}) == 10


def test_images_appear_while_they_are_denoised_and_the_work_can_be_stopped(opened):
    page, _ = opened
    page.get_by_label("Steps").fill("1000")
    click(page, "Make images")
    wait_for(page, "of 1000")
    assert page.locator("#images img").count() == 10
    bar = page.locator("progress").first
    assert 0 < int(bar.get_attribute("value")) < 1000
    click(page, "Stop")
    page.get_by_label("Steps").fill("2")
    click(page, "Make images")
    wait_for(page, "Done: 10 images")


def test_a_look_inside_shows_gates_and_images_without_attention(opened):
    page, _ = opened
    page.get_by_label("Steps").fill("4")
    click(page, "Make images")
    wait_for(page, "Done: 10 images")
    page.get_by_role("tab", name="Look inside").click()
    click(page, "Look inside the images just made")
    wait_for(page, "Without the attention a pixel changes by")
    for name in ("#gates img", "#with img", "#without img"):
        page.locator(name).first.wait_for()
    page.get_by_role("tab", name="Images").click()


def test_what_the_pipeline_refuses_is_said_in_its_words(opened):
    page, _ = opened
    page.get_by_label("Steps").fill("1001")
    click(page, "Make images")
    page.get_by_text("steps must be at most 1000, as many as the model has timesteps, but is 1001.").wait_for()


def test_files_of_downloads_are_not_kept(opened, tmp_path_factory):
    page, _ = opened
    folder = Path(tempfile.gettempdir())
    before, end = set(folder.glob("dia-app-*")), time.monotonic() + 20
    for _ in range(2):
        page.get_by_label("Steps").fill("2")
        click(page, "Make images")
        wait_for(page, "Done: 10 images")
    downloaded(page)
    # Beside Gradio's cache, which it cleans by itself.
    while set(folder.glob("dia-app-*")) - before and time.monotonic() < end:
        time.sleep(0.1)
    assert not set(folder.glob("dia-app-*")) - before


def test_the_command_serves_its_page_where_a_proxy_is_set(tmp_path):
    make_pipeline().save_pretrained(tmp_path / "animals")
    nowhere = dict.fromkeys(
        ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy"), "http://127.0.0.1:9"
    )
    command = [sys.executable, "-m", "dia_diffusion.cli", "app", str(tmp_path / "animals"), "--host", "127.0.0.1"]
    without = {name: value for name, value in os.environ.items() if name.lower() != "no_proxy"}
    with subprocess.Popen(
        command, env=without | nowhere, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as app:
        line = app.stdout.readline()
        app.send_signal(signal.SIGINT)
        errors = app.communicate(timeout=60)[1]
    assert "can be tried at http://127.0.0.1:" in line, errors
    assert "Traceback" not in errors


def test_a_seed_that_browsers_cannot_hold_is_refused():
    from dia_diffusion.app.page import _read

    assert _read(None, 2**53 - 1, 3, "its own", 1, 4).seed == 2**53 - 1
    with pytest.raises(gradio.Error, match="seed must be at most 9007199254740991, but is"):
        _read(None, 10**30, 3, "its own", 1, 4)
