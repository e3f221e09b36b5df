"""Renders the clips of the motion set: one textured object over a moving, noisy background.

A scene (`Scene`) fixes what is seen: the object's shape and texture, the background, the colors, the small
distractors. A take of it adds what happens: the motion, the drift of the background, flicker and noise.
Only the *forward* class of a pair has a process; a clip of its partner is a take of the same process with
its frames in reverse order (`data_shards.motion`). So the frames of both classes, taken one by one or as a
set, have the same distribution by construction: no model that ignores their order can tell them apart.

Frames are rendered as the planes of yuv420p with additions, products, square roots and tables only, so that
a seed gives the same bytes on every machine. Lengths are fractions of the frame's side, so a scene looks
alike at every size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["FORWARD_MOTIONS", "Scene", "draw_scene", "render_take"]

Array = np.ndarray[Any, np.dtype[np.floating[Any]]]

FORWARD_MOTIONS = ("left", "up", "clockwise", "growing", "appearing")
"""The motions that are rendered; each one's partner is the same take played backwards."""

_SHAPES = ("disc", "square", "triangle", "pentagon", "hexagon", "cross", "ellipse", "diamond")
_TABLE_SIZE = 4096
_SINE = np.round(np.sin(np.arange(_TABLE_SIZE) * (2 * np.pi / _TABLE_SIZE)), 6).astype(np.float32)
_NOISE_LEVELS = 256


def _gaussian_table() -> Array:
    """Quantiles of the normal distribution at the centers of 256 equal probabilities."""
    levels = [(index + 0.5) / _NOISE_LEVELS for index in range(_NOISE_LEVELS)]
    grid = np.linspace(-4, 4, 8001)
    cumulative = np.array([0.5 * (1 + math.erf(x / math.sqrt(2))) for x in grid])
    return np.round(np.interp(levels, cumulative, grid), 5).astype(np.float32)


_GAUSSIAN = _gaussian_table()


@dataclass(frozen=True, kw_only=True)
class Wave:
    """One sinusoid of an object's texture."""

    across: float
    """Periods per object radius along the object's own x axis."""
    along: float
    """Periods per object radius along its own y axis."""
    phase: float
    """Phase in periods."""
    weight: float
    """Amplitude."""


@dataclass(frozen=True, kw_only=True)
class Distractor:
    """A small plain disc that swings to and fro."""

    center: tuple[float, float]
    """Mean position (x, y), fractions of the side."""
    radius: float
    """Fraction of the side."""
    swing: tuple[float, float]
    """Amplitude (x, y) of its movement, fractions of the side."""
    color: tuple[float, float, float]
    """Y, Cb, Cr."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What a clip shows, apart from how it moves."""

    shape: str
    """One of the shapes of this module."""
    radius: float
    """Object's radius at scale 1, a fraction of the side."""
    waves: tuple[Wave, ...]
    """The object's texture."""
    colors: tuple[tuple[float, float, float], tuple[float, float, float]]
    """The two colors (Y, Cb, Cr) that the object's texture runs between."""
    background_seed: int
    """Seed of the background's texture."""
    background_color: tuple[float, float, float]
    """Its mean color (Y, Cb, Cr)."""
    background_contrast: float
    """Standard deviation of its luma."""
    distractors: tuple[Distractor, ...]
    """What moves and does not matter."""


def draw_scene(rng: np.random.Generator) -> Scene:
    """Draw a scene."""
    background = (float(rng.uniform(80, 170)), *rng.uniform(108, 148, 2).tolist())
    bright, dark = rng.uniform(205, 235), rng.uniform(16, 45)
    hues = rng.uniform(-60, 60, (2, 2)) + 128
    colors = ((float(dark), *hues[0].tolist()), (float(bright), *hues[1].tolist()))
    return Scene(
        shape=_SHAPES[rng.integers(len(_SHAPES))],
        radius=float(rng.uniform(0.2, 0.26)),
        waves=_draw_waves(rng),
        colors=colors,
        background_seed=int(rng.integers(2**62)),
        background_color=background,
        background_contrast=float(rng.uniform(8, 18)),
        distractors=tuple(_draw_distractor(rng) for _ in range(rng.integers(0, 3))),
    )


