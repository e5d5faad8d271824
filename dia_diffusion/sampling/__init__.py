"""Images from a saved pipeline, with any scheduler, each a function of the seed and its number."""

from ..door import open_door

__getattr__, __all__ = open_door(
    __name__,
    command="sample",
    guides="check_guide set_guide",
    loading="load_pipeline",
    noising="make_noising_scheduler noise_images spread_timesteps",
    numbered="check_sampling describe_guidance image_generators sample_batch sample_images",
    schedulers="make_scheduler scheduler_names",
)
