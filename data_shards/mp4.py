"""A direct reader of plain H.264 mp4 files, the common case: a fraction of the time that FFmpeg takes to open one.

FFmpeg's opener decodes a picture and makes two decoders before the first packet; on small clips that is more than the
decoding itself. This reads the sample table (ISO/IEC 14496-12, section 8) of files that use nothing unusual, and
returns None for everything else (fragments, several edits, rotation, another codec, damage): those go through FFmpeg.
The tests hold both ways to equal packets, timestamps and pixels.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import av
import numpy as np
from av.video.codeccontext import VideoCodecContext

_IDENTITY_MATRIX = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
_ENTRY_BOXES = {b"avcC", b"pasp", b"btrt", b"colr"}
_TABLE_BOXES = {b"stsd", b"stts", b"ctts", b"stss", b"stsz", b"stsc", b"stco", b"co64", b"sdtp"}
_TRACK_BOXES = {b"tkhd", b"edts", b"mdia", b"udta"}
_MOVIE_BOXES = {b"mvhd", b"trak", b"udta", b"iods", b"free", b"meta"}
# Codes that FFmpeg knows in all three tables: unspecified, BT.709, the two of BT.601.
_COMMON_COLORS = {1, 2, 5, 6}

Boxes = dict[bytes, list[memoryview]]


class _Unusual(Exception):
    """The file uses something that this reader leaves to FFmpeg."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mp4Packets:
    """The packets of a track, made when asked for; indexes like a list of `av.Packet`."""

    payload: memoryview
    """The whole file."""
    offsets: list[int]
    """Byte offset of each packet in the file."""
    sizes: list[int]
    """Bytes of each packet."""
    pts: list[int]
    """Presentation timestamps, distinct, in units of the track; the edit list's constant shift is left out."""
    key_packets: list[int]
    """Numbers of the packets marked as sync samples, ascending."""
    extradata: bytes
    """The avcC box: what the decoder is configured with."""
    color: tuple[int, int, int, int] | None
    """Primaries, transfer, matrix (ISO/IEC 23091-2) and FFmpeg's range, where the container states them."""

    def __len__(self) -> int:
        return len(self.sizes)

    def data(self, number: int) -> memoryview:
        """The bytes of a packet, not copied."""
        offset = self.offsets[number]
        return self.payload[offset : offset + self.sizes[number]]

    def __getitem__(self, number: int) -> av.Packet:
        packet = av.Packet(self.sizes[number])  # allocated by FFmpeg with the padding that its decoders read into
        packet.update(self.data(number))
        packet.pts = self.pts[number]
        return packet

    def make_decoder(self) -> VideoCodecContext:
        """A decoder for these packets, not opened yet."""
        decoder = av.CodecContext.create("h264", "r")
        decoder.extradata = self.extradata
        if self.color is not None:
            decoder.color_primaries, decoder.color_trc, decoder.colorspace, decoder.color_range = self.color
        return decoder


def read_mp4(payload: bytes) -> Mp4Packets | None:
    """The first video track of `payload`, or None where the file is not a plain H.264 mp4."""
    if payload[4:8] != b"ftyp":
        return None
    try:
        return _read_movie(memoryview(payload))
    except (_Unusual, struct.error, ValueError, IndexError, OverflowError):
        return None


def _read_movie(view: memoryview) -> Mp4Packets:
    top = _boxes(view)
    movie = _boxes(_only(top, b"moov"))
    _allow(movie, _MOVIE_BOXES)
    movie_header = _only(movie, b"mvhd")
    _require(b"moof" not in top)
    _require(_header_matrix(movie_header, (36, 48)) == _IDENTITY_MATRIX)
    for track_view in movie.get(b"trak", ()):
        track = _boxes(track_view)
        media = _boxes(_only(track, b"mdia"))
        if bytes(_only(media, b"hdlr")[8:12]) == b"vide":
            _allow(track, _TRACK_BOXES)
            _require(_header_matrix(_only(track, b"tkhd"), (40, 52)) == _IDENTITY_MATRIX)
            return _read_track(view, track, media, movie_header)
    raise _Unusual


def _read_track(view: memoryview, track: Boxes, media: Boxes, movie_header: memoryview) -> Mp4Packets:
    table = _boxes(_only(_boxes(_only(media, b"minf")), b"stbl"))
    _allow(table, _TABLE_BOXES)
    sizes = _sample_sizes(_only(table, b"stsz"))
    count = len(sizes)
    offsets = _sample_offsets(table, sizes)
    _require(count > 0 and bool((sizes > 0).all()) and int((offsets + sizes).max()) <= len(view))
    dts_steps = _runs_of(_only(table, b"stts"), count)
    pts = np.concatenate(([0], np.cumsum(dts_steps[:-1])))
    if b"ctts" in table:
        pts = pts + _runs_of(_only(table, b"ctts"), count).astype(np.int32)  # signed: some writers shift back
    _require(len(np.unique(pts)) == count)
    if b"edts" in track:
        _check_edit(_only(_boxes(_only(track, b"edts")), b"elst"), media, movie_header, pts)
    if b"stss" in table:
        keys = _uint32_table(_only(table, b"stss"), columns=1).ravel() - 1
        _require(keys.size > 0 and int(keys[-1]) < count and bool((np.diff(keys) > 0).all()))
    else:
        keys = np.arange(count)
    extradata, color = _decoder_configuration(_only(table, b"stsd"))
    return Mp4Packets(
        payload=view,
        offsets=offsets.tolist(),
        sizes=sizes.tolist(),
        pts=pts.tolist(),
        key_packets=keys.tolist(),
        extradata=extradata,
        color=color,
    )


