"""Check that the networks of a loaded pipeline are those that were saved: diffusers only warns of weights left over."""

import json
from collections.abc import Collection
from pathlib import Path

from diffusers import DiffusionPipeline, ModelMixin

from ..errors import UsageError


def check_weights(pipeline: DiffusionPipeline, variant: str | None = None, given: Collection[str] = ()) -> None:
    """Refuse a pipeline with a network whose files lack weights, or hold weights that it has no layer for.

    Args:
        pipeline (`DiffusionPipeline`): Fresh from `from_pretrained`, which records the folder of each network.
        variant (`str`, *optional*): The variant that was loaded.
        given (collection of `str`): Names of components that were not loaded.

    Raises:
        UsageError: names the network and one of the weights.
    """
    for name, network in pipeline.components.items():
        folder = Path(getattr(network, "config", {}).get("_name_or_path") or "")
        if name in given or not isinstance(network, ModelMixin) or not folder.is_dir():
            continue
        # A file of another name, such as a LoRA, is not part of the network.
        files = [path for path in folder.glob("diffusion_pytorch_model*") if path.suffix in (".safetensors", ".bin")]
        safe = [path for path in files if path.suffix == ".safetensors"]
        keys = {key for path in safe for key in _read_names(path)}
        if keys == set(network.state_dict()):
            continue
        # Pickled, several variants in one folder, or names of an older version, which diffusers translates.
        kind, own = type(network), variant if variant in map(variant_of, files) else None
        _, found = kind.from_pretrained(
            folder, variant=own, use_safetensors=own in map(variant_of, safe), output_loading_info=True
        )
        if lacking := sorted(found["missing_keys"]):
            raise UsageError(f"the weights of its {name} lack {lacking[0]} ({len(lacking)} missing in all).")
        # Weights of the loss that a VAE was trained with are no part of it.
        if unused := sorted(key for key in found["unexpected_keys"] if not key.startswith("loss.")):
            raise UsageError(
                f"the weights of its {name} hold {unused[0]}, for which {kind.__name__} has no layer ({len(unused)} in "
                "all): they are those of another model than its configuration."
            )


def variant_of(path: Path) -> str | None:
    """Return the variant in the name of a file of weights, also of one of several; `None` is the one without a name."""
    return path.stem.split("-0")[0].partition(".")[2] or None


def _read_names(path: Path) -> set[str]:
    """Return the names in the header of a safetensors file: its length in 8 bytes, and JSON."""
    with path.open("rb") as file:
        return set(json.loads(file.read(int.from_bytes(file.read(8), "little")))) - {"__metadata__"}
