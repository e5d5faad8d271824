"""The training loop."""

import json
import signal
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from torch import Tensor
from torch.utils.data import DataLoader

from .checkpoint import find_latest, save_checkpoint, set_aside_newer
from .config import TrainingConfig
from .data import load_dataset_splits
from .diffusion import StepDraws, diffusion_loss, draw_step, step_seed
from .errors import NotFiniteError, UsageError
from .extractors import get_extractor
from .images import to_unit_range
from .interrupts import Interrupted, catch_interrupts
from .pixels import EndlessShuffle, PixelDataset, prepare_pixels
from .presets import build_unet
from .processes import any_process, check_same_start, make_accelerator
from .results import CHECKPOINTS, METRICS_LOG, RunResults, make_hub_repository, prepare_output_dir
from .resuming import find_checkpoint_to_resume
from .run_log import RunLog
from .training_state import TrainingState


def train(config: TrainingConfig) -> dict[str, Any]:
    """Trains a UNet as the configuration says, and leaves the pipeline and its record in `config.output_dir`.

    What is random about step k (order of images, crops, timesteps, noise, flips, label dropout) depends on the seed, k
    and the position in the global batch alone. Dropout inside of the model depends on the seed, k and the position of
    the batch in the global batch: it is the same when a run is resumed, but not when the batches are divided otherwise.

    Returns:
        `dict`: what is in metrics.json: the final losses and, where asked for, the scores. Empty on processes other
        than the main one.

    Raises:
        UsageError: for a configuration that cannot work, data that cannot be read, or a loss that is not finite.
        Interrupted: after SIGTERM or Ctrl-C, when the step is finished and a checkpoint is written.
    """
    accelerator = make_accelerator(config)
    figures = _train(config, accelerator)
    # The process group must outlive the distributed model: when that is the last to hold it, its threads are waited for
    # with Python's lock held, which they may need to end.
    accelerator.free_memory()
    accelerator.end_training()
    return figures


