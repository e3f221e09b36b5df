"""Few frames of a video, decoded from the nearest key frames: the pixels that decoding everything would give.

    video = Video(payload)
    decoded = video.decode([0, 8, 16, 24])        # uint8 (4, H, W, 3)

Groups of pictures without a wanted frame are never touched, decoding stops at the last packet that a wanted frame
needs, and H.264 pictures that nothing refers to are left out unless wanted. Frame numbers count the frames as shown,
from the packets' timestamps (`data_shards.packet_index`), so B-frames, open groups and variable frame rates are exact.
One thread: parallelism comes from worker processes.
"""

from collections.abc import Sequence

import av
import numpy as np

from data_shards.decoding.pixels import RgbFrames
from data_shards.errors import DataError
from data_shards.forms.base import DecodedFrames
from data_shards.framing import Framing
from data_shards.packet_index import PacketIndex, Run, describe_av_error, index_packets, plan_runs


class Video:
    """One encoded video in memory, indexed but not decoded.

    Raises DataError where the bytes are not a video; the message does not say which sample, its caller knows.
    """

    def __init__(self, payload: bytes) -> None:
        self._index = index_packets(payload)
        # A file without usable timestamps (some AVI) tells its frames only by decoding them all, in order.
        self._all_frames = None if self._index.pts else self._decode_all()

    @property
    def num_frames(self) -> int:
        """Frames shown from start to end."""
        return len(self._index.shown) if self._all_frames is None else len(self._all_frames)

    def decode(self, frame_numbers: Sequence[int] | np.ndarray, framing: Framing | None = None) -> DecodedFrames:
        """Decode frames 0 <= number < `num_frames`, in the order given; a number may repeat.

        With a `framing` that cuts a box out of pictures at their own size, the cut and the scaling are done here, and
        only the box becomes RGB; the pixels are those of `apply_framing` on whole pictures, bit for bit.

        Raises DataError where a wanted frame cannot be decoded, ValueError for a number that does not exist.
        """
        numbers = [int(number) for number in frame_numbers]
        if not numbers or min(numbers) < 0 or max(numbers) >= self.num_frames:
            raise ValueError(f"frames {numbers} were asked of a video with frames 0 to {self.num_frames - 1}")
        wanted = RgbFrames(numbers, framing)
        if self._all_frames is None:
            frames_decoded = self._decode_wanted(wanted)
        else:
            frames_decoded = len(self._all_frames)
            for number in sorted(wanted.missing):
                wanted.put(number, self._all_frames[number])
        frames, framed = wanted.finish()
        return DecodedFrames(frames=frames, frames_decoded=frames_decoded, framed=framed)

    def _decode_wanted(self, wanted: RgbFrames) -> int:
        """Decode the wanted frames; returns how many the decoder put out."""
        index = self._index
        numbers = sorted(wanted.missing)
        by_pts = {index.pts[index.shown[number]]: number for number in numbers}
        frames_decoded = 0
        for run in plan_runs(index, numbers):
            frames_decoded += self._decode_run(run, by_pts, wanted, drop_unreferenced=True)
        if wanted.missing:
            # The container marked a packet as a starting point that the decoder does not accept: start from the top.
            everything = Run(start=0, stop=len(index.packets))
            frames_decoded += self._decode_run(everything, by_pts, wanted, drop_unreferenced=False)
        if wanted.missing:
            number = min(wanted.missing)
            raise DataError(f"frame {number} of {self.num_frames} cannot be decoded, the video is damaged")
        return frames_decoded

    def _decode_run(self, run: Run, by_pts: dict[int, int], wanted: RgbFrames, *, drop_unreferenced: bool) -> int:
        """Decode one run, keeping the frames in `by_pts`; returns how many frames came out."""
        index, decoder = self._index, self._index.decoder
        length_bytes = _nal_length_bytes(index) if drop_unreferenced else 0
        frames_decoded = 0
        for number in range(run.start, run.stop + 1):
            if number == run.stop:
                packet = None  # put out what is held back for reordering
            elif (
                length_bytes and index.pts[number] not in by_pts and _is_unreferenced(index.data(number), length_bytes)
            ):
                continue
            else:
                packet = index.packets[number]
            try:
                frames = decoder.decode(packet)
            except av.error.EOFError:
                break
            except av.error.FFmpegError:
                continue  # a damaged picture: an error only if a wanted frame is then missing
            frames_decoded += len(frames)
            for frame in frames:
                frame_number = None if frame.pts is None else by_pts.get(frame.pts)
                if frame_number is not None and not frame.is_corrupt:
                    wanted.put(frame_number, frame)
        decoder.flush_buffers()
        return frames_decoded

    def _decode_all(self) -> list[av.VideoFrame]:
        frames: list[av.VideoFrame] = []
        packets = self._index.packets
        for number in range(len(packets) + 1):
            try:
                frames.extend(self._index.decoder.decode(packets[number] if number < len(packets) else None))
            except av.error.FFmpegError as error:
                raise DataError(f"the video cannot be decoded ({describe_av_error(error)})") from error
        if not frames:
            raise DataError("the video has no frame that can be decoded")
        return frames


def _nal_length_bytes(index: PacketIndex) -> int:
    """Bytes of a NAL unit's length in the packets (ISO/IEC 14496-15); 0 where they are not H.264 in that form."""
    extradata = index.decoder.extradata
    if index.decoder.name != "h264" or extradata is None or len(extradata) < 7 or extradata[0] != 1:
        return 0
    return (extradata[4] & 3) + 1


def _is_unreferenced(data: memoryview, length_bytes: int) -> bool:
    """True where no other picture refers to this H.264 picture (nal_ref_idc is 0, ITU-T H.264 section 7.4.1).

    Such a picture does not enter the decoded picture buffer's state, so leaving it out changes no other picture.
    """
    position, end = 0, len(data)
    has_picture = False
    while position + length_bytes < end:
        size = int.from_bytes(data[position : position + length_bytes], "big")
        header = data[position + length_bytes]
        kind = header & 0x1F
        if kind in (1, 2, 3, 4, 5):
            if header & 0x60:
                return False
            has_picture = True
        elif kind in (7, 8, 13, 15):  # parameter sets, which later pictures need
            return False
        position += length_bytes + size
    return has_picture
