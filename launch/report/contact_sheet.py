"""The contact sheet: clips of the evaluated split with their frames, true class and prediction.

Frames come from a callable that `launch` wires to the loader, so this module knows nothing of shards. Each
clip becomes one JPEG of up to eight frames in reading order, shrunk to thumbnails; the sheet has a budget of
bytes.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from launch.report.data import Predictions, RunData, Sample
from launch.report.units import plural, share_text

ClipImages = Callable[[Path, int], np.ndarray]
"""(run folder, sample id) -> uint8 frames [T, H, W, C] in RGB."""

MAX_CLIPS = 24
MAX_JPEG_BYTES = 1_600_000  # of all clips of a report; base64 adds a third
_ERRORS_SHARE = 2 / 3
_MAX_FRAMES = 8
_COLUMNS = 4
_THUMBNAIL = 112  # longer side of a frame, in pixels


def choose_samples(predictions: Predictions, limit: int) -> list[Sample]:
    """Up to `limit` samples: errors first, the surest first, then right ones, one of each class in turn.

    Errors take two thirds of the places if there are enough right ones to fill the others.
    """
    wrong = sorted((s for s in predictions.samples if not s.right), key=lambda s: (-_sure(s), s.sample_id))
    by_class: dict[int, list[Sample]] = {}
    for sample in sorted(predictions.samples, key=lambda s: s.sample_id):
        if sample.right:
            by_class.setdefault(sample.label, []).append(sample)
    turns = [(turn, label, s) for label, of_class in by_class.items() for turn, s in enumerate(of_class)]
    right = [sample for _, _, sample in sorted(turns, key=lambda item: item[:2])]
    num_wrong = min(len(wrong), max(math.ceil(limit * _ERRORS_SHARE), limit - len(right)))
    return wrong[:num_wrong] + right[: limit - num_wrong]


def _sure(sample: Sample) -> float:
    return sample.probability if math.isfinite(sample.probability) else 0.0


def contact_sheet(
    run: RunData, predictions: Predictions, clip_images: ClipImages | None, *, limit: int, max_bytes: int
) -> str:
    """The sheet's markup. A clip whose frames cannot be had says so in its place.

    Args: clip_images: gives a sample's frames; None where there is no reader: then there is a sentence, no
        sheet. limit: clips at most. max_bytes: JPEG bytes of the sheet at most; clips beyond it are left out,
        and that is said.
    """
    if not predictions.samples:
        return f"<p>The {escape(predictions.split)} split has no predicted sample.</p>"
    if clip_images is None:
        return "<p>No clips are shown: this report was written without access to the data.</p>"
    chosen = choose_samples(predictions, limit)
    cards, left = [], max_bytes
    for sample in chosen:
        try:
            jpeg = filmstrip_jpeg(clip_images(run.path, sample.sample_id))
        except Exception as error:  # the reader is the caller's, and a report must not fail on one clip
            cards.append(_card(predictions, sample, f'<p class="gone">No frames: {escape(_one_line(error))}</p>'))
            continue
        if len(jpeg) > left:
            break
        left -= len(jpeg)
        cards.append(_card(predictions, sample, _picture(predictions, sample, jpeg)))
    num_wrong = sum(not sample.right for sample in predictions.samples)
    words = (
        f"{plural(len(cards), 'clip')} of {len(predictions.samples):,} of the {predictions.split} split: errors first "
        f"({num_wrong:,} in all), the surest first, then right ones of every class. Frames in reading order."
    )
    return f'<p>{escape(words)}</p><div class="sheet">{"".join(cards)}</div>'


def filmstrip_jpeg(frames: np.ndarray) -> bytes:
    """Up to eight evenly spaced frames as one JPEG, four in a row.

    Args:
        frames: uint8 [T, H, W, 3] (or [T, H, W, 1]).

    Raises:
        ValueError: not uint8 frames of that shape.
    """
    frames = np.asarray(frames)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] not in (1, 3) or 0 in frames.shape:
        raise ValueError(f"frames are {frames.dtype} of shape {frames.shape}: expected uint8 T,H,W,C")
    num_frames = min(len(frames), _MAX_FRAMES)
    picked = np.linspace(0, len(frames) - 1, num_frames).round().astype(int)
    scale = _THUMBNAIL / max(frames.shape[1:3])
    width, height = (max(1, round(size * scale)) for size in (frames.shape[2], frames.shape[1]))
    columns = min(num_frames, _COLUMNS)
    gap = 2
    rows = math.ceil(num_frames / columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), (128, 128, 128))
    for place, index in enumerate(picked):
        frame = np.repeat(frames[index], 3, axis=2) if frames.shape[3] == 1 else frames[index]
        thumbnail = Image.fromarray(frame).resize((width, height), Image.Resampling.LANCZOS)
        sheet.paste(thumbnail, ((place % columns) * (width + gap), (place // columns) * (height + gap)))
    file = io.BytesIO()
    sheet.save(file, "JPEG", quality=78, optimize=True)
    return file.getvalue()


def _picture(predictions: Predictions, sample: Sample, jpeg: bytes) -> str:
    width, height = Image.open(io.BytesIO(jpeg)).size
    alt = f"Frames of clip {sample.key}, true class {predictions.classes[sample.label]}"
    data = base64.b64encode(jpeg).decode("ascii")
    return f'<img alt="{escape(alt)}" width="{width}" height="{height}" src="data:image/jpeg;base64,{data}">'


def _card(predictions: Predictions, sample: Sample, picture: str) -> str:
    truth = escape(predictions.classes[sample.label])
    guess = escape(predictions.classes[sample.prediction])
    sure = f' <span class="share">{share_text(sample.probability)}</span>' if math.isfinite(sample.probability) else ""
    if sample.right:
        verdict = f'<span class="mark-right">✓ right:</span> <b>{truth}</b>{sure}'
    else:
        verdict = (
            f'<span class="mark-wrong">✗ wrong:</span> predicted <b>{guess}</b>{sure}<br>true class <b>{truth}</b>'
        )
    kind = "right" if sample.right else "wrong"
    return (
        f'<figure class="clip {kind}">{picture}<figcaption>{verdict}'
        f'<span class="key">{escape(sample.key)}</span></figcaption></figure>'
    )


def _one_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]
