"""A study that is small but real, for the tests of studies."""

import os

import yaml

from dia_diffusion.study.description import load_study

COMMON = {
    "dataset_name": "digits",
    "resolution": 8,
    "block_out_channels": [32, 32],
    "layers_per_block": 1,
    "dia_hidden_size": 8,
    "train_batch_size": 8,
    "max_train_steps": 24,
    "lr_warmup_steps": 2,
    "learning_rate": 1e-3,
    "logging_steps": 2,
    "checkpointing_steps": 2,
    "validation_steps": 100,
    "eval_batch_size": 1,
    "ddpm_num_inference_steps": 2,
    "use_ema": True,
}
VARIANTS = {"plain": {"dia_attention": "none"}, "dia": None}


def write_study(path, variants=VARIANTS, common=None, **options):
    options = {"baseline": "plain", "seeds": [0, 1], "num_images": 0, "loss_draws": 2, "timing_rounds": 0} | options
    options |= {"variants": variants, "common": COMMON | (common or {})}
    path.write_text(yaml.safe_dump(options, sort_keys=False))
    return path


def runs_of(path, folder):
    study = load_study(path)
    return study, study.runs(folder)


def note_gpu(run):
    """In a process that an engine starts: here, because it imports the module of its function."""
    (run.folder / "gpu").write_text(os.environ["CUDA_VISIBLE_DEVICES"])
