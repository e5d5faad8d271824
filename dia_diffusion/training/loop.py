"""The training loop."""

import json
import signal
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ..data.loading import describe_data, load_pixels
from ..data.pixels import PixelDataset
from ..errors import NotFiniteError
from ..files import replace_text
from ..latents.space import LatentSpace
from ..objectives import Objective, make_objective
from ..options.data import DataOptions
from ..options.training import CONFIG, TrainingConfig, as_yaml
from ..process.startup import Interrupted, catch_interrupts
from .accelerator import StopAgreement, check_same_start, make_accelerator
from .architecture import build_unet
from .batches import Batch, BatchPlan, make_loader, measure_std, prepare_batches
from .card import launch_command, make_hub_repository, push_run, write_model_card
from .checkpoint import CHECKPOINTS, find_latest, save_checkpoint
from .folder import check_output_dir, check_results, lock_output_dir, prepare_output_dir, set_aside_later_steps
from .log import METRICS_LOG, RunLog, start_trackers
from .results import RunResults
from .resuming import find_checkpoint, load_to_resume
from .state import TrainingState


def train(config: TrainingConfig) -> dict[str, Any]:
    """Trains a UNet as the configuration says, and leaves the pipeline and its record in `config.output.folder`.

    What is random about step k (order of images, crops, noise and its levels, flips, label dropout) depends on the
    seed, k and the position in the global batch alone. Dropout inside of the model depends on the seed, k and the
    position of the batch in the global batch: it is the same when a run is resumed, but not when the batches are
    divided otherwise.

    Returns:
        `dict`: what is in metrics.json: the final losses and, where asked for, the scores. Empty on processes other
        than the main one.

    Raises:
        UsageError: for a configuration that cannot work, data that cannot be read, or a loss that is not finite.
        Interrupted: after SIGTERM or Ctrl-C, when the step is finished and a checkpoint is written.
    """
    accelerator = make_accelerator(config.optimisation.mixed_precision, config.output)
    with lock_output_dir(config.output.folder) if accelerator.is_main_process else nullcontext():
        figures = _train(config, accelerator)
    # The process group must outlive the distributed model: when that is the last to hold it, its threads are waited for
    # with Python's lock held, which they may need to end.
    accelerator.free_memory()
    accelerator.end_training()
    return figures


