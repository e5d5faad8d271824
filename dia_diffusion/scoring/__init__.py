"""How good images are: the Fréchet distance and other scores, the features that they are taken in, and reports."""

from ..door import open_door

__getattr__, __all__ = open_door(
    __name__,
    command="score",
    evaluation="DEFAULT_METRICS evaluate",
    features="get_extractor",
    generated="PipelineImages",
    report="format_scores",
)
