"""Mistakes about what a run leaves, seen before it trains."""

from ..data import PixelDataset
from ..errors import UsageError
from ..sampling import make_scheduler
from ..scoring import get_extractor
from .objectives import Objective
from .options import OutputOptions


def check_results(
    options: OutputOptions, objective: Objective, data: PixelDataset, held_out: PixelDataset | None
) -> None:
    """Tries what is cheap of the samples and scores that a run is to make.

    Raises:
        UsageError: for what would fail when the run is trained.
    """
    steps, sampler = options.ddpm_num_inference_steps, make_scheduler(None, objective.scheduler.config)
    try:
        sampler.set_timesteps(steps)
    except (IndexError, ValueError) as error:
        raise UsageError(f"ddpm_num_inference_steps {steps} does not fit the noise schedule: {error}.") from error
    if objective.num_timesteps is not None and sampler.timesteps.min() < 0:
        raise UsageError(f"ddpm_num_inference_steps {steps} goes below the last timestep by rounding: take one less.")
    if options.score_features is None:
        return
    counts = {"score_num_images": options.score_num_images}
    if options.eval_steps is not None:
        counts["eval_num_images"] = options.eval_num_images
    for name, count in counts.items():
        if count < 2:
            raise UsageError(f"{name} must be at least 2, because scores compare distributions, but is {count}.")
    for kind, images in (("training", data), ("held-out", held_out)):
        if images is not None and len(images) < 2:
            raise UsageError(
                f"there is only 1 {kind} image, and scores need 2 or more: add images, or omit --score_features."
            )
    # A network that does not take such images says so.
    get_extractor(options.score_features, data.resolution, data.channels)(data.numbered(range(1)))
