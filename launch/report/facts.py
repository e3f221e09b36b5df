"""What a run was, in words: experiment, date, world, device, versions, revision, batch arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from launch.report.data import RunData
from launch.report.units import count_text, plural


def run_facts(run: RunData) -> list[tuple[str, str]]:
    """Names and values for the report's header; what is not known is left out."""
    facts = [
        ("Run", run.name),
        ("Experiment", run.config.get("experiment")),
        ("Started", _started(run)),
        ("Model", _model(run)),
        ("World", _world(run)),
        ("Batch", _batch(run)),
        ("Trained", _trained(run)),
        ("Strategy", run.setting("exchange", "strategy")),
        ("Precision", run.setting("training", "precision")),
        ("Data", run.setting("data", "root")),
        ("Versions", _versions(run)),
        ("Git revision", _revision(run)),
        ("Run id", run.config.get("run_id")),
    ]
    return [(name, str(value)) for name, value in facts if value not in (None, "")]


def _started(run: RunData) -> str | None:
    if run.ledger is None:
        return None
    try:
        seconds = float(run.ledger.attempts[0].ranks[0].identity["started_unix"])
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (KeyError, TypeError, ValueError, OverflowError, OSError):
        return None


def _model(run: RunData) -> str | None:
    name = run.setting("model", "name")
    parameters = run.config.get("num_parameters")
    if isinstance(parameters, int):
        return f"{name or 'model'}, {count_text(parameters)} parameters"
    return str(name) if name else None


def _world_fields(run: RunData) -> Mapping[str, Any]:
    """The last attempt's start line knows best: a resumed run may have another world than config.json says."""
    fields = dict(run.config["world"]) if isinstance(run.config.get("world"), Mapping) else {}
    if run.ledger is not None:
        attempt = run.ledger.last
        fields["world_size"] = attempt.world_size
        fields["num_nodes"] = len({rank.identity.get("node_rank", 0) for rank in attempt.ranks})
        first = attempt.ranks[0].identity
        fields.update({name: first[name] for name in ("device", "launcher") if first.get(name)})
    return fields


def _world(run: RunData) -> str | None:
    fields = _world_fields(run)
    if not isinstance(fields.get("world_size"), int):
        return None
    text = plural(fields["world_size"], "rank")
    if isinstance(fields.get("num_nodes"), int):
        text += f" on {plural(fields['num_nodes'], 'node')}"
    if fields.get("device"):
        text += f", {fields['device']}"
    return f"{text}, started by {fields['launcher']}" if fields.get("launcher") else text


def _batch(run: RunData) -> str | None:
    batch, micro = run.setting("training", "batch_clips"), run.setting("training", "micro_batches") or 1
    ranks = _world_fields(run).get("world_size")
    if not isinstance(batch, int) and run.ledger is not None and run.ledger.last.num_steps:
        batch = round(run.ledger.last.ranks[0].steps.clips_per_step)
    if not isinstance(batch, int) or not isinstance(ranks, int) or not isinstance(micro, int) or batch < 1:
        return None
    text = f"{plural(batch, 'clip')} = {plural(ranks, 'rank')} × "
    if micro > 1:
        text += f"{micro} micro-batches × "
    return text + plural(max(1, batch // (ranks * micro)), "clip")


def _trained(run: RunData) -> str | None:
    steps, clips = 0, 0
    if len(run.curve):
        steps, clips = int(run.curve.step[-1]), int(run.curve.clips_seen[-1])
    if run.ledger is not None:
        for rank in run.ledger.last.ranks:
            if len(rank.steps):
                steps = max(steps, int(rank.steps.step[-1]))
                clips = max(clips, int(rank.steps.clips_seen[-1]))
    if steps == 0:
        return None
    epochs = run.setting("training", "epochs")
    planned = f" (planned: {epochs:g} epochs)" if isinstance(epochs, (int, float)) else ""
    return f"{plural(steps, 'step')}, {plural(clips, 'clip')}{planned}"


def _revision(run: RunData) -> str | None:
    if "git_revision" not in run.config:
        return None
    revision, plus, dirty = str(run.config["git_revision"] or "not in a repository").partition("+")
    short = revision[:12] if len(revision) == 40 else revision
    return f"{short}{plus}{dirty}"


def _versions(run: RunData) -> str | None:
    versions = run.config.get("versions")
    if not isinstance(versions, Mapping):
        return None
    return ", ".join(f"{name} {version}" for name, version in versions.items())
