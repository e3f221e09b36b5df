"""Opens a sample in the form that it is stored in."""

from __future__ import annotations

from data_shards.decoding.choice import DecodingConfig, open_video
from data_shards.forms.base import Form, FrameSource
from data_shards.forms.frames_file import FramesFile
from data_shards.forms.payload import SamplePayload


def open_frames(form: Form, payload: SamplePayload, decoding: DecodingConfig | None = None) -> FrameSource:
    """The frames of a sample stored as `form`, decoded as `decoding` says.

    Raises DataError where the bytes are not of that form, without saying which sample; OSError as the payload does.
    """
    decoding = decoding or DecodingConfig()
    if form == "video":
        return open_video(payload.whole(), decoding)
    return FramesFile(payload, form, jpeg_scaling=decoding.jpeg)
