"""The page: controls on the left, images as they are denoised, and a look inside."""

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
from ..pipelines.pipeline_dia_unet import DIAUNetPipeline
from ..sampling.schedulers import scheduler_names
from .gates import describe_difference, describe_gates, draw_gates
from .stepwise import Request, Snapshot, StepwiseSampler

_HELP = "Again takes the next seed. Vary changes the starting noise of the selected image, or of each, a little."
_GATES = (
    "A gate is the factor by which the attention multiplies a channel of a residual branch: 1 changes nothing, more "
    "strengthens the channel, less weakens it. Below are the gates of all blocks at each step, and the same images "
    "with all gates at 1."
)
_WITH, _WITHOUT = "With the attention", "Without it: all gates at 1"
_ALL_CLASSES, _OWN = "every class in turn", "its own"
_BUTTONS = ["download", "fullscreen"]
_MOST_IMAGES = 64
# Whole numbers that browsers know exactly.
_MOST_SEED = 2**53 - 1
# Seconds between pictures on the way, and between cleanings of the files that browsers were given.
_INTERVAL, _HOUR = 0.25, 3600
# Small images are enlarged without smoothing, to about this many pixels.
_SHOWN = 160
# One request at a time: there is one model.
_QUEUE = {"concurrency_limit": 1, "concurrency_id": "model", "show_progress": "hidden", "trigger_mode": "multiple"}
# As many columns as fit, and a gallery as high as its images, which does not scroll by itself.
_STYLE = """<style>
#images, #images .gallery-container, #images .grid-wrap { height: auto !important; min-height: 0 !important }
#images .grid-wrap { max-height: none !important; overflow: visible !important }
#images .grid-container { grid-template-columns: repeat(auto-fill, minmax(5.5rem, 1fr)) !important; height: auto }
#images img { object-fit: contain !important }
#images img, #with img, #without img { image-rendering: pixelated }
@media (max-width: 45rem) { #controls { order: 2 } }
#model { margin-top: -.5rem }
</style>"""
# Scroll to what a click makes, where its top is not in sight: on a phone the controls fill the screen.
_SCROLL = """() => {
  const shown = document.querySelector('#%s'), top = shown.getBoundingClientRect().top;
  if (top < 0 || top > innerHeight / 2) shown.scrollIntoView({behavior: 'smooth'});
}"""


@dataclass(frozen=True)
class Result:
    """Finished images, their request, and the snapshots of their sampling."""

    request: Request
    images: Tensor
    snapshots: list[Snapshot]


