"""RandAugment: a few operations out of fourteen, drawn for a clip, all at one magnitude.

Source: Cubuk et al. 2019 (arXiv 1909.13719). Operations, and what magnitude 30, the highest, means (linear from
0, torchvision's values):

    identity, auto_contrast, equalize                no magnitude
    brightness, color, contrast, sharpness           factor 1 +- 0.9
    posterize                                        8 bits to 4
    solarize                                         inverts values from 255 to 0 upwards
    rotate                                           +- 30 degrees
    shear_x, shear_y                                 +- 0.3 pixels a pixel
    translate_x, translate_y                         +- 150 / 331 of the side

Pillow's operations. Those of tone take a clip as one tall picture: what they measure (a mean, a histogram) is the
clip's, so that it does not flicker; those of place, and sharpness, go frame by frame. What comes in at the border has
ImageNet's mean colour, and pixels are moved, not mixed (nearest neighbour).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from data_shards.sampling import draw_below

MAX_MAGNITUDE = 30
_BORDER = (124, 116, 104)


@dataclass(frozen=True, kw_only=True)
class RandAugment:
    """RandAugment's two numbers."""

    num_ops: int = 0
    """Operations applied to a clip, one after the other; 0: none."""
    magnitude: int = 9
    """How strong each is, from 0 to 30."""

    def problems(self) -> list[str]:
        """What is wrong with these values, one line each."""
        found = []
        if self.num_ops < 0:
            found.append(f"rand_augment.num_ops is {self.num_ops}, it must be at least 0")
        if not 0 <= self.magnitude <= MAX_MAGNITUDE:
            found.append(f"rand_augment.magnitude is {self.magnitude}, it must be from 0 to {MAX_MAGNITUDE}")
        return found


def rand_augment(frames: np.ndarray, config: RandAugment, generator: np.random.Generator) -> np.ndarray:
    """`frames` (uint8 THWC) after `num_ops` random operations, the same for every frame.

    Takes two numbers of the generator for each: which, and in which direction.
    """
    names = list(OPERATIONS)
    for _ in range(config.num_ops):
        name = names[draw_below(len(names), generator)]
        sign = 1 if generator.random() < 0.5 else -1
        frames = OPERATIONS[name](frames, sign * config.magnitude / MAX_MAGNITUDE)
    return frames


def _tone(operation: Callable[[Image.Image, float], Image.Image]) -> Callable[[np.ndarray, float], np.ndarray]:
    """`operation` on all frames as one picture."""

    def apply(frames: np.ndarray, level: float) -> np.ndarray:
        num_frames, height, width, _ = frames.shape
        tall = Image.fromarray(frames.reshape(num_frames * height, width, 3))
        return np.asarray(operation(tall, level)).reshape(frames.shape)

    return apply


def _each(operation: Callable[[Image.Image, float], Image.Image]) -> Callable[[np.ndarray, float], np.ndarray]:
    """`operation` on each frame."""

    def apply(frames: np.ndarray, level: float) -> np.ndarray:
        return np.stack([np.asarray(operation(Image.fromarray(frame), level)) for frame in frames])

    return apply


def _posterize(image: Image.Image, level: float) -> Image.Image:
    return ImageOps.posterize(image, 8 - round(4 * abs(level)))


def _solarize(image: Image.Image, level: float) -> Image.Image:
    return ImageOps.solarize(image, round(255 * (1 - abs(level))))


def _rotate(image: Image.Image, level: float) -> Image.Image:
    return image.rotate(30 * level, fillcolor=_BORDER)


def _affine(image: Image.Image, row: tuple[float, float, float], column: tuple[float, float, float]) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, (*row, *column), fillcolor=_BORDER)


# By level: the magnitude from 0 to 1, negative for the other direction.
OPERATIONS: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "identity": lambda frames, _: frames,
    "auto_contrast": _tone(lambda image, _: ImageOps.autocontrast(image)),
    "equalize": _tone(lambda image, _: ImageOps.equalize(image)),
    "brightness": _tone(lambda image, level: ImageEnhance.Brightness(image).enhance(1 + 0.9 * level)),
    "color": _tone(lambda image, level: ImageEnhance.Color(image).enhance(1 + 0.9 * level)),
    "contrast": _tone(lambda image, level: ImageEnhance.Contrast(image).enhance(1 + 0.9 * level)),
    "sharpness": _each(lambda image, level: ImageEnhance.Sharpness(image).enhance(1 + 0.9 * level)),
    "posterize": _tone(_posterize),
    "solarize": _tone(_solarize),
    "rotate": _each(_rotate),
    "shear_x": _each(lambda image, level: _affine(image, (1, 0.3 * level, 0), (0, 1, 0))),
    "shear_y": _each(lambda image, level: _affine(image, (1, 0, 0), (0.3 * level, 1, 0))),
    "translate_x": _each(lambda image, level: _affine(image, (1, 0, 150 / 331 * level * image.width), (0, 1, 0))),
    "translate_y": _each(lambda image, level: _affine(image, (1, 0, 0), (0, 1, 150 / 331 * level * image.height))),
}
