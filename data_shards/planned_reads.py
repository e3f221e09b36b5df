"""Which bytes a clip will be made of, before it is made: what a reader is told to read ahead.

    reader.want((sample_id, clip_reads(manifest, sample_id, clip=clip, training=True, seed=0, epoch=3)) for ...)

`read_clip` with the same arguments then asks for the same bytes: both draw the frames from (seed, epoch, sample_id).
"""

from __future__ import annotations

from data_shards.clip_config import ClipConfig
from data_shards.forms.frames_file import read_table, table_bytes
from data_shards.manifest import Manifest
from data_shards.sampling import sample_generator
from data_shards.storage import Reads


def clip_reads(
    manifest: Manifest, sample_id: int, *, clip: ClipConfig, training: bool, seed: int = 0, epoch: int = 0
) -> Reads:
    """The reads of one clip, as `ShardReader.want` takes them: a video whole; of stored frames the table, then frames.

    Costs nothing until the first read: the frames are drawn in the thread that goes through it. Raises DataError there
    where the table is damaged, as the clip's own reading will.
    """
    if manifest.form == "video":
        return whole_sample(manifest, sample_id)
    return _frame_reads(manifest, sample_id, clip, (seed, epoch) if training else None)


def whole_sample(manifest: Manifest, sample_id: int) -> Reads:
    """One read of all bytes of a sample."""
    yield [(0, int(manifest.samples["size"][sample_id]))]


def _frame_reads(manifest: Manifest, sample_id: int, clip: ClipConfig, seed_and_epoch: tuple[int, int] | None) -> Reads:
    row = manifest.samples[sample_id]
    num_frames, size = int(row["num_frames"]), int(row["size"])
    (content,) = yield [(0, min(table_bytes(num_frames), size))]
    table = read_table(content, size=size)
    generator = None if seed_and_epoch is None else sample_generator(*seed_and_epoch, sample_id)
    views = clip.views(row, len(table), generator)
    numbers = sorted({int(number) for view in views for number in view.frame_numbers})
    yield table.ranges(numbers)
