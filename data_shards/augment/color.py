"""Colour jitter: brightness, contrast, saturation and hue of a clip, as one affine map of its colours.

The four are linear in RGB, so they are multiplied together once and a clip is passed over once, rounded once; chains of
picture operations round (and cut off at 0 and 255) after each. Sources: Haeberli, "Matrix Operations for Image
Processing" (1993), for the matrices; torchvision's `ColorJitter` for the meaning of the strengths.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

# Luma of BT.601, and the plane of chroma that hue turns in (NTSC's YIQ).
_LUMA = np.array([0.299, 0.587, 0.114])
_TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
_MIDDLE_GRAY = 127.5


@dataclass(frozen=True, kw_only=True)
class ColorJitter:
    """How strongly training changes colours; 0 leaves a property as it is."""

    brightness: float = 0.0
    """Brightness is multiplied by a factor from 1 - this to 1 + this."""
    contrast: float = 0.0
    """Contrast (about middle gray) is multiplied by such a factor."""
    saturation: float = 0.0
    """Saturation is multiplied by such a factor."""
    hue: float = 0.0
    """Hue is turned by up to this share of the colour circle to either side, at most 0.5."""

    def problems(self) -> list[str]:
        """What is wrong with these values, one line each."""
        found = []
        for name, most in (("brightness", 1.0), ("contrast", 1.0), ("saturation", 1.0), ("hue", 0.5)):
            if not 0 <= getattr(self, name) <= most:
                found.append(f"color.{name} is {getattr(self, name)}, it must be from 0 to {most:g}")
        return found

    @property
    def active(self) -> bool:
        """Whether anything is changed at all."""
        return any((self.brightness, self.contrast, self.saturation, self.hue))


def jitter_colors(frames: np.ndarray, config: ColorJitter, generator: np.random.Generator) -> np.ndarray:
    """`frames` (uint8 THWC) with other colours, the same change in every frame; takes four numbers of the generator."""
    draws = 2 * generator.random(4) - 1
    brightness, contrast, saturation = 1 + draws[:3] * (config.brightness, config.contrast, config.saturation)
    matrix, offset = color_map(brightness, contrast, saturation, hue=draws[3] * config.hue)
    return map_colors(frames, matrix, offset)


def color_map(brightness: float, contrast: float, saturation: float, *, hue: float) -> tuple[np.ndarray, float]:
    """Matrix (3, 3) and offset of `rgb -> matrix @ rgb + offset`: brightness, contrast, saturation, hue, in this order.

    Factors of 1 and a `hue` of 0 (in turns) change nothing. Gray stays gray, and hue and saturation keep its value.
    """
    gray = np.broadcast_to(_LUMA, (3, 3))
    saturate = saturation * np.eye(3) + (1 - saturation) * gray
    turn = 2 * np.pi * hue
    rotation = np.array([[1, 0, 0], [0, np.cos(turn), -np.sin(turn)], [0, np.sin(turn), np.cos(turn)]])
    rotate = np.linalg.solve(_TO_YIQ, rotation @ _TO_YIQ) if hue else np.eye(3)
    # A colour's offset is the same in the three channels, so the later two, which keep gray, leave it alone.
    return rotate @ saturate * (brightness * contrast), (1 - contrast) * _MIDDLE_GRAY


def map_colors(frames: np.ndarray, matrix: np.ndarray, offset: float) -> np.ndarray:
    """`matrix @ rgb + offset` of every pixel of `frames` (uint8 THWC), rounded and cut off at 0 and 255."""
    num_frames, height, width, _ = frames.shape
    tall = Image.fromarray(frames.reshape(num_frames * height, width, 3))
    rows = np.column_stack([matrix, np.full(3, offset)])
    return np.asarray(tall.convert("RGB", tuple(rows.ravel().tolist()))).reshape(frames.shape)
