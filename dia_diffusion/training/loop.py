"""The training of a model, from top to bottom: set up, resume, train, leave the results."""

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

from ..data.loading import load_pixels
from ..data.pixels import PixelDataset
from ..errors import NotFiniteError
from ..files import replace_text
from ..latents.space import LatentSpace, PixelSpace, make_space, measure_std
from ..models.unet import DIAUNet2DModel
from ..objectives import Objective, make_objective
from ..options.training import CONFIG, TrainingConfig, as_yaml
from ..process.signals import Interrupted, catch_interrupts
from .accelerator import StopAgreement, check_same_start, open_accelerator
from .architecture import build_unet
from .batches import Batch, BatchPlan, make_loader, prepare_batches, running
from .card import check_card, make_hub_repository, push_run, write_model_card
from .checkpoint import CHECKPOINTS, find_latest, save_checkpoint
from .folder import check_output_dir, lock_output_dir, prepare_output_dir, set_aside_later_steps
from .log import METRICS_LOG, RunLog, start_trackers
from .results import RunResults, check_results
from .resuming import digest_without_labels, find_checkpoint, load_to_resume
from .run import Run
from .state import TrainingState


def train(config: TrainingConfig) -> dict[str, Any]:
    """Train a UNet, and leave the pipeline and its record in `config.output.folder`.

    The random numbers of step k (order of images, crops, noise, noise levels, flips, label dropout) depend on the seed,
    k and the position in the global batch alone. Dropout inside of the model depends on the seed, k and the position of
    the micro-batch: it is the same when a run is resumed, but not when its batches are divided otherwise.

    Returns:
        `dict`: the content of metrics.json: the final losses and, where asked for, the scores. Empty on processes other
        than the main one.

    Raises:
        UsageError: for a configuration that cannot work, data that cannot be read, or a loss that is not finite.
        Interrupted: after a signal such as SIGTERM or Ctrl-C, when the step is finished and a checkpoint is written.
    """
    with (
        open_accelerator(str(config.optimisation.mixed_precision), config.output) as accelerator,
        lock_output_dir(config.output.folder) if accelerator.is_main_process else nullcontext(),
    ):
        return _train(config, accelerator)


def _train(config: TrainingConfig, accelerator: Accelerator) -> dict[str, Any]:
    run = set_up(config, accelerator)
    resume(run)
    accelerator.print(run.explain())
    train_steps(run)
    return leave_results(run)


