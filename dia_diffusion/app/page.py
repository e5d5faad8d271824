"""The page: what is asked for on the left, images as they are denoised, and a look inside."""

import html
import time
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gradio as gr
from PIL import Image
from torch import Tensor

from ..data.grid import image_grid
from ..errors import UsageError
from ..files import to_json
from ..sampling.schedulers import scheduler_names
from .making import Maker, Moment, Request, draw_gates

_HELP = "Again takes the next seed; Vary moves the noise of the image that is selected, or of each, a little."
_INSIDE = "The gates of all blocks at each step, and the same images without the attention."
_WITHOUT = "Without it: all gates at 1"
_ALL_CLASSES, _OWN = "every class in turn", "its own"
_BUTTONS = ["download", "fullscreen"]
_MOST_IMAGES = 64
# Seconds between pictures on the way, and between cleanings of what browsers were given.
_INTERVAL, _HOUR = 0.25, 3600
# Small images are enlarged without smoothing, to about this many pixels.
_SHOWN = 160
# One request at a time: there is one model.
_QUEUE = {"concurrency_limit": 1, "concurrency_id": "model", "show_progress": "hidden", "trigger_mode": "multiple"}


@dataclass(frozen=True)
class Made:
    """Images, what they were asked for with, and what was seen on the way."""

    request: Request
    images: Tensor
    moments: list[Moment]


def make_app(maker: Maker, title: str) -> gr.Blocks:
    """The page of a model, to be launched."""
    folder = TemporaryDirectory(prefix="dia-app-")
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(_HOUR, _HOUR)) as app:
        # It lives as long as the page.
        app.downloads = folder
        gr.Markdown(f"# {title}")
        made, chosen = gr.State(), gr.State()
        with gr.Row():
            with gr.Column(scale=1, min_width=260):
                asked = _controls(maker)
                make = gr.Button("Make images", variant="primary")
                with gr.Row():
                    again, vary, stop = (gr.Button(name, size="sm", min_width=60) for name in ("Again", "Vary", "Stop"))
                download = gr.DownloadButton("Download", size="sm", interactive=False)
            with gr.Column(scale=3), gr.Tabs():
                with gr.Tab("Images"):
                    bar = gr.HTML(_progress(0, 1, _HELP))
                    gallery = gr.Gallery(
                        columns=5, height="auto", format="png", elem_id="images", show_label=False, buttons=_BUTTONS
                    )
                with gr.Tab("Look inside"):
                    look = gr.Button("Look inside the images just made")
                    inside = gr.HTML(_progress(0, 1, _INSIDE))
                    heat = gr.Plot(show_label=False, elem_id="gates")
                    with gr.Row():
                        beside = [_picture(*texts) for texts in (("With the attention", "with"), (_WITHOUT, "without"))]

        def fresh(*values: Any) -> Iterator[tuple]:
            yield from _show(maker, folder, _read(*values))

        def once_more(before: Made | None, *values: Any) -> Iterator[tuple]:
            # The settings on the page count, and the seed of the images that are there.
            request = _read(*values)
            yield from _show(maker, folder, request if before is None else request.again())

        def variants(before: Made | None, which: int | None) -> Iterator[tuple]:
            yield from _show(maker, folder, _of(before).request.vary(which))

        def insight(before: Made | None) -> Iterator[tuple]:
            yield from _look_inside(maker, _of(before))

        outputs = [gallery, bar, made, download, asked[1], chosen]
        running = [
            make.click(fresh, asked, outputs, **_QUEUE),
            again.click(once_more, [made, *asked], outputs, **_QUEUE),
            vary.click(variants, [made, chosen], outputs, **_QUEUE),
            look.click(insight, made, [heat, *beside, inside], **_QUEUE),
        ]
        stop.click(None, cancels=running)
        gallery.select(_selected, None, chosen)
    return app


def _selected(event: gr.SelectData) -> int:
    return event.index


def _picture(title: str, name: str) -> gr.Image:
    with gr.Column():
        gr.Markdown(f"### {title}")
        return gr.Image(format="png", elem_id=name, show_label=False, interactive=False, buttons=[])


