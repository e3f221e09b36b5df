"""What each form of a set would cost, measured on a few of its samples, and which one to take.

    needs = Needs(cores=64, storage_megabytes_per_second=2000, target_clips_per_second=3000)
    plan = plan_forms([path.read_bytes for path in paths], encoding=EncodingConfig(), needs=needs, num_samples=240_000)
    print(describe_plan(plan))             # data_shards.forms.plan_table

A clip is what a training worker makes: random frames, a random crop of them, scaled. Reading from the storage itself is
not measured: the bandwidth is the user's figure, divided by the bytes that each form reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean
from time import thread_time

import numpy as np
import torch

from data_shards.clips import ClipConfig
from data_shards.errors import FILE_ERRORS, DataError
from data_shards.forms.encoding import DEFAULT_GOP, Encoded, EncodingConfig, SampleSource, encode_sample
from data_shards.forms.opening import open_frames
from data_shards.forms.payload import MemoryPayload
from data_shards.framing import apply_framing
from data_shards.sampling import sample_generator

_CLIP = ClipConfig()
_CLIPS_A_SAMPLE = 3


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What the set is to be read with, and how fast."""

    cores: int
    """Processor cores that decode, of all nodes that read the set at the same time."""
    storage_megabytes_per_second: float | None = None
    """What the storage gives to all of them together (1 MB = 10^6 bytes); None: it is not the limit."""
    target_clips_per_second: float | None = None
    """Clips that the training takes; None: as many as there can be."""

    def __post_init__(self) -> None:
        for name in ("cores", "storage_megabytes_per_second", "target_clips_per_second"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"plan: {name} is {value}, it must be positive")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One sample in one form."""

    stored_bytes: int
    """Size of its tar member."""
    read_bytes: float
    """Bytes read for a clip."""
    decode_ms: float
    """CPU milliseconds of one core for a clip: to find, decode, crop and scale its frames."""
    encode_seconds: float
    """CPU seconds of one core to make it from the source."""


@dataclass(frozen=True, kw_only=True)
class FormCosts:
    """What a form costs, the mean over the measured samples."""

    encoding: EncodingConfig
    """The form."""
    stored_megabytes: float
    """Of a sample, on disk."""
    read_kilobytes: float
    """Of a training clip."""
    decode_ms: float
    """CPU milliseconds of a training clip, one core."""
    encode_seconds: float
    """CPU seconds to pack a sample, one core."""

    def decode_limit(self, needs: Needs) -> float:
        """Clips/s that the cores decode."""
        return needs.cores * 1000 / self.decode_ms

    def storage_limit(self, needs: Needs) -> float:
        """Clips/s that the storage gives."""
        if needs.storage_megabytes_per_second is None:
            return float("inf")
        return needs.storage_megabytes_per_second * 1000 / self.read_kilobytes

    def clips_per_second(self, needs: Needs) -> float:
        """The smaller of both limits."""
        return min(self.decode_limit(needs), self.storage_limit(needs))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The forms with their costs, and what they are wanted for."""

    costs: tuple[FormCosts, ...]
    """The forms that were measured."""
    needs: Needs
    """What the set is to be read with."""
    clip: ClipConfig
    """What was made of them."""
    num_measured: int
    """Samples that the costs are the mean of."""
    num_samples: int
    """Samples of the whole set."""
    rejected: tuple[str, ...] = ()
    """Why samples were left out of the measurement."""

    def recommended(self) -> FormCosts:
        """Of the forms that reach the target the smallest on disk, those with all frames before those with some.

        If none reaches it (or there is none), the same choice among the fastest: those within a tenth of the fastest,
        which is less than what measuring again may change.
        """
        rates = {costs: costs.clips_per_second(self.needs) for costs in self.costs}
        wanted = self.needs.target_clips_per_second
        fastest = max(rates.values())
        if wanted is None or fastest < wanted:
            wanted = 0.9 * fastest
        fitting = [costs for costs, rate in rates.items() if rate >= wanted]
        return min(fitting, key=lambda costs: (costs.encoding.frames is not None, costs.stored_megabytes))


