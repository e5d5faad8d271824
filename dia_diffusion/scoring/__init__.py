"""How good images are: the Fréchet distance and other scores, the features that they are taken in, and reports."""

from .command import score
from .evaluation import DEFAULT_METRICS, evaluate
from .features import get_extractor
from .generated import PipelineImages
from .report import format_scores

__all__ = ["DEFAULT_METRICS", "PipelineImages", "evaluate", "format_scores", "get_extractor", "score"]