def _controls(maker: Maker) -> list[gr.components.Component]:
    """What a request is made of, in the order of `_read`."""
    pipeline = maker.pipeline
    classes, names = pipeline.null_class, pipeline.class_names
    guided = classes is not None or pipeline.guide is not None
    labels = [(_ALL_CLASSES, -1), *((names[n] if names else str(n), n) for n in range(classes or 0))]
    return [
        gr.Dropdown(labels, value=-1, label="Class", visible=classes is not None),
        gr.Number(0, label="Seed", precision=0),
        gr.Number(25, label="Steps", precision=0),
        gr.Dropdown(
            [_OWN, *scheduler_names(pipeline.scheduler.config)],
            label="Sampler",
            info=f"Its own: {type(pipeline.scheduler).__name__}",
        ),
        gr.Slider(1, 10, value=1, step=0.25, label="Guidance", info="1: none", visible=guided),
        gr.Slider(1, _MOST_IMAGES, value=10, step=1, label="Number"),
    ]


def _read(
    label: int | None, seed: int | None, steps: int | None, sampler: str, guidance: float, number: float
) -> Request:
    for name, value in (("seed", seed), ("steps", steps)):
        if value is None:
            raise gr.Error(f"{name} must be a whole number.", print_exception=False)
    return Request(
        numbers=tuple(range(int(number))),
        seed=seed,
        steps=steps,
        scheduler=None if sampler == _OWN else sampler,
        guidance_scale=float(guidance),
        class_label=None if label in (None, -1) else int(label),
    )


def _of(made: Made | None) -> Made:
    if made is None:
        raise gr.Error("make images first.", print_exception=False)
    return made


def _show(maker: Maker, folder: TemporaryDirectory, request: Request) -> Iterator[tuple]:
    """What the page shows while images are made: gallery, bar, what was made, download, seed, selection."""
    moments, nothing = [], gr.DownloadButton(interactive=False)
    for moment in _in_words(maker.make(request)):
        moments.append(moment.without_images())
        if moment.images is None:
            continue
        images = moment.images()
        words = f"Step {moment.step} of {moment.steps}, seed {request.seed}"
        shown = gr.Gallery(_enlarged(images), selected_index=None)
        yield shown, _progress(moment.step, moment.steps, words), None, nothing, request.seed, None
    made = Made(request, images, moments)
    words = f"Done: {len(images)} images of seed {request.seed}" + ", varied" * (request.variation > 0)
    file = gr.DownloadButton(value=str(_pack(made, Path(folder.name))), interactive=True)
    yield gr.skip(), _progress(1, 1, words), made, file, request.seed, None


def _look_inside(maker: Maker, made: Made) -> Iterator[tuple]:
    """Heat map, images, images without attention, bar."""
    if not maker.has_attention:
        raise gr.Error("this model has no attention to look at (dia_attention is 'none').", print_exception=False)
    figure, grid = draw_gates(made.moments), image_grid(made.images)
    for moment in _in_words(maker.make_without_attention(made.request)):
        if moment.images is not None:
            bare = moment.images()
            yield figure, grid, image_grid(bare), _progress(moment.step, moment.steps, "The same without the attention")
    apart = (bare.float() - made.images.float()).abs().mean()
    yield gr.skip(), gr.skip(), gr.skip(), _progress(1, 1, f"Mean difference of the images: {apart:.2f} of 255")


def _in_words(moments: Iterable[Moment]) -> Iterator[Moment]:
    """Moments, most of them without their images, which take time to show; what is refused, is in its words."""
    shown = -_INTERVAL
    try:
        for moment in moments:
            due = time.monotonic() - shown >= _INTERVAL or moment.last
            if due:
                shown = time.monotonic()
            yield moment if due else moment.without_images()
    except UsageError as error:
        raise gr.Error(html.escape(str(error)), duration=None, print_exception=False) from error


def _pictures(images: Tensor) -> list[Image.Image]:
    return [Image.fromarray(image.permute(1, 2, 0).squeeze(-1).numpy()) for image in images]


def _enlarged(images: Tensor) -> list[Image.Image]:
    factor = max(1, _SHOWN // max(images.shape[-2:]))
    return [
        image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
        for image in _pictures(images)
    ]


def _progress(done: int, of: int, words: str) -> str:
    return (
        f"<progress value='{done}' max='{of}' style='width: 100%'></progress>"
        f"<div role='status'>{html.escape(words)}</div>"
    )


def _pack(made: Made, folder: Path) -> Path:
    """The images as they are and what they were asked for with, in one file."""
    path = folder / f"images-{time.monotonic_ns()}.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("request.json", to_json(asdict(made.request), indent=2))
        for number, image in enumerate(_pictures(made.images)):
            with archive.open(f"{number:05d}.png", "w") as file:
                image.save(file, format="PNG")
    return path