def _draw_waves(rng: np.random.Generator) -> tuple[Wave, ...]:
    """Stripes, checks or blobs, over one wave of low frequency that gives the object a light and a dark side."""
    sides = rng.uniform(-math.pi, math.pi)
    waves = [
        Wave(across=0.25 * math.cos(sides), along=0.25 * math.sin(sides), phase=0.0, weight=0.6),
    ]
    count = int(rng.integers(1, 4))
    for _ in range(count):
        turn, frequency = rng.uniform(-math.pi, math.pi), rng.uniform(0.5, 1.1)
        waves.append(
            Wave(
                across=round(frequency * math.cos(turn), 6),
                along=round(frequency * math.sin(turn), 6),
                phase=float(rng.uniform()),
                weight=0.4 / count,
            )
        )
    return tuple(waves)


def _draw_distractor(rng: np.random.Generator) -> Distractor:
    x, y = rng.uniform(0.05, 0.95, 2).tolist()
    swing_x, swing_y = rng.uniform(-0.05, 0.05, 2).tolist()
    luma, (blue, red) = float(rng.uniform(40, 215)), rng.uniform(98, 158, 2).tolist()
    return Distractor(
        center=(x, y), radius=float(rng.uniform(0.03, 0.06)), swing=(swing_x, swing_y), color=(luma, blue, red)
    )


@dataclass(frozen=True, kw_only=True)
class _Path:
    """The object's course: one float32 value a frame each."""

    x: Array
    y: Array
    turn: Array  # radians, clockwise on the screen
    scale: Array
    opacity: Array


def _draw_path(motion: str, num_frames: int, rng: np.random.Generator) -> _Path:
    """The course of a forward motion: its own quantity runs steadily, the others only wander a little."""
    time = np.linspace(-0.5, 0.5, num_frames, dtype=np.float32)
    course = time + np.float32(rng.uniform(-0.5, 0.5)) * (0.25 - time * time)  # monotone, uneven speed
    x = 0.5 + rng.uniform(-0.1, 0.1) + rng.uniform(-0.05, 0.05) * time
    y = 0.5 + rng.uniform(-0.1, 0.1) + rng.uniform(-0.05, 0.05) * time
    turn = rng.uniform(-math.pi, math.pi) + rng.uniform(-0.15, 0.15) * time
    scale = rng.uniform(0.9, 1.1) * (1 + rng.uniform(-0.06, 0.06) * time)
    opacity = np.ones(num_frames, np.float32)
    if motion == "left":
        x = 0.5 + rng.uniform(-0.05, 0.05) - rng.uniform(0.48, 0.62) * course
    elif motion == "up":
        y = 0.5 + rng.uniform(-0.05, 0.05) - rng.uniform(0.48, 0.62) * course
    elif motion == "clockwise":
        turn = rng.uniform(-math.pi, math.pi) + rng.uniform(3.4, 4.6) * course
        scale, pivot = scale * 1.1, rng.uniform(0.07, 0.13)  # about a point inside it, off its center
        x = 0.5 + rng.uniform(-0.06, 0.06) + pivot * _cosines(turn)
        y = 0.5 + rng.uniform(-0.06, 0.06) + pivot * _sines(turn)
    elif motion == "growing":
        ratio = rng.uniform(0.55, 0.75)  # of the change of size to the mean size
        scale = rng.uniform(0.95, 1.15) * (1 + 2 * ratio * course)
    elif motion == "appearing":
        start, stop = rng.uniform(0, 0.2), rng.uniform(0.8, 1.0)
        opacity = np.clip((course + 0.5 - start) / (stop - start), 0, 1)
    else:
        raise ValueError(f"{motion!r} is no forward motion; choose one of {', '.join(FORWARD_MOTIONS)}")
    return _Path(
        **{
            name: np.asarray(value, np.float32)
            for name, value in {"x": x, "y": y, "turn": turn, "scale": scale, "opacity": opacity}.items()
        }
    )


