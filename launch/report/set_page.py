"""A packed set as one self-contained HTML page: its figures, its classes, and a contact sheet of each split."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from html import escape

import numpy as np
from PIL import Image

from data_shards.inspection import Histogram, SetFacts, SplitFacts, pick_samples
from launch.report.contact_sheet import filmstrip_jpeg
from launch.report.document import html_document
from launch.report.svg import Chart
from launch.report.tables import table
from launch.report.units import bytes_text, count_text, plural, seconds_text, share_text

SampleFrames = Callable[[SplitFacts, int], np.ndarray]
"""(split, sample id) -> uint8 frames [T, H, W, 3]; an exception's words take the picture's place."""

MAX_JPEG_BYTES = 3_000_000  # of all pictures of a page; base64 adds a third
_SIZES_SHOWN = 12


def render_set_page(facts: SetFacts, *, sample_frames: SampleFrames, limit: int) -> str:
    """The page; `limit` samples at most, shared out between the splits."""
    title = facts.root.resolve().name or str(facts.root)
    notes = "".join(f'<p class="problem">{escape(note)}</p>' for note in facts.notes)
    sheets = "".join(
        _section(f"Samples of {split.manifest.split}", _sheet(split, sample_frames, limit // len(facts.splits), share))
        for split, share in ((split, MAX_JPEG_BYTES // len(facts.splits)) for split in facts.splits)
        if limit >= len(facts.splits)
    )
    body = (
        f'<header><p class="kicker">reelscale packed set</p><h1>{escape(title)}</h1></header>'
        f"{_tiles(facts)}{notes}"
        + _section("Splits", _splits_table(facts))
        + _section("Durations and sizes", _figures(facts) + _sizes_table(facts))
        + sheets
        + _section("Classes", _classes_table(facts))
    )
    footer = f"Written by `reelscale inspect` from the manifests of {escape(str(facts.root))}."
    return html_document(title, body, footer=footer)


def _tiles(facts: SetFacts) -> str:
    samples = sum(len(split.manifest) for split in facts.splits)
    seconds = sum(split.seconds for split in facts.splits)
    shards = sum(len(split.manifest.shards) for split in facts.splits)
    tiles = [
        ("samples", count_text(samples), f"in {plural(len(facts.splits), 'split')}"),
        ("classes", count_text(len(facts.classes)), _balance(facts)),
        ("bytes", bytes_text(sum(split.num_bytes for split in facts.splits)), plural(shards, "shard")),
        ("duration", seconds_text(seconds) if seconds else "–", "of all samples together"),
        ("form", ", ".join(sorted({split.manifest.form for split in facts.splits})), "as samples are stored"),
    ]
    items = "".join(
        f'<div class="tile"><dt>{escape(name)}</dt><dd>{escape(value)}</dd><small>{escape(under)}</small></div>'
        for name, value, under in tiles
    )
    return f'<dl class="tiles">{items}</dl>'


def _balance(facts: SetFacts) -> str:
    counts = _class_counts(facts)
    return f"{counts.min():,} to {counts.max():,} samples each"


def _class_counts(facts: SetFacts) -> np.ndarray:
    """Samples of each class over all splits."""
    return np.sum([split.class_counts for split in facts.splits], axis=0)


def _splits_table(facts: SetFacts) -> str:
    body = [
        [
            escape(split.manifest.split),
            count_text(len(split.manifest)),
            count_text(int((split.class_counts > 0).sum())),
            count_text(len(split.manifest.shards)),
            bytes_text(split.num_bytes),
            seconds_text(split.seconds) if split.seconds else "–",
        ]
        for split in facts.splits
    ]
    return table(["split", "samples", "classes", "shards", "bytes", "duration"], body, caption="The splits of the set.")


def _figures(facts: SetFacts) -> str:
    figures = []
    for spread in facts.histograms:
        if len(spread.counts) == 1:
            words = f"All samples: {spread.median:.6g} {spread.unit}."
            figures.append(f"<figure><h4>{escape(spread.name)}</h4><p>{escape(words)}</p></figure>")
            continue
        words = f"From {spread.least:.4g} to {spread.most:.4g} {spread.unit}, median {spread.median:.4g}."
        beyond = " The first or last bar takes in what lies beyond the axis." if _has_tails(spread) else ""
        figures.append(
            f"<figure><h4>{escape(spread.name)}</h4>{_bars(spread, words)}"
            f"<figcaption>{escape(words + beyond)}</figcaption></figure>"
        )
    return f'<div class="grid grid-2">{"".join(figures)}</div>'


def _has_tails(spread: Histogram) -> bool:
    return spread.least < spread.edges[0] or spread.most > spread.edges[-1]


def _bars(spread: Histogram, words: str) -> str:
    chart = Chart(
        x=(float(spread.edges[0]), float(spread.edges[-1])),
        y=(0.0, float(spread.counts.max()) * 1.06),
        x_label=spread.unit,
        y_label="samples",
        height=190.0,
    )
    chart.boxes(spread.edges, np.zeros(len(spread.counts)), spread.counts.astype(float), "r-backward")
    return chart.render(f"Histogram of {spread.name}. {words}")


def _sizes_table(facts: SetFacts) -> str:
    total = sum(count for _, count in facts.sizes)
    shown = facts.sizes[:_SIZES_SHOWN]
    body = [[escape(size), count_text(count), share_text(count / total)] for size, count in shown]
    if len(facts.sizes) > len(shown):
        rest = total - sum(count for _, count in shown)
        body.append([f"{len(facts.sizes) - len(shown):,} other sizes", count_text(rest), share_text(rest / total)])
    return table(["pictures", "samples", "share"], body, caption="Width and height in pixels, as decoded and upright.")


def _classes_table(facts: SetFacts) -> str:
    body = [
        [escape(name), *(count_text(int(split.class_counts[label])) for split in facts.splits)]
        for label, name in enumerate(facts.classes)
    ]
    head = ["class", *(escape(split.manifest.split) for split in facts.splits)]
    return table(head, body, caption="Samples of each class.")


def _sheet(split: SplitFacts, sample_frames: SampleFrames, limit: int, max_bytes: int) -> str:
    """Filmstrips of one sample of each class in turn, until `limit` or `max_bytes` is reached."""
    manifest = split.manifest
    cards: list[str] = []
    for sample_id in pick_samples(manifest, limit):
        row = manifest.samples[sample_id]
        name = manifest.classes[int(row["label"])]
        try:
            jpeg = filmstrip_jpeg(sample_frames(split, sample_id))
        except (ValueError, OSError) as error:  # the page is to show what can be seen
            picture = f'<p class="problem">{escape(" ".join(str(error).split()))}</p>'
        else:
            if len(jpeg) > max_bytes:
                break
            max_bytes -= len(jpeg)
            picture = _picture(jpeg, f"Frames of {manifest.key(sample_id)}, class {name}")
        fps = f", {row['fps']:.4g} fps" if row["fps"] > 0 else ""
        facts = f"{row['width']}x{row['height']}, {plural(int(row['num_frames']), 'frame')}{fps}"
        cards.append(
            f'<figure class="clip">{picture}<figcaption><b>{escape(name)}</b> '
            f'<span class="key">{escape(manifest.key(sample_id))} · {escape(facts)}</span></figcaption></figure>'
        )
    words = f"{len(cards)} of {plural(len(manifest), 'sample')}, one of each class in turn, frames in reading order."
    return f'<p>{escape(words)}</p><div class="sheet">{"".join(cards)}</div>'


def _picture(jpeg: bytes, alt: str) -> str:
    width, height = Image.open(io.BytesIO(jpeg)).size
    data = base64.b64encode(jpeg).decode("ascii")
    return f'<img alt="{escape(alt)}" width="{width}" height="{height}" src="data:image/jpeg;base64,{data}">'


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>\n"
