"""Videos to shards and shards to clips: manifest, sample order, reading, decoding, transforms, loader.

Imports nothing from `launch`, `dist_train` or `models`: a rank and a world size are integers here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from data_shards.webdataset_decoding import webdataset_decoder

__all__ = ["webdataset_decoder"]


def __getattr__(name: str) -> object:
    """The decoder for webdataset, imported when it is asked for: it needs PyTorch and FFmpeg, most modules do not."""
    if name != "webdataset_decoder":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from data_shards.webdataset_decoding import webdataset_decoder

    return webdataset_decoder