def _check_edit(edit: memoryview, media: Boxes, movie_header: memoryview, pts: np.ndarray) -> None:
    """Accept one edit that starts at the first frame shown and runs to the end: it hides nothing."""
    version, entries = edit[0], struct.unpack_from(">I", edit, 4)[0]
    _require(entries == 1)
    duration, start = struct.unpack_from(">Qq" if version == 1 else ">Ii", edit, 8)
    rate = struct.unpack_from(">i", edit, 24 if version == 1 else 16)[0]
    movie_scale, media_scale = _time_scale(movie_header), _time_scale(_only(media, b"mdhd"))
    _require(rate == 1 << 16 and start == int(pts.min()))
    _require(duration * media_scale > (int(pts.max()) - start) * movie_scale)


def _decoder_configuration(descriptions: memoryview) -> tuple[bytes, tuple[int, int, int, int] | None]:
    """The avcC box (ISO/IEC 14496-15, section 5.4.2) and the color of the only sample entry."""
    _require(struct.unpack_from(">I", descriptions, 4)[0] == 1)
    ((kind, entry),) = _iterate_boxes(descriptions[8:])
    _require(kind == b"avc1")
    boxes = _boxes(entry[78:])
    _allow(boxes, _ENTRY_BOXES)
    configuration = bytes(_only(boxes, b"avcC"))
    _require(len(configuration) >= 7 and configuration[0] == 1)
    if b"colr" not in boxes:
        return configuration, None
    color = _only(boxes, b"colr")
    _require(bytes(color[:4]) == b"nclx")
    primaries, transfer, matrix, full_range = struct.unpack_from(">HHHB", color, 4)
    _require({primaries, transfer, matrix} <= _COMMON_COLORS)
    return configuration, (primaries, transfer, matrix, 2 if full_range & 0x80 else 1)


def _sample_sizes(box: memoryview) -> np.ndarray:
    size, count = struct.unpack_from(">II", box, 4)
    if size:
        _require(count <= 1 << 24)
        return np.full(count, size, dtype=np.int64)
    return np.frombuffer(box, dtype=">u4", count=count, offset=12).astype(np.int64)


def _sample_offsets(table: Boxes, sizes: np.ndarray) -> np.ndarray:
    """Byte offset of each sample: samples follow each other within a chunk (ISO/IEC 14496-12, section 8.7)."""
    if b"stco" in table:
        chunks = _uint32_table(_only(table, b"stco"), columns=1).ravel()
    else:
        box = _only(table, b"co64")
        chunks = np.frombuffer(box, ">u8", struct.unpack_from(">I", box, 4)[0], 8).astype(np.int64)
    first_chunk, per_chunk, description = _uint32_table(_only(table, b"stsc"), columns=3).T
    _require(bool((description == 1).all()) and int(first_chunk[0]) == 1)
    samples_in_chunk = np.repeat(per_chunk, np.diff(np.append(first_chunk, len(chunks) + 1)))
    _require(len(samples_in_chunk) == len(chunks) and int(samples_in_chunk.sum()) == len(sizes))
    before = np.concatenate(([0], np.cumsum(sizes)))
    first_samples = np.cumsum(samples_in_chunk) - samples_in_chunk
    return before[:-1] + np.repeat(chunks - before[first_samples], samples_in_chunk)


def _runs_of(box: memoryview, count: int) -> np.ndarray:
    """A run-length table (stts, ctts), one value for each sample."""
    lengths, values = _uint32_table(box, columns=2).T
    _require(int(lengths.sum()) == count)
    return np.repeat(values, lengths)


def _uint32_table(box: memoryview, *, columns: int) -> np.ndarray:
    """A full box of a count and rows of 32-bit numbers: int64 (count, columns)."""
    count = struct.unpack_from(">I", box, 4)[0]
    return np.frombuffer(box, ">u4", count * columns, 8).astype(np.int64).reshape(count, columns)


def _time_scale(header: memoryview) -> int:
    """Units in a second, of a movie's or a media's header box."""
    return struct.unpack_from(">I", header, 20 if header[0] == 1 else 12)[0]


def _header_matrix(header: memoryview, offsets: tuple[int, int]) -> bytes:
    """The transformation matrix of a header box, at one of two offsets by the box's version (0, 1)."""
    offset = offsets[header[0] == 1]
    return bytes(header[offset : offset + 36])


def _boxes(view: memoryview) -> Boxes:
    found: Boxes = {}
    for kind, content in _iterate_boxes(view):
        found.setdefault(kind, []).append(content)
    return found


def _iterate_boxes(view: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    position = 0
    while position < len(view):
        size, kind = struct.unpack_from(">I4s", view, position)
        header = 8
        if size == 1:
            size, header = struct.unpack_from(">Q", view, position + 8)[0], 16
        _require(size >= header and position + size <= len(view))
        yield kind, view[position + header : position + size]
        position += size


def _only(boxes: Boxes, kind: bytes) -> memoryview:
    found = boxes.get(kind, [])
    _require(len(found) == 1)
    return found[0]


def _allow(boxes: Boxes, kinds: set[bytes]) -> None:
    _require(boxes.keys() <= kinds)


def _require(condition: bool) -> None:
    if not condition:
        raise _Unusual
