"""A plan of forms as text for a terminal of 80 columns: the table, the arithmetic, the recommendation."""

from __future__ import annotations

from collections.abc import Sequence

from data_shards.forms.encoding import EncodingConfig
from data_shards.forms.planning import FormCosts, Needs, Plan

_COLUMNS = ("  stored as", "MB each", "KB/clip", "ms/clip", "s each", "decode", "storage", "clips/s")
_UNDER = ("", "on disk", "read", "decode", "to pack", "clips/s", "clips/s", "at most")
_WIDTHS = (22, 9, 8, 8, 8, 8, 8, 8)


def describe_plan(plan: Plan) -> str:
    """The whole text, with a newline at its end."""
    best = plan.recommended()
    lines = [
        f"Measured on {plan.num_measured:,} of {plan.num_samples:,} samples, one core; "
        f"clips of {plan.clip.num_segments} frames, {plan.clip.crop_size}x{plan.clip.crop_size}",
        "",
        _row(_COLUMNS),
        _row(_UNDER),
        *(_costs_row(costs, plan.needs, is_best=costs is best) for costs in plan.costs),
        "",
        *_arithmetic(best, plan),
        *_recommendation(best, plan),
    ]
    if plan.rejected:
        samples = f"{len(plan.rejected)} sample" + ("s" if len(plan.rejected) > 1 else "")
        lines.append(f"Left out: {samples} that cannot be packed: {plan.rejected[0]}")
    return "\n".join(lines) + "\n"


def name_of(encoding: EncodingConfig) -> str:
    """A form in few words: "jpeg 256, 32 frames"."""
    if encoding.is_untouched:
        return "mp4, untouched"
    size = f" {encoding.short_side}" if encoding.short_side else ""
    more = f", gop {encoding.gop}" if encoding.gop else f", {encoding.frames} frames" if encoding.frames else ""
    return f"{encoding.store_as}{size}{more}"


def _costs_row(costs: FormCosts, needs: Needs, *, is_best: bool) -> str:
    storage = costs.storage_limit(needs)
    return _row(
        (
            f"{'*' if is_best else ' '} {name_of(costs.encoding)}",
            f"{costs.stored_megabytes:.3f}",
            f"{costs.read_kilobytes:,.0f}",
            f"{costs.decode_ms:.2f}",
            f"{costs.encode_seconds:.2f}",
            f"{costs.decode_limit(needs):,.0f}",
            "-" if needs.storage_megabytes_per_second is None else f"{storage:,.0f}",
            f"{costs.clips_per_second(needs):,.0f}",
        )
    )


def _arithmetic(best: FormCosts, plan: Plan) -> list[str]:
    needs = plan.needs
    lines = [
        f"* decode: {needs.cores} cores x 1000 ms / {best.decode_ms:.2f} ms = {best.decode_limit(needs):,.0f} clips/s"
    ]
    if needs.storage_megabytes_per_second is not None:
        lines.append(
            f"  storage: {needs.storage_megabytes_per_second:,g} MB/s / {best.read_kilobytes / 1000:.3f} MB = "
            f"{best.storage_limit(needs):,.0f} clips/s"
        )
    megabytes = best.stored_megabytes * plan.num_samples
    seconds = best.encode_seconds * plan.num_samples / needs.cores
    lines.append(f"  the whole set: {_size(megabytes)}; {_time(seconds)} to encode it on {needs.cores} cores")
    return lines


def _recommendation(best: FormCosts, plan: Plan) -> list[str]:
    target = plan.needs.target_clips_per_second
    flags = best.encoding.flags()
    limit = "the storage's MB/s" if best.storage_limit(plan.needs) < best.decode_limit(plan.needs) else "the cores"
    if target is None:
        return [f"Recommended: {flags}", "(the fastest; with --target-clips-per-second, the smallest that reaches it)"]
    if best.clips_per_second(plan.needs) < target:
        return [
            f"No form reaches {target:,g} clips/s. The fastest: {flags}",
            f"({limit} are the limit: {target / best.clips_per_second(plan.needs):.2f} times as many would do)",
        ]
    some = ", none with all frames does" if best.encoding.frames is not None else ""
    return [f"Recommended: {flags}", f"(the smallest on disk of those that reach {target:,g} clips/s{some})"]


def _size(megabytes: float) -> str:
    return f"{megabytes / 1000:,.1f} GB" if megabytes >= 1000 else f"{megabytes:,.1f} MB"


def _time(seconds: float) -> str:
    if seconds >= 3600:
        return f"{seconds / 3600:,.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.1f} s"


def _row(cells: Sequence[str]) -> str:
    name, *figures = cells
    return name.ljust(_WIDTHS[0]) + "".join(cell.rjust(width) for cell, width in zip(figures, _WIDTHS[1:], strict=True))
