"""The first thing an entry does: are the four packages ours?

`launch` and `models` are common names. A folder of that name in the working directory (or an installed package) would
be imported in place of ours, and fail later in a way that nobody understands.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

OWN_PACKAGES = ("launch", "dist_train", "data_shards", "models")


def check_own_packages() -> None:
    """Raises ImportError naming the folder that shadows one of our packages, if any does."""
    home = Path(__file__).resolve().parent.parent
    for name in OWN_PACKAGES:
        spec = importlib.util.find_spec(name)
        found = Path(next(iter(spec.submodule_search_locations or [""]))).resolve() if spec else None
        if found != home / name:
            where = f"{found} is imported in its place" if found else "it is not installed"
            raise ImportError(
                f"reelscale's package '{name}' is not {home / name}: {where}; run the console script `reelscale` from "
                "another folder, or set PYTHONSAFEPATH=1"
            )