def _train(config: TrainingConfig, accelerator: Accelerator) -> dict[str, Any]:
    # 1. set up
    folder = Path(config.output_dir)
    scheduler = make_noise_scheduler(config)
    with accelerator.main_process_first():
        data, held_out = load_pixels(config)
    if config.score_features is not None:
        # A mistake in its name should not be noticed at the end of the run.
        get_extractor(config.score_features, config.resolution, data.channels)
    global_batch = config.train_batch_size * config.gradient_accumulation_steps * accelerator.num_processes
    epoch_steps = -(-len(data) // global_batch)
    total_steps = config.max_train_steps or config.num_epochs * epoch_steps
    torch.manual_seed(config.seed)
    training = TrainingState(config, accelerator, build_unet(config, data.channels, data.num_classes), total_steps)

    # 2. go on where an earlier run stopped
    record = config.public_dict() | {"global_batch_size": global_batch, "data_digest": data.digest()}
    record["unet"] = {name: value for name, value in training.unet.config.items() if not name.startswith("_")}
    record = json.loads(json.dumps(record))
    checkpoint = find_checkpoint_to_resume(config, record)
    start, pending = 0, []
    if checkpoint is not None:
        training.restore(checkpoint)
        start, pending = checkpoint.state["step"], checkpoint.state["pending_losses"]
    check_same_start(accelerator, start)
    hub_id = None
    if accelerator.is_main_process:
        # A repository that cannot be used is noticed now too, and not when the run is finished.
        hub_id = make_hub_repository(config)
        prepare_output_dir(config, resuming=checkpoint is not None)
        set_aside_newer(folder / CHECKPOINTS, start)
    accelerator.init_trackers("training", {k: v for k, v in record.items() if isinstance(v, (int, float, str))})
    log = RunLog(folder / METRICS_LOG, accelerator, config.logging_steps, global_batch, start, total_steps, pending)
    results = RunResults(config, training, scheduler, data, held_out, global_batch, hub_id)

    # 3. train
    batches = iter(_make_loader(config, data, accelerator, start, total_steps))
    training.unet.train()
    with closing(log), catch_interrupts() as signals, _advice_on_divergence(folder / CHECKPOINTS):
        for step in range(start + 1, total_steps + 1):
            loss, norm = _train_step(training, scheduler, data, batches, global_batch, step)
            log.add(step, loss, norm, training.learning_rate(step))
            stopping = step < total_steps and any_process(accelerator, bool(signals), step)
            if accelerator.is_main_process:
                if held_out is not None and (step % config.validation_steps == 0 or step == total_steps):
                    log.write({"step": step, "held_out_loss": results.held_out_loss()})
                if config.eval_steps is not None and step % config.eval_steps == 0:
                    log.write({"step": step, "fid": results.keep_if_best(step)})
                if step % (epoch_steps * config.save_images_epochs) == 0 and step < total_steps:
                    results.save_sample_grid(step)
                if step % (epoch_steps * config.save_model_epochs) == 0 and step < total_steps:
                    results.save_pipeline()
            if step % config.checkpointing_steps == 0 or step == total_steps or stopping:
                log.read(step, training.learning_rate(step))
                if accelerator.is_main_process:
                    training.check_finite(step)
                    state = {"step": step, "pending_losses": log.pending, "config": record}
                    parts = training.to_checkpoint(state)
                    save_checkpoint(folder / CHECKPOINTS, step, parts, config.checkpoints_total_limit)
                accelerator.wait_for_everyone()
            if stopping:
                signum = signals[0] if signals else signal.SIGTERM
                raise Interrupted(signum, f"stopped after step {step}; --resume_from_checkpoint latest goes on.")

    # 4. leave the results
    figures = results.finish(total_steps) if accelerator.is_main_process else {}
    accelerator.wait_for_everyone()
    return figures


@contextmanager
def _advice_on_divergence(checkpoints: Path) -> Iterator[None]:
    try:
        yield
    except NotFiniteError as error:
        # All checkpoints hold finite weights: those of a diverged step are not written.
        latest, _ = find_latest(checkpoints)
        advice = "Try a lower --learning_rate, more --lr_warmup_steps or --mixed_precision no"
        start = "from the start" if latest is None else f"from the last good checkpoint, {latest}"
        flag = "" if latest is None else " (--resume_from_checkpoint latest)"
        error.args = (f"{error} {advice}, {start}{flag}.",)
        raise


def _train_step(
    training: TrainingState,
    scheduler: DDPMScheduler,
    data: PixelDataset,
    batches: Iterator[dict[str, Tensor]],
    global_batch: int,
    step: int,
) -> tuple[Tensor, Tensor]:
    """One optimizer step. Returns the loss on this process and the norm of the gradient, on the device."""
    config, accelerator = training.config, training.accelerator
    shape = (global_batch, data.channels, data.resolution, data.resolution)
    draws = draw_step(config.seed, step, shape, scheduler.config.num_train_timesteps, accelerator.device)
    loss = torch.zeros((), device=accelerator.device)
    for micro in range(config.gradient_accumulation_steps):
        rows = _rows(config, accelerator, micro)
        part = draws.rows(slice(rows.start, rows.stop))
        images, labels = _prepare_batch(config, next(batches), part, data.num_classes, accelerator.device)
        if training.unet.config.dropout:
            torch.manual_seed(step_seed(config.seed, step, rows.start + 1))
        last = micro == config.gradient_accumulation_steps - 1
        with nullcontext() if last else accelerator.no_sync(training.model):
            part_loss = diffusion_loss(
                training.model, scheduler, images, part.noise, part.timesteps, labels, config.snr_gamma
            )
            accelerator.backward(part_loss / config.gradient_accumulation_steps)
        loss += part_loss.detach() / config.gradient_accumulation_steps
    return loss, training.update(step)


def _prepare_batch(
    config: TrainingConfig,
    batch: dict[str, Tensor],
    draws: StepDraws,
    num_classes: int | None,
    device: torch.device,
) -> tuple[Tensor, Tensor | None]:
    """Images in [-1, 1], flipped where asked for, and labels, of which some become "no class"."""
    images = to_unit_range(batch["images"].to(device, non_blocking=True))
    images = images.contiguous(memory_format=torch.channels_last)
    if config.random_flip:
        images = torch.where(draws.flips[:, None, None, None], images.flip(-1), images)
    if num_classes is None:
        return images, None
    labels = batch["labels"].to(device, non_blocking=True)
    return images, labels.masked_fill(draws.label_drops < config.label_dropout, num_classes)


def _rows(config: TrainingConfig, accelerator: Accelerator, micro: int) -> range:
    """The positions in the global batch that this process takes in its batch number `micro` of a step."""
    first = (micro * accelerator.num_processes + accelerator.process_index) * config.train_batch_size
    return range(first, first + config.train_batch_size)


def _make_loader(
    config: TrainingConfig, data: PixelDataset, accelerator: Accelerator, start: int, total_steps: int
) -> DataLoader:
    """Batches of this process from step `start` on."""
    micros = range(config.gradient_accumulation_steps)
    rows = [_rows(config, accelerator, micro) for micro in micros]
    global_batch = config.train_batch_size * len(rows) * accelerator.num_processes
    positions = (
        [step * global_batch + row for row in rows[micro]] for step in range(start, total_steps) for micro in micros
    )
    return DataLoader(
        EndlessShuffle(data, config.seed, config.center_crop),
        batch_sampler=positions,
        num_workers=config.dataloader_num_workers,
        collate_fn=_as_it_is,
        worker_init_fn=_leave_signals_to_the_main_process,
        pin_memory=accelerator.device.type == "cuda",
    )


def _leave_signals_to_the_main_process(worker: int) -> None:
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)


