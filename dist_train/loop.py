"""The training loop.

In short::

    while clips_seen < total_clips:
        for phase in phases that run at this step:
            for micro_batch in the rank's share of the global batch:
                loss = sum(task.losses(phase, micro_batch)) / micro_batches      # or by the clips that count
                strategy.backward(phase, loss)       # gradients are exchanged as they become ready
            strategy.finish(phase)                   # now they are the mean over the ranks
            strategy.optimizer_step(phase)
        clips_seen += batch_clips                    # the whole state of the loader and of the schedules
        every so often: log, evaluate, save

Everything random in a step is seeded by (seed, step, rank), everything scheduled is a function of `clips_seen`: a run
that continues from a checkpoint needs nothing else to do what the undisturbed run would have done.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from dist_train import checkpoint as checkpoints
from dist_train.accounts import Accounts
from dist_train.batch_norm import set_training, statistics_anew
from dist_train.ema import WeightAverage
from dist_train.evaluation import evaluate
from dist_train.gradient_noise import GradientNoise
from dist_train.ledger import rows
from dist_train.optimizers import set_learning_rate
from dist_train.phases import Batch, Phase, Prediction
from dist_train.run import Outcome, Run, step_seed, steps_left
from dist_train.schedules import learning_rate_factor
from dist_train.strategies.base import BufferAverage

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Progress:
    """Where the run stands."""

    step: int = 0
    clips_seen: int = 0


def train(run: Run, start: checkpoints.Checkpoint | None = None) -> Outcome:
    """Trains from the beginning or from `start` until the last clip or an agreed stop."""
    return _Loop(run, start).run()


class _Loop:
    """The state that `train` carries from step to step."""

    def __init__(self, run: Run, start: checkpoints.Checkpoint | None) -> None:
        self.run_, self.config, self.world = run, run.training, run.collectives.world
        self.progress = Progress()
        self.accounts = Accounts(run.collectives, run.ledger)
        self.noise = GradientNoise(
            run.task.phases,
            run.collectives,
            every_steps=self.config.noise_scale_every_steps if run.strategy.averages_gradients else 0,
            batch_clips=self.config.batch_clips,
            micro_batches=self.config.micro_batches,
        )
        self.phases = run.strategy.prepare(run.task.phases)
        self.buffers = BufferAverage(run.task.phases, run.collectives)
        half_life = self.config.ema_half_life_clips
        self.averages = {
            phase.name: WeightAverage(run.strategy.weights(phase), half_life_clips=half_life)
            for phase in {id(phase.module): phase for phase in reversed(run.task.phases)}.values()
            if half_life > 0
        }  # one of each module, under its first phase
        if start is not None:
            self._restore(start)
        self.autocast = _autocast(self.config.precision, self.world.device)
        self.clips_per_epoch = run.loader.num_samples
        self.total_clips = self.progress.clips_seen + self.config.batch_clips * steps_left(
            num_samples=self.clips_per_epoch,
            epochs=self.config.epochs,
            batch_clips=self.config.batch_clips,
            clips_seen=self.progress.clips_seen,
        )
        self.losses: list[dict[str, torch.Tensor]] = []
        self.counted = 0.0  # the step's sum of weights on this rank
        self.logged_at = (time.perf_counter(), self.progress.clips_seen)
        self.activity = run.collectives.watch.activity
        self.activity.loader = getattr(run.loader, "doing", None)

    def run(self) -> Outcome:
        run, progress = self.run_, self.progress
        for phase in self.phases:
            set_training(phase.module, self.config.batch_norm)
        batches = run.loader.batches(progress.clips_seen, self.total_clips)
        evaluation: dict[str, float] | None = None
        predictions: list[Prediction] = []
        run.ledger.training_begins()
        stopped = False
        while progress.clips_seen < self.total_clips and not stopped:
            self._step(batches)
            run.ledger.close_span("step", step=progress.step, clips_seen=progress.clips_seen)
            run.on_step(progress.step)
            last = progress.clips_seen >= self.total_clips
            saving = last or self._crossed(run.checkpoint.every_epochs)
            if saving or progress.step % self.config.log_every_steps == 0:  # a diverged model is never saved
                stopped = self._log() and not last
            if last or self._crossed(self.config.evaluate_every_epochs):
                evaluation, predictions = self._evaluate()
            if saving or stopped:
                self._save()
        self.accounts.close()
        self.noise.close()
        return Outcome(
            step=progress.step,
            clips_seen=progress.clips_seen,
            stopped=stopped,
            evaluation=evaluation,
            predictions=predictions,
        )

    # -- one step ----------------------------------------------------------------------------------------------

    def _step(self, batches: Iterator[Batch]) -> None:
        run, config, ledger, step = self.run_, self.config, self.run_.ledger, self.progress.step
        self.activity.step = step
        _seed_generators(step_seed(config.seed, step, self.world.rank), self.world.device)
        run.strategy.step_begins(self.progress.clips_seen / self.clips_per_epoch)
        self.counted = 0.0
        micro_batches = [self._next_batch(batches) for _ in range(config.micro_batches)]
        counted = self._counted_by_all()
        factor = learning_rate_factor(
            run.schedule,
            clips_seen=self.progress.clips_seen,
            clips_per_epoch=self.clips_per_epoch,
            total_clips=self.total_clips,
            start_factor=run.warmup_start_factor,
        )
        losses: dict[str, torch.Tensor] = {}
        for phase in self.phases:
            if step % phase.interval:
                continue
            self.activity.phase = phase.name
            set_learning_rate(phase.optimizer, factor)
            phase.optimizer.zero_grad(set_to_none=True)
            whole = counted is None or counted == config.batch_clips
            self.noise.begins(phase, step, exchanges=run.strategy.exchanges and whole)
            for number, batch in enumerate(micro_batches, start=1):
                parts = config.micro_batches if counted is None else counted / (len(batch) * self.world.world_size)
                self._accumulate(phase, batch, losses, parts=parts, last=number == len(micro_batches))
                self.noise.micro_batch_done()
            with ledger.row(rows.BACKWARD):
                run.strategy.finish(phase)
            self.buffers.finish()
            with ledger.row(rows.OPTIMIZER):
                self.noise.ends(phase)
                if config.clip_gradient_norm > 0:
                    run.strategy.clip_gradients(phase, config.clip_gradient_norm)
                run.strategy.optimizer_step(phase)
        self.activity.phase = ""
        with ledger.row(rows.OPTIMIZER):
            for average in self.averages.values():
                average.update(config.batch_clips)
            if run.strategy.step_ends():
                self._average_the_rest()
        self.losses.append(losses)
        self.progress.step += 1
        self.progress.clips_seen += config.batch_clips

    def _counted_by_all(self) -> float | None:
        """The sum of the step's weights over the ranks; None where every clip counts, infinite where none does."""
        if not self.run_.weighted:
            return None
        return float(self.run_.collectives.sum_(torch.tensor([self.counted], dtype=torch.float64))) or math.inf

    def _accumulate(
        self, phase: Phase, batch: Batch, losses: dict[str, torch.Tensor], *, parts: float, last: bool
    ) -> None:
        """Forward and backward of one micro-batch, one of `parts` in size; adds its share to `losses`."""
        run, ledger = self.run_, self.run_.ledger
        with run.strategy.micro_batch(phase, synchronize=last):
            with ledger.row(rows.FORWARD), self.autocast():
                found = run.task.losses(phase, batch)
                loss = torch.stack(list(found.values())).sum() / parts
            if last and run.strategy.exchanges and self.config.batch_norm in ("local", "ghost", "partial"):
                self.buffers.start()
            with ledger.row(rows.BACKWARD):
                run.strategy.backward(phase, loss)
        prefix = f"{phase.name}/" if len(self.phases) > 1 else ""
        for key, value in found.items():
            name = prefix + key
            share = value.detach() / parts
            losses[name] = losses[name] + share if name in losses else share

    def _next_batch(self, batches: Iterator[Batch]) -> Batch:
        run, ledger = self.run_, self.run_.ledger
        with ledger.row(rows.LOADER_WAIT):
            batch = next(batches)
        self.counted += float(batch.weights.sum()) if run.weighted else 0.0
        costs = dict(batch.costs)
        own = {row: costs.get(f"{row}_seconds", 0.0) for row in (rows.READ, rows.DECODE, rows.AUGMENT)}
        if costs.get("worker", -1) < 0:  # the rank read this batch by itself, just now
            ledger.split_row(rows.LOADER_WAIT, own)
        else:
            ledger.add_worker_costs(
                {**own, "wall": costs.get("wall_seconds", 0.0), "idle": costs.get("idle_seconds", 0.0)}
            )
        counts = {name: costs.get(name, 0) for name in ("frames_decoded", "frames_used")}
        counts |= {name: value for name, value in costs.items() if rows.TIER_COST.fullmatch(name) and value}
        ledger.add_worker_costs({**counts, "skipped": len(batch.skipped)})
        ledger.add_bytes(rows.READ, int(costs.get("read_bytes", 0)))
        ledger.add_bytes(rows.DECODE, int(costs.get("decoded_bytes", 0)))
        if batch.skipped:
            logger.warning("step %d: skipped %s", self.progress.step, "; ".join(batch.skipped))
        with ledger.row(rows.HOST_TO_DEVICE):
            moved = batch.to(self.world.device, non_blocking=True)
        ledger.add_bytes(rows.HOST_TO_DEVICE, batch.num_bytes)
        if run.journal is not None:
            with ledger.row(rows.LOGGING):
                used = batch.weights > 0 if run.weighted else slice(None)  # what was skipped has not been trained on
                run.journal.add(
                    step=self.progress.step,
                    positions=batch.positions[used].tolist(),
                    samples=batch.sample_ids[used].tolist(),
                )
        return moved

    # -- between steps -----------------------------------------------------------------------------------------

    def _log(self) -> bool:
        """Writes metrics and ledger since the last log; True when any rank was asked to stop."""
        run, ledger, progress = self.run_, self.run_.ledger, self.progress
        spans = ledger.flush(run.collectives)
        with ledger.row(rows.LOGGING, absorb=True):
            losses = self._mean_losses()
            now, before = time.perf_counter(), self.logged_at
            self.logged_at = (now, progress.clips_seen)
            metrics = {
                **self._place(),
                "loss": sum(losses.values()),
                "losses": losses,
                "learning_rate": float(self.phases[0].optimizer.param_groups[0]["lr"]),
                "clips_per_second": (progress.clips_seen - before[1]) / max(now - before[0], 1e-9),
                "ledger": _seconds_a_step(spans),
                **self.accounts.at_log(spans),
            }
            if noise := self.noise.at_log():
                metrics["noise_scale"] = {name: scale.figures() for name, scale in noise.items()}
            if figures := run.strategy.figures():
                metrics["exchange"] = figures
            self._send(metrics)
            if not math.isfinite(metrics["loss"]):
                raise RuntimeError(
                    f"the loss is {metrics['loss']} at step {progress.step} (losses: {losses}): training diverged; "
                    "lower optimizer.base_learning_rate or lengthen schedule.warmup_epochs, then --resume from the "
                    "last checkpoint"
                )
            return run.collectives.any(run.stop_requested(), name="stop requested")

    def _mean_losses(self) -> dict[str, float]:
        """Means over the steps since the last log and over the ranks: the one place that waits for the device."""
        names = sorted({name for step in self.losses for name in step})
        if not names:  # no phase's turn came since the last log
            return {}
        means = torch.stack([torch.stack([step[n] for step in self.losses if n in step]).mean() for n in names])
        means = self.run_.collectives.sum_(means.float(), name="losses") / self.world.world_size
        self.losses = []
        return dict(zip(names, means.tolist(), strict=True))

    def _evaluate(self) -> tuple[dict[str, float], list[Prediction]]:
        run, ledger = self.run_, self.run_.ledger
        self._settle()
        with ledger.row(rows.EVALUATION, absorb=True):
            self.activity.loader = getattr(run.evaluation_loader, "doing", None)
            with ExitStack() as averaged:
                for average in self.averages.values():
                    averaged.enter_context(average.in_place())
                self._take_statistics_anew()
                averaged.enter_context(run.strategy.evaluating(run.task.phases))
                summary, predictions = evaluate(
                    run.task,
                    run.evaluation_loader.evaluation_batches(),
                    collectives=run.collectives,
                    autocast=self.autocast,
                    on_batch=run.on_evaluation_batch,
                )
            self.activity.loader = getattr(run.loader, "doing", None)
            self._send({**self._place(), "evaluation": {"split": run.evaluation_split, **summary}})
        ledger.close_span("evaluation", step=self.progress.step, clips_seen=self.progress.clips_seen)
        self.logged_at = (time.perf_counter(), self.progress.clips_seen)
        return summary, predictions

    @torch.no_grad()
    def _take_statistics_anew(self) -> None:
        """Precise batch norm, on the clips that come next in the stream: a function of where the run stands."""
        config, loader = self.config, self.run_.statistics_loader
        if loader is None or config.precise_batch_norm_clips == 0:
            return
        start = self.progress.clips_seen
        stop = start + math.ceil(config.precise_batch_norm_clips / config.batch_clips) * config.batch_clips
        with ExitStack() as taken:
            phases = {id(phase.module): phase for phase in self.phases if not phase.double_backward}.values()
            for phase in phases:
                taken.enter_context(statistics_anew(phase.module, self.run_.collectives))
            for batch in loader.batches(start, stop):
                moved = batch.to(self.world.device, non_blocking=True)
                for phase in phases:
                    with self.autocast():
                        self.run_.task.losses(phase, moved)

    def _save(self) -> None:
        run, ledger, progress = self.run_, self.run_.ledger, self.progress
        self._settle()
        with ledger.row(rows.CHECKPOINT, absorb=True):
            if run.journal is not None:
                run.journal.sync()  # what a checkpoint covers is on record before the checkpoint is
            run.collectives.barrier(name="checkpoint")
            checkpoints.save_checkpoint(
                run.run_dir,
                step=progress.step,
                clips_seen=progress.clips_seen,
                state=self._state(),
                meta={**run.checkpoint_meta, "attempt": run.attempt},
                collectives=run.collectives,
                keep=run.checkpoint.keep,
            )
        ledger.close_span("checkpoint", step=progress.step, clips_seen=progress.clips_seen)
        self.logged_at = (time.perf_counter(), progress.clips_seen)

    def _state(self) -> dict[str, Any]:
        strategy, phases = self.run_.strategy, self.run_.task.phases
        averages = [(phase, self.averages[phase.name]) for phase in phases if phase.name in self.averages]
        return {
            **strategy.state(phases),
            "averages": {phase.name: strategy.whole(phase, average.state_dict()) for phase, average in averages},
        }

    def _restore(self, start: checkpoints.Checkpoint) -> None:
        strategy, saved = self.run_.strategy, start.state["averages"]
        strategy.load_state(self.run_.task.phases, start.state)
        for phase in self.run_.task.phases:
            if phase.name not in self.averages:
                continue
            if phase.name not in saved:
                raise ValueError(f"{start.path} holds no weight averages: resume with --training.ema-half-life-clips 0")
            self.averages[phase.name].load_state_dict(strategy.parts(phase, saved[phase.name]))
        self.progress = Progress(step=start.step, clips_seen=start.clips_seen)

    def _settle(self) -> None:
        """All copies are equal after this: what is evaluated and saved is what all ranks have."""
        with self.run_.ledger.row(rows.OPTIMIZER):
            if self.run_.strategy.settle():
                self._average_the_rest()

    def _average_the_rest(self) -> None:
        """Averages over the ranks what went apart with the parameters: running statistics and weight averages."""
        self.buffers.start()
        self.buffers.finish()
        for average in self.averages.values():
            for tensor in average.averages.values():
                self.run_.collectives.sum_(tensor).div_(self.world.world_size)

    def _place(self) -> dict[str, Any]:
        progress = self.progress
        return {
            "step": progress.step,
            "clips_seen": progress.clips_seen,
            "epoch": progress.clips_seen / self.clips_per_epoch,
            "attempt": self.run_.attempt,
        }

    def _send(self, metrics: Mapping[str, Any]) -> None:
        if self.world.is_first:
            for monitor in self.run_.monitors:
                monitor.log(metrics)

    def _crossed(self, every_epochs: float) -> bool:
        """True when the last step completed another `every_epochs` epochs."""
        if every_epochs <= 0:
            return False
        interval = every_epochs * self.clips_per_epoch
        after = self.progress.clips_seen
        return int(after / interval) > int((after - self.config.batch_clips) / interval)


def _seed_generators(seed: int, device: torch.device) -> None:
    """`torch.manual_seed` of the generators in use: the whole of it asks every accelerator, 80 us a step."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def _seconds_a_step(spans: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds of each row per step, over the steps in `spans`."""
    steps = [span for span in spans if span["name"] == "step"]
    names = {row for span in steps for row in span["seconds"]}
    return {row: sum(span["seconds"].get(row, 0.0) for span in steps) / len(steps) for row in sorted(names)}


def _autocast(precision: str, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    wanted = precision == "bfloat16"
    if precision == "auto":
        wanted = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if not wanted:
        return nullcontext
    return lambda: torch.autocast(device.type, dtype=torch.bfloat16)