def make_app(sampler: StepwiseSampler, title: str, about: str = "") -> gr.Blocks:
    """Build the page of a model, ready to launch.

    Args:
        sampler (`StepwiseSampler`): Makes its images.
        title (`str`): The heading.
        about (`str`, *optional*): A paragraph about the model, in Markdown.
    """
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(_HOUR, _HOUR)) as app:
        gr.HTML(_STYLE, padding=False)
        gr.Markdown(f"# {title}\n{about}", elem_id="model")
        result, selected = gr.State(), gr.State()
        with gr.Row():
            with gr.Column(scale=1, min_width=260, elem_id="controls"):
                controls = _controls(sampler)
                make = gr.Button("Make images", variant="primary")
                with gr.Row():
                    again, vary, stop = (
                        gr.Button(name, size="sm", min_width=60, visible=False) for name in ("Again", "Vary", "Stop")
                    )
                download = gr.DownloadButton("Download", size="sm", visible=False)
            with gr.Column(scale=3, min_width=300), gr.Tabs():
                with gr.Tab("Images"):
                    bar = gr.HTML(_progress(0, 1, _HELP), elem_id="status")
                    gallery = gr.Gallery(
                        label="Images", format="png", elem_id="images", show_label=False, buttons=_BUTTONS
                    )
                with gr.Tab("Look inside", visible=sampler.has_attention):
                    gr.Markdown(_GATES)
                    look = gr.Button("Look inside the images just made")
                    inside = gr.HTML(elem_id="reading")
                    heat = gr.Plot(label="Gates of all blocks at each step", show_label=False, elem_id="gates")
                    with gr.Row():
                        pair = [_picture(*texts) for texts in ((_WITH, "with"), (_WITHOUT, "without"))]

        def fresh(*values: Any) -> Iterator[tuple]:
            yield from _sample(sampler, _read(*values))

        def next_seed(before: Result | None, *values: Any) -> Iterator[tuple]:
            # The settings on the page count, and the seed of the images that are there.
            request = _read(*values)
            yield from _sample(sampler, request if before is None else request.again())

        def variants(before: Result | None, index: int | None) -> Iterator[tuple]:
            yield from _sample(sampler, _made(before).request.vary(index))

        def insight(before: Result | None) -> Iterator[tuple]:
            yield from _look_inside(sampler, _made(before))

        outputs = [gallery, bar, result, download, controls[1], selected, again, vary, stop]
        running = [
            app.load(fresh, controls, outputs, **_QUEUE),
            make.click(fresh, controls, outputs, **_QUEUE),
            again.click(next_seed, [result, *controls], outputs, **_QUEUE),
            vary.click(variants, [result, selected], outputs, **_QUEUE),
            look.click(insight, result, [heat, *pair, inside], **_QUEUE),
        ]
        for button in (make, again, vary):
            button.click(None, js=_SCROLL % "status")
        look.click(None, js=_SCROLL % "reading")
        stop.click(None, cancels=running)
        stop.click(lambda: (gr.Button(visible=False), _progress(0, 1, "Stopped.")), None, [stop, bar], queue=False)
        gallery.select(_selected, None, selected)
    return app


def _selected(event: gr.SelectData) -> int:
    return event.index


def _picture(title: str, name: str) -> gr.Image:
    with gr.Column(min_width=260):
        gr.Markdown(f"### {title}")
        return gr.Image(format="png", label=title, elem_id=name, show_label=False, interactive=False, buttons=[])


def _controls(sampler: StepwiseSampler) -> list[gr.components.Component]:
    """Make the inputs of a request, in the order of `_read`."""
    pipeline = sampler.pipeline
    classes = pipeline.null_class
    guided = classes is not None or pipeline.guide is not None
    labels = [(_ALL_CLASSES, -1), *((_class_name(pipeline, number), number) for number in range(classes or 0))]
    return [
        gr.Dropdown(labels, value=-1, label="Class", visible=classes is not None),
        gr.Number(0, label="Seed", precision=0, min_width=100),
        gr.Number(25, label="Steps", precision=0),
        gr.Dropdown(
            [_OWN, *scheduler_names(pipeline.scheduler.config)],
            label="Sampler",
            info=f"Its own: {type(pipeline.scheduler).__name__}",
        ),
        gr.Slider(1, 10, value=1, step=0.25, label="Guidance", info="1: none; more: less varied", visible=guided),
        gr.Slider(1, _MOST_IMAGES, value=10, step=1, label="Number", info="Images at a time"),
    ]


def _class_name(pipeline: DIAUNetPipeline, number: int) -> str:
    names = pipeline.class_names
    return names[number] if names and number < len(names) else f"class {number}"


def _read(
    label: int | None, seed: int | None, steps: int | None, scheduler: str, guidance: float, number: float
) -> Request:
    if seed is None or steps is None:
        raise gr.Error(f"{'seed' if seed is None else 'steps'} must be a whole number.", print_exception=False)
    if seed > _MOST_SEED:
        raise gr.Error(f"seed must be at most {_MOST_SEED}, but is {seed}.", print_exception=False)
    return Request(
        numbers=tuple(range(int(number))),
        seed=seed,
        steps=steps,
        scheduler=None if scheduler == _OWN else scheduler,
        guidance_scale=float(guidance),
        class_label=None if label in (None, -1) else int(label),
    )


def _made(result: Result | None) -> Result:
    if result is None:
        raise gr.Error("make images first.", print_exception=False)
    return result