def _as_it_is(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return batch


def load_pixels(config: TrainingConfig) -> tuple[PixelDataset, PixelDataset | None]:
    """The training images of a run, and the held-out ones if there are any."""
    train_split, held_out_split = load_dataset_splits(
        config.dataset_name, config.dataset_config_name, config.train_data_dir, config.cache_dir
    )
    settings = {
        "image_column": config.image_column,
        "label_column": config.label_column,
        "with_labels": config.class_conditional,
        "on_bad_image": config.on_bad_image,
        "bits": 16 if config.preserve_input_precision else 8,
    }
    data = prepare_pixels(train_split, config.resolution, config.channels, **settings)
    held_out = None
    if held_out_split is not None and len(held_out_split):
        held_out = prepare_pixels(held_out_split, config.resolution, data.channels, **settings)
    return data, held_out


def make_noise_scheduler(config: TrainingConfig) -> DDPMScheduler:
    """The noise schedule of a run."""
    known: Sequence[str] = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")
    if config.ddpm_beta_schedule not in known:
        raise UsageError(
            f"unknown ddpm_beta_schedule '{config.ddpm_beta_schedule}'. Choose one of: {', '.join(known)}."
        )
    if config.rescale_betas_zero_snr and config.prediction_type == "epsilon":
        raise UsageError(
            "rescale_betas_zero_snr leaves no signal at the last timestep, where noise says nothing about the image: "
            "use it with --prediction_type v_prediction or sample."
        )
    return DDPMScheduler(
        num_train_timesteps=config.ddpm_num_steps,
        beta_schedule=config.ddpm_beta_schedule,
        prediction_type=config.prediction_type,
        rescale_betas_zero_snr=config.rescale_betas_zero_snr,
        # Without it sampling would not begin at the timestep that has no signal.
        timestep_spacing="trailing" if config.rescale_betas_zero_snr else "leading",
    )