def candidates(encoding: EncodingConfig, sample: SampleSource) -> list[EncodingConfig]:
    """The forms to choose from for sources such as `sample`.

    Picture size, group length, number of frames and quality are those of `encoding` where it has them.
    """
    is_video = isinstance(sample, bytes)
    side = encoding.short_side or (256 if is_video else None)
    quality, frames = encoding.quality, encoding.frames or 32
    forms = [EncodingConfig(), EncodingConfig(short_side=side, gop=encoding.gop or DEFAULT_GOP, crf=encoding.crf)]
    forms = forms if is_video else []
    few = (None, frames) if is_video or len(sample) > 1 else (None,)
    forms += [EncodingConfig(store_as="jpeg", short_side=side, quality=quality, frames=number) for number in few]
    return forms + [EncodingConfig(store_as="raw", short_side=side, frames=number) for number in few]


def plan_forms(
    samples: Sequence[Callable[[], SampleSource]],
    *,
    encoding: EncodingConfig,
    needs: Needs,
    num_samples: int,
    clip: ClipConfig = _CLIP,
    progress: Callable[[int, int], None] | None = None,
) -> Plan:
    """Measure the forms (see `candidates`) on `samples`, each a function that reads one, of a set of `num_samples`.

    A sample that cannot be packed is left out of the measurement and listed.

    Raises DataError where that is all of them; OSError where a disk or network does not give what is there.
    """
    measured: dict[EncodingConfig, list[Measured]] = {}
    rejected: list[str] = []
    for number, read in enumerate(samples):
        try:
            sample = read()
            rows = {form: measure_form(sample, form, clip=clip) for form in candidates(encoding, sample)}
        except DataError as error:
            rejected.append(str(error))
        except FILE_ERRORS as error:
            rejected.append(f"{error.filename} cannot be read: {error.strerror}")
        else:
            for form, row in rows.items():
                measured.setdefault(form, []).append(row)
        if progress:
            progress(number + 1, len(samples))
    if not measured:
        reason = f", the first because: {rejected[0]}" if rejected else ""
        raise DataError(f"plan: none of {len(samples)} samples can be packed{reason}")
    return Plan(
        costs=tuple(_mean(form, rows) for form, rows in measured.items()),
        needs=needs,
        clip=clip,
        num_measured=len(samples) - len(rejected),
        num_samples=num_samples,
        rejected=tuple(rejected),
    )


def measure_form(sample: SampleSource, encoding: EncodingConfig, *, clip: ClipConfig = _CLIP) -> Measured:
    """Encode one sample and make clips of it; raises DataError as `encode_sample` does."""
    started = thread_time()
    encoded = encode_sample(sample, encoding)
    encode_seconds = thread_time() - started
    payload = MemoryPayload(encoded.payload)
    payload.num_frames = encoded.info.num_frames
    with _one_thread():
        _make_clip(encoded, payload, clip, 0)  # the first finds caches cold
        payload.bytes_read, started = 0, thread_time()
        for epoch in range(1, _CLIPS_A_SAMPLE + 1):
            _make_clip(encoded, payload, clip, epoch)
        decode_seconds = thread_time() - started
    return Measured(
        stored_bytes=len(encoded.payload),
        read_bytes=payload.bytes_read / _CLIPS_A_SAMPLE,
        decode_ms=1000 * decode_seconds / _CLIPS_A_SAMPLE,
        encode_seconds=encode_seconds,
    )


def _make_clip(encoded: Encoded, payload: MemoryPayload, clip: ClipConfig, epoch: int) -> None:
    """What a worker does for a training clip, but for its augmentation."""
    source = open_frames(encoded.form, payload)
    row = np.zeros(1, dtype=[("height", "<u2"), ("width", "<u2")])[0]  # what of the manifest the choice depends on
    row["height"], row["width"] = encoded.info.height, encoded.info.width
    view = clip.views(row, source.num_frames, sample_generator(0, epoch, 0))[0]
    decoded = source.decode(view.frame_numbers, view.framing)
    if not decoded.framed:
        apply_framing(torch.from_numpy(decoded.frames), view.framing)


def _mean(encoding: EncodingConfig, rows: Sequence[Measured]) -> FormCosts:
    return FormCosts(
        encoding=encoding,
        stored_megabytes=fmean(row.stored_bytes for row in rows) / 1e6,
        read_kilobytes=fmean(row.read_bytes for row in rows) / 1e3,
        decode_ms=fmean(row.decode_ms for row in rows),
        encode_seconds=fmean(row.encode_seconds for row in rows),
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """PyTorch's operators on one thread, as in a worker of the loader."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
