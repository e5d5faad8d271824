"""Images from a saved pipeline, with any scheduler, each a function of the seed and its number."""

from .command import sample
from .loading import load_pipeline
from .numbered import sample_batch, sample_images
from .schedulers import DEFAULT_SCHEDULER, make_scheduler

__all__ = ["DEFAULT_SCHEDULER", "load_pipeline", "make_scheduler", "sample", "sample_batch", "sample_images"]