def _train(config: TrainingConfig, accelerator: Accelerator) -> dict[str, Any]:
    # 1. set up
    optimisation, objective, output = config.optimisation, make_objective(config.objective), config.output
    folder, main, device, seed = output.folder, accelerator.is_main_process, accelerator.device, optimisation.seed
    with accelerator.main_process_first():
        data, held_out = load_pixels(config.data)
    accelerator.print(f"{describe_data(config.data, data, held_out)}\nDevice: {device}.")
    # What is tried here does not hang on the deviation of the images.
    check_results(output, objective.fitted(lambda: 1.0), data, held_out)
    space = None if config.data.vae is None else LatentSpace.load(config.data, data)
    (channels, resolution), factor = ((data.channels, data.resolution), None) if space is None else space.seen
    plan = BatchPlan(
        optimisation.train_batch_size,
        optimisation.gradient_accumulation_steps,
        accelerator.num_processes,
        accelerator.process_index,
    )
    epoch_steps = -(-len(data) // plan.images)
    total_steps = optimisation.max_train_steps or optimisation.num_epochs * epoch_steps
    torch.manual_seed(seed)
    unet = build_unet(config.model, resolution, channels, data.num_classes, objective.num_timesteps, factor)
    training = TrainingState(optimisation, accelerator, unet, total_steps)
    path = find_checkpoint(output, total_steps)
    if main:
        check_output_dir(output, path)
    if space is not None:
        accelerator.print(space.describe(len(data)))
        data, held_out = space.encode_all(data, held_out)
        accelerator.print(space.describe_scale(measure_std(data, most=1000)))
    objective = objective.fitted(partial(measure_std, data))
    config = replace(
        config, model=config.model.as_built(unet.config), objective=replace(config.objective, **asdict(objective))
    )
    accelerator.print(f"Objective: {objective.describe()}.")

    # 2. go on where an earlier run stopped
    record = config.public_dict() | {"global_batch_size": plan.images, "data_digest": data.pixels.digest()}
    record["vae_digest"] = None if space is None else space.digest
    record["unet"] = {name: value for name, value in unet.config.items() if not name.startswith("_")}
    record = json.loads(json.dumps(record))
    start, pending = 0, []
    if path is not None:
        checkpoint = load_to_resume(path, record, total_steps, _digest_without_labels(data.pixels, config.data))
        training.restore(checkpoint)
        start, pending = checkpoint.state["step"], checkpoint.state["pending_losses"]
    check_same_start(accelerator, start)
    if main:
        # A repository that cannot be used is noticed now too, and not when the run is finished.
        hub_id = make_hub_repository(output)
        prepare_output_dir(output, path)
        if space is not None:
            space.keep(folder)
        replace_text(folder / CONFIG, as_yaml(config))
        set_aside_later_steps(folder, start)
    start_trackers(accelerator, record)
    log = RunLog(folder / METRICS_LOG, accelerator, output.logging_steps, plan.images, start, total_steps, pending)
    results = RunResults(output, training, objective, data, held_out, seed, plan.per_process, space is not None)
    del space  # The VAE is not held while the UNet trains.
    stops = StopAgreement(accelerator)

    # 3. train
    steps = range(start + 1, total_steps + 1)
    loaded = iter(make_loader(config.data, data, plan, seed, steps, device))
    flip, drop = config.data.random_flip, config.objective.label_dropout
    batches = prepare_batches(loaded, data, plan, seed, steps, device, objective, flip, drop)
    training.unet.train()
    with closing(log), catch_interrupts() as signals, _advice_on_divergence(folder / CHECKPOINTS):
        for step in steps:
            loss = accumulate_gradients(training, objective, batches, plan.micro_batches)
            norm = training.update(step)
            log.add(step, loss, norm, training.learning_rate(step))
            last = step == total_steps
            stopping = stops.agreed(bool(signals), step) and not last
            due = results.due(step, epoch_steps, last)
            checkpointing = step % output.checkpointing_steps == 0 or last or stopping
            if due or checkpointing:
                # Nothing comes of a model that has diverged.
                log.read(step, training.learning_rate(step))
                if main:
                    training.check_finite(step)
            for leave in due if main else ():
                if figures := leave(step):
                    log.write({"step": step} | figures)
            if checkpointing:
                if main:
                    parts = training.to_checkpoint({"step": step, "pending_losses": log.pending, "config": record})
                    save_checkpoint(folder / CHECKPOINTS, step, parts, output.checkpoints_total_limit)
                accelerator.wait_for_everyone()
            if stopping:
                signum = signals[0] if signals else signal.SIGTERM
                raise Interrupted(signum, f"stopped after step {step}; --resume_from_checkpoint latest goes on.")

    # 4. leave the results
    figures = {}
    if main:
        figures = results.finish(total_steps, plan.images)
        command, start_from = launch_command(output.hub_token), config.model.init_from
        names = data.pixels.class_names
        said = (config.data, start_from, output.license, hub_id, names, objective.describe())
        write_model_card(folder, unet, figures, command, *said)
        if hub_id is not None:
            push_run(output, hub_id)
    accelerator.wait_for_everyone()
    return figures


def _digest_without_labels(data: PixelDataset, options: DataOptions) -> str | None:
    """As a version knew the data that numbered folders in the order of their names as text, 10 before 2."""
    names = data.class_names or []
    renumbered = sorted(names) != names and all(map(str.isdecimal, names))
    in_folders = Path(options.dataset_name or options.train_data_dir).is_dir()
    return None if renumbered and in_folders else data.digest(with_labels=False)


def accumulate_gradients(
    training: TrainingState, objective: Objective, batches: Iterator[Batch], micro_batches: int
) -> Tensor:
    """Accumulate the gradient of a step from its next `micro_batches` batches. Return this process's loss, on the
    device."""
    accelerator = training.accelerator
    loss = torch.zeros((), device=accelerator.device)
    for micro in range(micro_batches):
        batch = next(batches)
        if training.unet.config.dropout:
            torch.manual_seed(batch.seed)
        with nullcontext() if micro == micro_batches - 1 else accelerator.no_sync(training.model):
            part = objective.loss(training.model, batch.images, batch.noise, batch.levels, batch.labels)
            accelerator.backward(part / micro_batches)
        loss += part.detach() / micro_batches
    return loss


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
