"""Makes run folders like those that a training run leaves, from numbers: any world size, straggler, kill or resume."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

CLASSES = (
    "move left",
    "move right",
    "move up",
    "move down",
    "turn clockwise",
    "turn counter-clockwise",
    "grow",
    "shrink",
    "appear",
    "vanish",
)


LOG_EVERY = 20


@dataclass(frozen=True, kw_only=True)
class SyntheticRun:
    """What the run folder shows."""

    world_size: int = 2
    num_steps: int = 240
    batch_clips: int = 64
    seed: int = 0
    compute: float = 0.12
    """Seconds of forward, backward and optimizer in a step."""
    loader_wait: float = 0.01
    wire: float = 0.012
    straggler: int | None = None
    """A rank that needs `straggler_seconds` more a step in the loader; the others wait for it."""
    straggler_seconds: float = 0.08
    num_workers: int = 2
    num_buckets: int = 4
    attempts: int = 1
    """Starts of the run; all but the last are killed in the middle of a line."""
    killed: bool = False
    """The last attempt leaves no end line, no test evaluation, no predictions."""
    evaluations: int = 8
    accuracy: float = 0.93
    classes: tuple[str, ...] = CLASSES
    num_samples: int = 200
    experiment: str = "motion_tsm"
    model: str = "tsm_resnet18"


def make_run(folder: Path, run: SyntheticRun | None = None) -> Path:
    """Writes config.json, ledger/, metrics.jsonl and predictions.json into `folder` and returns it."""
    run = run or SyntheticRun()
    folder.mkdir(parents=True)
    _write_config(folder, run)
    for rank in range(run.world_size):
        _write_ledger(folder, run, rank)
    _write_metrics(folder, run)
    if not run.killed and run.evaluations:
        _write_predictions(folder, run)
    return folder


def _write_config(folder: Path, run: SyntheticRun) -> None:
    config = {
        "experiment": run.experiment,
        "config": {
            "data": {"root": "data/motion/packed", "clip": {"num_segments": 8}},
            "model": {"name": run.model},
            "training": {
                "batch_clips": run.batch_clips,
                "micro_batches": 1,
                "epochs": 20.0,
                "precision": "float32",
            },
            "exchange": {"strategy": "allreduce"},
        },
        "versions": {"reelscale": "0.1.0", "torch": "2.13.0+cpu", "python": "3.11.9"},
        "git_revision": "3f9c1e0b7a52",
        "world": {"world_size": run.world_size, "num_nodes": 1, "device": "cpu", "launcher": "local"},
        "num_parameters": 11_181_642,
        "run_id": "k3v9q2xw",
    }
    (folder / "config.json").write_text(json.dumps(config))


def _write_ledger(folder: Path, run: SyntheticRun, rank: int) -> None:
    path = folder / "ledger" / f"rank_{rank:05d}.jsonl"
    path.parent.mkdir(exist_ok=True)
    text = ""
    border = [round(index * run.num_steps / run.attempts) for index in range(run.attempts + 1)]
    for attempt in range(run.attempts):
        lines = _attempt_lines(run, rank, attempt, border[attempt] + 1, border[attempt + 1])
        if attempt < run.attempts - 1 or run.killed:
            lines = lines[:-1]
            text += "".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "span", "name": "st\n'
        else:
            text += "".join(json.dumps(line) + "\n" for line in lines)
    path.write_text(text)


def _attempt_lines(run: SyntheticRun, rank: int, attempt: int, first: int, last: int) -> list[dict]:
    random = np.random.default_rng([run.seed, rank, attempt])
    jitter = np.random.default_rng([run.seed, attempt])  # shared: what one rank pays, the others wait for
    start = {
        "kind": "start",
        "attempt": attempt,
        "rank": rank,
        "world_size": run.world_size,
        "local_rank": rank % 8,
        "node_rank": rank // 8,
        "host": f"n{rank // 8 + 1}",
        "pid": 4000 + rank,
        "device": "cpu",
        "started_unix": 1_790_000_000.0 + 600 * attempt,
        "launcher": "local",
    }
    lines, clock = [start], 0.0

    def span(name: str, step: int, seconds: dict[str, float], **more: dict[str, float]) -> None:
        nonlocal clock
        seconds = {row: round(float(value), 6) for row, value in seconds.items() if value}
        wall = round(sum(seconds.values()), 6)
        clock += wall
        place = {"step": step, "clips_seen": max(step, 0) * run.batch_clips, "end_seconds": round(clock, 6)}
        lines.append({"kind": "span", "name": name, **place, "wall_seconds": wall, "seconds": seconds, **more})

    span("startup", 0, {"startup": 3.1 + 0.1 * random.random(), "remainder": 0.01})
    every = max(run.num_steps // run.evaluations, 1) if run.evaluations else 0
    for step in range(first, last + 1):
        slack = 0.006 * jitter.random(run.world_size)  # how much later each rank is
        if run.straggler is not None:
            slack[run.straggler] += run.straggler_seconds * (0.6 + 0.8 * jitter.random())
        cold = 1.2 if step == first else 0.0
        compute = run.compute * (0.96 + 0.08 * random.random())
        seconds = {
            "loader_wait": run.loader_wait * (0.5 + random.random()) + slack[rank] + cold,
            "host_to_device": 0.003 + 0.001 * random.random(),
            "forward": 0.36 * compute,
            "backward": 0.58 * compute,
            "optimizer": 0.06 * compute,
            "wire": run.wire * (0.8 + 0.4 * random.random()) if run.world_size > 1 else 0.0,
            "wait_for_peer": float(slack.max() - slack[rank]),
            "logging": 0.002 if step % 10 == 0 else 0.0,
            "remainder": 0.0006,
        }
        clips = run.batch_clips / run.world_size
        moved = {
            "read": int(clips * 41_000 * (0.9 + 0.2 * random.random())),
            "decode": int(clips * 11 * 128 * 128 * 3),
            "host_to_device": int(clips * 8 * 112 * 112 * 3),
            "wire": 44_726_568 if run.world_size > 1 else 0,
        }
        wall = run.num_workers * sum(seconds.values())
        workers = {
            "wall": wall,
            "read": 0.02 * wall,
            "decode": 0.45 * wall,
            "augment": 0.21 * wall,
            "idle": 0.32 * wall,
        }
        workers |= {"frames_decoded": clips * 11.4, "frames_used": clips * 8, "skipped": float(step % 97 == 0)}
        extra = {"bytes": {name: size for name, size in moved.items() if size}}
        span("step", step, seconds, **extra, **({"workers": workers} if run.num_workers else {}))
        if every and step % every == 0:
            span("evaluation", step, {"evaluation": 1.1 + 0.1 * random.random()})
            span("checkpoint", step, {"checkpoint": 0.22 + 0.05 * random.random()})
        if run.world_size > 1 and (step % LOG_EVERY == 0 or step == last):
            place = {"step": step, "end_seconds": round(clock, 6)}
            lines += [{**line, **place} for line in _communication_lines(run, rank, (step - first) % LOG_EVERY + 1)]
    span("shutdown", -1, {"logging": 0.05, "remainder": 0.004})
    lines.append({"kind": "end", "wall_seconds": round(clock + 0.0002, 6), "exit": "ok"})
    return lines


def _communication_lines(run: SyntheticRun, rank: int, num_steps: int) -> list[dict]:
    """The `collectives` and `host` lines of an interval: buckets that take as long as `wire` says."""
    late = run.straggler_seconds if run.straggler == rank else 0.0
    early = 0.0 if run.straggler in (None, rank) else run.straggler_seconds
    entries = {}
    for number in range(run.num_buckets):
        wire = num_steps * run.wire / run.num_buckets
        size = num_steps * 44_726_568 // run.num_buckets
        entries[f"classify bucket {number}"] = {
            "op": "all_reduce",
            "row": "backward",
            "ranks": run.world_size,
            "count": num_steps,
            "bytes": size,
            "sent": int(2 * (run.world_size - 1) / run.world_size * size),
            "last": num_steps if run.straggler == rank else 0,
            "late": num_steps * late,
            "early": num_steps * early,
            "wire": wire,
            "hidden": 0.8 * wire * (number + 1 < run.num_buckets),
        }
    lines = [{"kind": "collectives", "wire_seconds": num_steps * run.wire, "of": entries}]
    host = {"kind": "host", "run_queue": 0.01, "cpu": 0.1 * num_steps, "switches": 3, "gc": 0.001}
    if rank % 8 == 0:
        sent = sum(entry["sent"] for entry in entries.values()) * min(8, run.world_size)
        moved = {"tx_bytes": int(1.05 * sent), "rx_bytes": int(1.05 * sent), "tx_packets": sent // 1448}
        host["interface"] = {"name": "eth0", **moved, "rx_packets": sent // 1448}
    return [*lines, host]


def _write_metrics(folder: Path, run: SyntheticRun) -> None:
    random = np.random.default_rng([run.seed, 99])
    every = max(run.num_steps // run.evaluations, 1) if run.evaluations else 0
    lines = []
    for step in range(1, run.num_steps + 1):
        done = step / run.num_steps
        place = {"step": step, "clips_seen": step * run.batch_clips, "epoch": 20.0 * done, "attempt": 0}
        if step % 2 == 0 or step == 1:
            loss = 0.12 + 2.2 * np.exp(-4 * done) * (1 + 0.16 * random.normal())
            rate = 0.1 * min(1.0, step / (0.08 * run.num_steps)) * 0.5 * (1 + np.cos(np.pi * done))
            speed = run.batch_clips / (run.compute + run.loader_wait + 0.03) * (1 + 0.03 * random.normal())
            metrics = {
                "loss": loss,
                "losses": {"cross_entropy": loss},
                "learning_rate": rate,
                "clips_per_second": speed,
            }
            lines.append({**place, **metrics})
        if every and step % every == 0:
            top1 = run.accuracy * (1 - np.exp(-5 * done)) / (1 - np.exp(-5))
            evaluation = {"split": "test", "top1": top1, "top5": min(1.0, top1 + 0.4 * (1 - top1)), "loss": 0.4}
            lines.append({**place, "evaluation": {**evaluation, "num_samples": run.num_samples}})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _write_predictions(folder: Path, run: SyntheticRun) -> None:
    random = np.random.default_rng([run.seed, 7])
    samples = []
    num_classes = len(run.classes)
    for sample_id in range(run.num_samples):
        label = sample_id % num_classes
        prediction = label
        if random.random() > run.accuracy:  # classes come in pairs that a still frame cannot tell apart
            pair = label ^ 1
            prediction = pair if random.random() < 0.8 and pair < num_classes else int(random.integers(num_classes))
        sure = 0.5 + 0.5 * random.random()
        sample = {"sample_id": sample_id, "key": f"clips/{label:02d}/clip_{sample_id:05d}", "label": label}
        samples.append({**sample, "prediction": prediction, "probability": round(float(sure), 4)})
    predictions = {"split": "test", "classes": list(run.classes), "samples": samples}
    (folder / "predictions.json").write_text(json.dumps(predictions))


def textured_clip(run_dir: Path, sample_id: int) -> np.ndarray:
    """uint8 frames [8, 112, 112, 3]: a bright disk that travels over a noisy background, other for each sample."""
    random = np.random.default_rng(sample_id)
    y, x = np.mgrid[0:112, 0:112]
    phase = random.random(3) * 6
    base = np.stack([np.sin(x / 9 + phase[c]) + np.cos(y / 7 + phase[c]) for c in range(3)], axis=-1) * 35 + 110
    frames = []
    for t in range(8):
        disk = (x - 20 - 10 * t) ** 2 + (y - 30 - sample_id % 50) ** 2 < 180
        frame = base + random.normal(0, 14, base.shape)
        frame[disk] = (235, 190, 60)
        frames.append(frame.clip(0, 255).astype(np.uint8))
    return np.stack(frames)