def set_up(config: TrainingConfig, accelerator: Accelerator) -> Run:
    """Load the data, build the model and its optimizer, and encode the images; refuse what cannot work."""
    optimisation, objective, output = config.optimisation, make_objective(config.objective), config.output
    with accelerator.main_process_first():
        pixels, held_out_pixels = load_pixels(config.data)
    space, unet = make_model(config, pixels, held_out_pixels)
    plan = BatchPlan(
        optimisation.train_batch_size,
        int(optimisation.gradient_accumulation_steps or 1),
        accelerator.num_processes,
        accelerator.process_index,
    )
    total_steps = optimisation.max_train_steps or optimisation.num_epochs * -(-len(pixels) // plan.images)
    training = TrainingState(optimisation, accelerator, unet, total_steps)
    checkpoint = find_checkpoint(output, total_steps)
    if accelerator.is_main_process:
        check_output_dir(output, checkpoint)
    data, held_out = space.encode_all(pixels, held_out_pixels)
    objective = objective.fitted(partial(measure_std, data))
    config = replace(
        config, model=config.model.as_built(unet.config), objective=replace(config.objective, **asdict(objective))
    )
    record = config.public_dict() | {"global_batch_size": plan.images, "data_digest": pixels.digest()}
    record["vae_digest"] = space.digest
    record["unet"] = {name: value for name, value in unet.config.items() if not name.startswith("_")}
    results = RunResults(output, training, objective, space, data, held_out, optimisation.seed, plan.per_process)
    return Run(
        config,
        json.loads(json.dumps(record)),
        accelerator,
        data,
        held_out,
        objective,
        plan,
        training,
        results,
        total_steps,
        checkpoint,
    )


def make_model(
    config: TrainingConfig, pixels: PixelDataset, held_out: PixelDataset | None
) -> tuple[PixelSpace | LatentSpace, DIAUNet2DModel]:
    """Return the space of a run and its UNet at the start; refuse what does not fit its images or its results."""
    objective, space = make_objective(config.objective), make_space(config.data, pixels)
    # The standard deviation of the images makes no difference to what is tried here.
    check_results(config.output, objective.fitted(lambda: 1.0), pixels, held_out)
    torch.manual_seed(config.optimisation.seed)
    channels, size = space.shape
    classes, timesteps, factor = pixels.num_classes, objective.num_timesteps, space.latent_factor
    return space, build_unet(config.model, size, channels, classes, timesteps, factor)


def resume(run: Run) -> None:
    """Load the checkpoint that the run goes on from, if there is one, and prepare the output directory."""
    output, accelerator, folder = run.config.output, run.accelerator, run.config.output.folder
    if run.checkpoint is not None:
        pixels_before_labels = digest_without_labels(run.data.pixels, run.config.data)
        checkpoint = load_to_resume(run.checkpoint, run.record, run.total_steps, pixels_before_labels)
        run.training.restore(checkpoint)
        run.start, run.pending_losses = checkpoint.state["step"], checkpoint.state["pending_losses"]
    check_same_start(accelerator, run.start)
    if accelerator.is_main_process:
        # A repository or a card that the Hub refuses is noticed now, and not when the run is finished.
        check_card(run.config)
        run.hub_id = make_hub_repository(output)
        prepare_output_dir(output, run.checkpoint)
        replace_text(folder / CONFIG, as_yaml(run.config))
        set_aside_later_steps(folder, run.start)
    run.results.space.keep_decoder(folder)
    start_trackers(accelerator, run.record)


def train_steps(run: Run) -> None:
    """Train to the last step; measure, show and save on the way.

    Raises:
        NotFiniteError: if the run diverges.
        Interrupted: after a signal.
    """
    config, training, accelerator, plan, last_step = (
        run.config,
        run.training,
        run.accelerator,
        run.plan,
        run.total_steps,
    )
    output, device, seed = config.output, accelerator.device, config.optimisation.seed
    checkpoints, steps = output.folder / CHECKPOINTS, range(run.start + 1, last_step + 1)
    log = RunLog(
        output.folder / METRICS_LOG, accelerator, output.logging_steps, plan.images, run.start, last_step,
        run.pending_losses,
    )  # fmt: skip
    stops, loader = StopAgreement(accelerator), make_loader(config.data, run.data, plan, seed, steps, device)
    training.unet.train()
    with closing(log), running(loader) as loaded, catch_interrupts() as signals, _advice_on_divergence(checkpoints):
        flip, drop = config.data.random_flip, config.objective.label_dropout
        batches = prepare_batches(loaded, run.data, plan, seed, steps, device, run.objective, flip, drop)
        for step in steps:
            with training.compiling(first=step == steps.start):
                loss = accumulate_gradients(training, run.objective, batches, plan.micro_batches)
            norm = training.update(step)
            log.add(step, loss, norm, training.learning_rate(step))
            last = step == last_step
            stopping = stops.agreed(bool(signals), step) and not last
            due = run.results.due(step, run.epoch_steps, last)
            checkpointing = step % output.checkpointing_steps == 0 or last or stopping
            if due or checkpointing:
                # A model that has diverged is neither measured nor saved.
                log.read(step, training.learning_rate(step))
                if accelerator.is_main_process:
                    training.check_finite(step)
            for leave in due if accelerator.is_main_process else ():
                if figures := leave(step):
                    log.write({"step": step} | figures)
            if checkpointing:
                if accelerator.is_main_process:
                    state = {"step": step, "pending_losses": log.pending, "config": run.record}
                    save_checkpoint(checkpoints, step, training.to_checkpoint(state), output.checkpoints_total_limit)
                accelerator.wait_for_everyone()
            if stopping:
                signum = signals[0] if signals else signal.SIGTERM
                raise Interrupted(signum, f"stopped after step {step}; --resume_from_checkpoint latest goes on.")


def leave_results(run: Run) -> dict[str, Any]:
    """Save the pipeline, its figures and its card, and push them if asked for. Return the figures."""
    figures: dict[str, Any] = {}
    if run.accelerator.is_main_process:
        figures = run.results.finish(run.total_steps, run.plan.images, run.facts())
        write_model_card(
            run.config, run.training.unet, figures, run.objective.describe(), run.data.pixels.class_names, run.hub_id,
            run.accelerator.num_processes,
        )  # fmt: skip
        if run.hub_id is not None:
            push_run(run.config.output, run.hub_id)
    run.accelerator.wait_for_everyone()
    return figures


def accumulate_gradients(
    training: TrainingState, objective: Objective, batches: Iterator[Batch], micro_batches: int
) -> Tensor:
    """Add up the gradients of a step's micro-batches. Return the mean loss of this process, on the device."""
    accelerator = training.accelerator
    loss = torch.zeros((), device=accelerator.device)
    for micro_batch in range(micro_batches):
        batch = next(batches)
        if training.unet.config.dropout:
            torch.manual_seed(batch.seed)
        # Processes exchange gradients once a step, after its last micro-batch.
        with nullcontext() if micro_batch == micro_batches - 1 else accelerator.no_sync(training.model):
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
