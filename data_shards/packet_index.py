"""The packets of one video and the order in which their frames are shown.

A video stores its packets in decoding order; B-frames are shown in another. Frame `i` here is the `i`-th frame shown:
the packet with the `i`-th smallest presentation timestamp (pts), whatever the distance between timestamps is. Demuxing
reads no pixel, so it tells how many frames there are and which packets lead to a frame before anything is decoded.
"""

import io
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import av
from av.video.codeccontext import VideoCodecContext

from data_shards.errors import DataError
from data_shards.mp4 import Mp4Packets, read_mp4

# The first packet tells the pixel format; looking further to estimate a frame rate would cost as much as decoding.
_OPEN_OPTIONS = {"probesize": "32", "analyzeduration": "0", "fpsprobesize": "0"}


@dataclass(frozen=True, kw_only=True, slots=True)
class PacketIndex:
    """All video packets of one file, in decoding order, with a decoder that takes them."""

    packets: list[av.Packet] | Mp4Packets
    """Packets in decoding order, the empty one at the end left out."""
    pts: list[int]
    """Presentation timestamp of each packet; empty where the file does not have one for each (then decode it all)."""
    shown: list[int]
    """Packet number of frame 0, 1, 2, ...; empty where `pts` is."""
    key_packets: list[int]
    """Numbers of the packets where decoding can start, ascending."""
    decoder: VideoCodecContext
    """A fresh decoder for these packets."""

    def data(self, number: int) -> memoryview:
        """The encoded bytes of a packet."""
        if isinstance(self.packets, Mp4Packets):
            return self.packets.data(number)
        return memoryview(self.packets[number])


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """Packets `start` to `stop - 1`, to be decoded in one go from a key packet."""

    start: int
    """Number of the key packet that decoding starts from."""
    stop: int
    """One past the last packet that is needed."""


def index_packets(payload: bytes) -> PacketIndex:
    """Demux the first video stream of `payload`, a whole file of any container that FFmpeg reads.

    Raises DataError (without saying which sample, the caller knows) where the bytes are no video.
    """
    plain = read_mp4(payload)
    if plain is not None:
        return _build_index(plain, plain.pts, plain.key_packets, plain.make_decoder(), hidden=frozenset())
    return demux(payload)


def demux(payload: bytes) -> PacketIndex:
    """`index_packets` through FFmpeg's demuxers, whatever the container is."""
    try:
        with av.open(io.BytesIO(payload), mode="r", options=dict(_OPEN_OPTIONS), metadata_errors="ignore") as container:
            if not container.streams.video:
                raise DataError("the file has no video stream")
            stream = container.streams.video[0]
            decoder = stream.codec_context
            if decoder is None:
                raise DataError("this build of FFmpeg has no decoder for the video's codec")
            packets = [packet for packet in container.demux(stream) if packet.size]
            only_decoding_times = container.format.name in ("avi", "asf") and decoder.name in ("h264", "hevc")
    except (av.error.FFmpegError, UnicodeDecodeError) as error:
        raise DataError(f"the video cannot be opened ({describe_av_error(error)})") from error
    hidden = frozenset(
        number for number, packet in enumerate(packets) if packet.is_discard or _makes_no_frame(decoder.name, packet)
    )
    keys = [number for number, packet in enumerate(packets) if packet.is_keyframe]
    # Those two containers store when a packet is decoded; the pts that FFmpeg reports for them is made up.
    pts = [None if only_decoding_times else packet.pts for packet in packets]
    return _build_index(packets, pts, keys, decoder, hidden=hidden)


def plan_runs(index: PacketIndex, frames: Sequence[int]) -> list[Run]:
    """The fewest stretches of packets that show `frames` (frame numbers): ascending, disjoint, each from a key packet.

    A frame needs the packets since the last key packet before it in decoding order. A leading picture of an open group
    of pictures (decoded after its key packet, shown before it) refers to the group before, so it is decoded from that
    one's key packet.
    """
    stops: dict[int, int] = {}
    for frame in frames:
        packet = index.shown[frame]
        group = max(bisect_right(index.key_packets, packet) - 1, 0)
        if group > 0 and index.pts[packet] < index.pts[index.key_packets[group]]:
            group -= 1
        start = index.key_packets[group]
        stops[start] = max(stops.get(start, 0), packet + 1)
    runs: list[Run] = []
    for start in sorted(stops):
        if runs and start < runs[-1].stop:
            runs[-1] = Run(start=runs[-1].start, stop=max(stops[start], runs[-1].stop))
        else:
            runs.append(Run(start=start, stop=stops[start]))
    return runs


def describe_av_error(error: Exception) -> str:
    """FFmpeg's own words, on one line."""
    return " ".join(str(getattr(error, "strerror", None) or error or type(error).__name__).split())


def _build_index(
    packets: list[av.Packet] | Mp4Packets,
    pts: Sequence[int | None],
    keys: list[int],
    decoder: VideoCodecContext,
    *,
    hidden: frozenset[int],
) -> PacketIndex:
    if not packets:
        raise DataError("the video stream has no packets")
    decoder.thread_count = 1  # a worker process is one thread; FFmpeg would start one a core
    if decoder.name == "h264":
        # Without a declared reordering depth the decoder guesses it and may drop frames; this makes it wait instead.
        decoder.options = {"strict": "strict"}
    known_pts = [value for value in pts if value is not None]
    if not keys or len(set(known_pts)) < len(packets):
        return PacketIndex(packets=packets, pts=[], shown=[], key_packets=keys, decoder=decoder)
    # Nothing refers back beyond the first key packet: what is shown before it (a video cut there) cannot be decoded.
    start = known_pts[keys[0]]
    shown = sorted(range(keys[0], len(packets)), key=known_pts.__getitem__)
    if known_pts[shown[0]] < start or hidden:
        shown = [number for number in shown if known_pts[number] >= start and number not in hidden]
    if not shown:
        raise DataError("0 frames")
    return PacketIndex(packets=packets, pts=known_pts, shown=shown, key_packets=keys, decoder=decoder)


def _makes_no_frame(codec_name: str, packet: av.Packet) -> bool:
    """True for VP8's alternate reference frames (RFC 6386, section 9.1, show_frame)."""
    return codec_name in ("vp8", "libvpx") and not memoryview(packet)[0] & 0x10
