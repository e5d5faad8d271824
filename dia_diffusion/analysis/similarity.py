"""Similarity between the attention maps of a model: correlation and CKA of pairs of blocks, and the timestep's share.

Maps are arrays of shape `(T, N, C)`: T timesteps, N images, C channels. Each similarity is computed in two views of
them: `all` samples together, and `within_timestep`, where the mean map of each timestep is subtracted first, so that
similarity that comes from the timestep alone does not count.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from .maps import Block

# A gate that varies less than this is constant but for rounding, and correlates with nothing.
_CONSTANT = 1e-6
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def all_samples(maps: np.ndarray) -> np.ndarray:
    """Return maps `(T, N, C)` as centred samples `(T * N, C)`."""
    samples = maps.reshape(-1, maps.shape[-1]).astype(np.float64)
    return samples - samples.mean(0)


def within_timestep(maps: np.ndarray) -> np.ndarray:
    """Return maps `(T, N, C)` as samples `(T * N, C)`, centred for each timestep."""
    maps = maps.astype(np.float64)
    return (maps - maps.mean(1, keepdims=True)).reshape(-1, maps.shape[-1])


VIEWS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"all": all_samples, "within_timestep": within_timestep}


def pearson(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Correlate each channel of `x` with the same channel of `y`, both centred samples `(S, C)`.

    NaN for channels that are constant in either of them.
    """
    defined = ~(is_constant(x) | is_constant(y))
    product = np.sqrt(np.square(x).sum(0) * np.square(y).sum(0))
    return np.divide((x * y).sum(0), product, out=np.full(x.shape[1], np.nan), where=defined)


def linear_cka(x: np.ndarray, y: np.ndarray) -> float:
    """Return the linear centred kernel alignment of centred samples `(S, C)` and `(S, D)`; NaN if either is constant.

    It is 1 if they are equal up to rotation and scale (Kornblith et al. 2019, arXiv 1905.00414, section 3).
    """
    if is_constant(x).all() or is_constant(y).all():
        return float("nan")
    return float(np.square(y.T @ x).sum() / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)))


def is_constant(samples: np.ndarray) -> np.ndarray:
    """Tell which channels of centred samples `(S, C)` do not vary."""
    return np.sqrt(np.square(samples).mean(0)) < _CONSTANT


def timestep_share(maps: np.ndarray) -> float:
    """Return the share of the variance of maps `(T, N, C)` that is between timesteps; NaN if they are constant.

    The variance is summed over the channels.
    """
    maps = maps.astype(np.float64)
    if is_constant(all_samples(maps)).all():
        return float("nan")
    return float(maps.mean(1).var(0).sum() / maps.var((0, 1)).sum())


def channel_correlations(maps: dict[str, np.ndarray], view: str) -> dict[tuple[str, str], np.ndarray]:
    """Correlate each channel, `(C,)`, for each pair of blocks of equal width, in order of execution."""
    samples = {name: VIEWS[view](values) for name, values in maps.items()}
    return {(a, b): pearson(samples[a], samples[b]) for a, b in _pairs(maps) if maps[a].shape == maps[b].shape}


def cka_of_pairs(maps: dict[str, np.ndarray], view: str) -> dict[tuple[str, str], np.ndarray]:
    """Return the linear CKA of each pair of blocks of any width, as an array `(1,)`."""
    samples = {name: VIEWS[view](values) for name, values in maps.items()}
    return {(a, b): np.array([linear_cka(samples[a], samples[b])]) for a, b in _pairs(maps)}


def _pairs(names: Iterable[str]) -> list[tuple[str, str]]:
    names = list(names)
    return [(a, b) for number, a in enumerate(names) for b in names[number + 1 :]]


def group_pairs(blocks: Sequence[Block], pairs: Iterable[tuple[str, str]]) -> dict[str, list[tuple[str, str]]]:
    """Group pairs of blocks by level and path; a pair may be in several groups.

    Returns:
        `dict`: Every pair, pairs within each level from full resolution down, between levels, and by path, in order of
        execution.
    """
    place = {block.name: block for block in blocks}
    levels = [f"level {level}" for level in sorted({block.level for block in blocks})]
    groups: dict[str, list[tuple[str, str]]] = {name: [] for name in ("every pair", *levels, "between levels")}
    for pair in pairs:
        a, b = (place[name] for name in pair)
        level = f"level {a.level}" if a.level == b.level else "between levels"
        for group in ("every pair", level, f"{a.path}-{b.path}"):
            groups.setdefault(group, []).append(pair)
    return {group: pairs for group, pairs in groups.items() if pairs}


def describe(values: np.ndarray) -> dict[str, Any]:
    """Return statistics of similarities without those that are NaN; each is `None` if none is left."""
    known = values[~np.isnan(values)]
    if not len(known):
        return {"mean": None, "mean_absolute": None, "maximum": None, "quantiles": None, "count": 0}
    return {
        "mean": float(known.mean()),
        "mean_absolute": float(np.abs(known).mean()),
        "maximum": float(known.max()),
        "quantiles": dict(zip(map(str, _QUANTILES), np.quantile(known, _QUANTILES).tolist(), strict=True)),
        "count": len(known),
    }


def describe_pairs(blocks: Sequence[Block], similarity: dict[tuple[str, str], np.ndarray]) -> dict[str, Any]:
    """Return statistics of a similarity over the channels of each pair of blocks, and of each group of pairs."""
    return {
        "groups": {
            group: describe(np.concatenate([similarity[pair] for pair in pairs]))
            for group, pairs in group_pairs(blocks, similarity).items()
        },
        "pairs": [{"blocks": list(pair), **describe(values)} for pair, values in similarity.items()],
    }


def describe_blocks(blocks: Sequence[Block], maps: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """Return for each block the statistics of its gates, overall and for each timestep."""
    described = []
    for block in blocks:
        values = maps[block.name].astype(np.float64)
        share = timestep_share(values)
        described.append(
            {
                "name": block.name,
                "path": block.path,
                "level": block.level,
                "width": values.shape[-1],
                "constant_channels": int(is_constant(all_samples(values)).sum()),
                "mean": float(values.mean()),
                "standard_deviation": float(values.std()),
                "timestep_share": None if np.isnan(share) else share,
                "by_timestep": {
                    "mean": values.mean((1, 2)).tolist(),
                    "deviation_between_images": values.std(1).mean(1).tolist(),
                    "deviation_between_channels": values.mean(1).std(1).tolist(),
                },
            }
        )
    return described