def _sample(sampler: StepwiseSampler, request: Request) -> Iterator[tuple]:
    """Yield the values of the page while images are made: gallery, bar, result, download, seed, selection, buttons."""
    hidden, shown = ([gr.Button(visible=visible) for _ in range(2)] for visible in (False, True))
    nothing, snapshots = gr.DownloadButton(visible=False), []
    captions = _captions(sampler.pipeline, request)
    for snapshot in _refused_in_words(sampler.sample(request)):
        snapshots.append(snapshot.without_images())
        if snapshot.images is None:
            continue
        images = snapshot.images()
        words = f"Step {snapshot.step} of {snapshot.steps}, seed {request.seed}"
        gallery = gr.Gallery(list(zip(_enlarge(images), captions, strict=True)), selected_index=None)
        bar = _progress(snapshot.step, snapshot.steps, words)
        yield gallery, bar, None, nothing, request.seed, None, *hidden, gr.Button(visible=True)
    result = Result(request, images, snapshots)
    words = f"Done: {len(images)} images of seed {request.seed}" + ", varied" * (request.variation > 0)
    # Gradio copies the file into its cache, which it cleans every hour.
    with TemporaryDirectory(prefix="dia-app-") as folder:
        file = gr.DownloadButton(value=str(_pack(result, Path(folder))), visible=True)
        stopped = gr.Button(visible=False)
        yield gr.skip(), _progress(1, 1, words), result, file, request.seed, None, *shown, stopped


def _captions(pipeline: DIAUNetPipeline, request: Request) -> list[str | None]:
    """Return the class of each image; none for a model without classes."""
    classes, label = pipeline.null_class, request.class_label
    if not classes:
        return [None] * len(request.numbers)
    return [_class_name(pipeline, number % classes if label is None else label) for number in request.numbers]


def _look_inside(sampler: StepwiseSampler, result: Result) -> Iterator[tuple]:
    """Yield heat map, images, images without attention, and the reading of both."""
    figure, grid = draw_gates(result.snapshots), image_grid(result.images)
    for snapshot in _refused_in_words(sampler.sample_without_attention(result.request)):
        if snapshot.images is not None:
            bare = snapshot.images()
            bar = _progress(snapshot.step, snapshot.steps, "The same without the attention")
            yield figure, grid, image_grid(bare), bar
    reading = f"{describe_difference(result.images, bare)} {describe_gates(result.snapshots)}"
    yield gr.skip(), gr.skip(), gr.skip(), _progress(1, 1, reading)


def _refused_in_words(snapshots: Iterable[Snapshot]) -> Iterator[Snapshot]:
    """Yield snapshots, most of them without their images, which take time to show; show a refusal as a message."""
    shown = -_INTERVAL
    try:
        for snapshot in snapshots:
            due = time.monotonic() - shown >= _INTERVAL or snapshot.last
            if due:
                shown = time.monotonic()
            yield snapshot if due else snapshot.without_images()
    except UsageError as error:
        raise gr.Error(html.escape(str(error)), duration=None, print_exception=False) from error


def _pictures(images: Tensor) -> list[Image.Image]:
    return [Image.fromarray(image.permute(1, 2, 0).squeeze(-1).numpy()) for image in images]


def _enlarge(images: Tensor) -> list[Image.Image]:
    factor = max(1, _SHOWN // max(images.shape[-2:]))
    return [
        image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
        for image in _pictures(images)
    ]


def _progress(done: int, total: int, words: str) -> str:
    return (
        f"<progress value='{done}' max='{total}' style='width: 100%'></progress>"
        f"<div role='status'>{html.escape(words)}</div>"
    )


def _pack(result: Result, folder: Path) -> Path:
    """Write the images as they are, and their request, to one zip file in a folder."""
    path = folder / f"images-seed-{result.request.seed}.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("request.json", to_json(asdict(result.request), indent=2))
        for number, image in enumerate(_pictures(result.images)):
            with archive.open(f"{number:05d}.png", "w") as file:
                image.save(file, format="PNG")
    return path
