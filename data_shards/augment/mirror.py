"""Mirroring where classes know left from right: the label changes with the picture."""

from collections.abc import Sequence
from difflib import get_close_matches

import numpy as np


def mirrored_labels(classes: Sequence[str], pairs: Sequence[tuple[str, str]]) -> np.ndarray:
    """The label of each class once its videos are mirrored: int64 (num_classes,), its own inverse.

    Args:
        classes: names, by label.
        pairs: names of classes that are each other's mirror image; a class in none of them is its own.

    Raises ValueError for a name that is no class, or that stands in two pairs.
    """
    numbers = {name: label for label, name in enumerate(classes)}
    labels = np.arange(len(classes), dtype=np.int64)
    problems, seen = [], set()
    for pair in pairs:
        for name in pair:
            if name not in numbers:
                close = get_close_matches(name, classes, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"classes are {', '.join(list(classes)[:5])}, ..."
                problems.append(f"{name!r} is not a class of the set ({hint})")
            elif name in seen:
                problems.append(f"{name!r} stands twice; a class has one mirror image")
            seen.add(name)
    if problems:
        raise ValueError("clip.flip_label_pairs: " + "; ".join(problems))
    for one, other in pairs:
        labels[numbers[one]], labels[numbers[other]] = numbers[other], numbers[one]
    return labels