def render_take(scene: Scene, motion: str, *, size: int, num_frames: int, rng: np.random.Generator) -> np.ndarray:
    """Render one take of `scene` with a forward motion.

    Returns uint8 of shape (num_frames, size * 3 // 2, size): yuv420p planes as PyAV lays them out, limited
    range. `size` is a multiple of 4.
    """
    path = _draw_path(motion, num_frames, rng)
    luma, chroma = _background(scene, size, num_frames, rng)
    time = np.linspace(0, 1, num_frames, dtype=np.float32)
    for distractor in scene.distractors:
        phase, cycles = rng.uniform(), rng.uniform(0.5, 1.5)
        swing = _sine(np.float32(cycles) * time + np.float32(phase))
        mask = _disc(distractor, swing, size)
        _paint(luma, chroma, mask, *np.array(distractor.color, np.float32))
    mask, blend = _object(scene, path, size)
    dark, bright = scene.colors
    values = [np.float32(low) + blend * np.float32(high - low) for low, high in zip(dark, bright, strict=True)]
    _paint(luma, chroma, mask, *values)
    return _finish(luma, chroma, num_frames, size, rng)


def _finish(luma: Array, chroma: Array, num_frames: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """Drift of brightness, flicker and sensor noise; rounding to bytes."""
    drift = rng.uniform(-8, 8) * np.linspace(-0.5, 0.5, num_frames)
    flicker = drift + _GAUSSIAN[rng.integers(0, _NOISE_LEVELS, num_frames)]
    luma += flicker.astype(np.float32)[:, None, None]
    noise = np.frombuffer(rng.bytes(luma.size), np.uint8).reshape(luma.shape)
    luma += (_GAUSSIAN * np.float32(rng.uniform(1.5, 3.5)))[noise]
    frames = np.empty((num_frames, size * 3 // 2, size), np.uint8)
    frames[:, :size] = np.clip(luma + np.float32(0.5), 16, 235)
    frames[:, size:] = np.clip(chroma + np.float32(0.5), 16, 240).reshape(num_frames, size // 2, size)
    return frames


def _sine(periods: Array) -> Array:
    """Sine of an angle given in periods, from a table."""
    return _SINE[(periods * np.float32(_TABLE_SIZE)).astype(np.int32) & (_TABLE_SIZE - 1)]


def _sines(radians: Array) -> Array:
    """Sines of a few angles, the same on every machine."""
    return np.array([round(math.sin(angle), 6) for angle in radians], np.float32)


def _cosines(radians: Array) -> Array:
    """Cosines of a few angles, the same on every machine."""
    return np.array([round(math.cos(angle), 6) for angle in radians], np.float32)


def _pixel_centers(size: int) -> Array:
    return (np.arange(size, dtype=np.float32) + np.float32(0.5)) / np.float32(size)


def _object(scene: Scene, path: _Path, size: int) -> tuple[Array, Array]:
    """Coverage and texture (0 = first color, 1 = second) of the object, each T, H, W in 0 ... 1."""
    centers = _pixel_centers(size)
    radius = np.float32(scene.radius) * path.scale
    dx = (centers[None, :] - path.x[:, None]) / radius[:, None]
    dy = (centers[None, :] - path.y[:, None]) / radius[:, None]
    cos, sin = _cosines(path.turn)[:, None], _sines(path.turn)[:, None]
    u = (cos * dx)[:, None, :] + (sin * dy)[:, :, None]  # the object's own axes, in radii
    v = (cos * dy)[:, :, None] - (sin * dx)[:, None, :]
    softness = (radius * np.float32(size))[:, None, None]  # one pixel wide edge
    mask = np.clip((1 - _gauge(scene.shape, u, v)) * softness + np.float32(0.5), 0, 1)
    mask *= path.opacity[:, None, None]
    texture = np.full_like(u, 0.5)
    for wave in scene.waves:
        periods = u * np.float32(wave.across) + v * np.float32(wave.along) + np.float32(wave.phase)
        texture += np.float32(wave.weight) * _sine(periods)
    return mask, np.clip(texture, 0, 1, out=texture)


def _gauge(shape: str, u: Array, v: Array) -> Array:
    """A function that is 1 on the outline of the shape and grows outwards."""
    gauge: Array
    if shape in ("disc", "ellipse"):
        across, along = (1, 1) if shape == "disc" else (0.8, 3)
        gauge = np.sqrt(u * u * np.float32(across) + v * v * np.float32(along))
        return gauge
    if shape == "square":
        return np.maximum(np.abs(u), np.abs(v)) * np.float32(1.15)
    if shape == "diamond":
        return np.abs(u) * np.float32(1.45) + np.abs(v) * np.float32(0.85)
    if shape == "cross":
        wide, high = np.abs(u), np.abs(v)
        thick = np.float32(2.6)
        return np.minimum(np.maximum(wide, high * thick), np.maximum(wide * thick, high))
    corners = {"triangle": 3, "pentagon": 5, "hexagon": 6}[shape]
    inner = math.cos(math.pi / corners)
    gauge = np.full_like(u, -np.inf)
    for corner in range(corners):
        angle = 2 * math.pi * corner / corners
        a, b = round(math.cos(angle) / inner, 6), round(math.sin(angle) / inner, 6)
        np.maximum(gauge, u * np.float32(a) + v * np.float32(b), out=gauge)
    return gauge


def _disc(distractor: Distractor, swing: Array, size: int) -> Array:
    centers = _pixel_centers(size)
    x = np.float32(distractor.center[0]) + np.float32(distractor.swing[0]) * swing
    y = np.float32(distractor.center[1]) + np.float32(distractor.swing[1]) * swing
    dx, dy = centers[None, :] - x[:, None], centers[None, :] - y[:, None]
    distance = np.sqrt((dx * dx)[:, None, :] + (dy * dy)[:, :, None])
    return np.clip((np.float32(distractor.radius) - distance) * np.float32(size) + np.float32(0.5), 0, 1)


def _paint(luma: Array, chroma: Array, mask: Array, *color: Array) -> None:
    """Blend a color (Y, Cb, Cr; each a number or full-size planes) over the frames, in place."""
    luma += mask * (color[0] - luma)
    half = mask[:, ::2, ::2]
    for index, value in enumerate(color[1:]):
        value = value[:, ::2, ::2] if value.ndim else value
        chroma[:, index] += half * (value - chroma[:, index])


def _background(scene: Scene, size: int, num_frames: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """Luma (T, H, W) and chroma (T, 2, H/2, W/2) of the scene's texture, drifting at a random velocity."""
    margin = size // 2
    texture_rng = np.random.default_rng(scene.background_seed)
    shades = _cloud(texture_rng, 1, size + margin) * np.float32(scene.background_contrast)
    tints = _cloud(texture_rng, 2, (size + margin) // 2) * np.float32(6)
    shades += np.float32(scene.background_color[0])
    tints += np.array(scene.background_color[1:], np.float32)[:, None, None]
    travel = rng.uniform(-0.15, 0.15, 2) * size  # pixels over the clip
    steps = np.linspace(-0.5, 0.5, num_frames)[:, None] * travel + margin / 2
    luma = np.empty((num_frames, size, size), np.float32)
    chroma = np.empty((num_frames, 2, size // 2, size // 2), np.float32)
    for index, (down, right) in enumerate(steps.tolist()):
        luma[index] = _shifted(shades, down, right, size)[0]
        chroma[index] = _shifted(tints, down / 2, right / 2, size // 2)
    return luma, chroma


def _shifted(texture: Array, down: float, right: float, size: int) -> Array:
    """A window of `texture` (C, H, W) at a sub-pixel offset, bilinear."""
    row, column = int(down), int(right)
    a, b = np.float32(down - row), np.float32(right - column)
    block = texture[:, row : row + size + 1, column : column + size + 1]
    block = block[:, :-1] + (block[:, 1:] - block[:, :-1]) * a
    return block[:, :, :-1] + (block[:, :, 1:] - block[:, :, :-1]) * b


def _cloud(rng: np.random.Generator, channels: int, side: int) -> Array:
    """Smooth noise (channels, side, side) of unit variance, about: random grids of 4, 8 and 16 cells."""
    total = np.zeros((channels, side, side), np.float32)
    for cells, weight in ((4, 0.7), (8, 0.6), (16, 0.4)):
        grid = _GAUSSIAN[rng.integers(0, _NOISE_LEVELS, (channels, cells + 1, cells + 1))]
        places = np.arange(side, dtype=np.float32) * np.float32(cells / side)
        low = places.astype(np.int32)
        part = places - low
        rows = grid[:, low] * (1 - part)[None, :, None] + grid[:, low + 1] * part[None, :, None]
        mixed = rows[:, :, low] * (1 - part) + rows[:, :, low + 1] * part
        total += np.float32(weight * 1.5) * mixed
    return total
