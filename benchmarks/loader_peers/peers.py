"""The peers, each used as its documentation says, at its best known setting for this work."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks.loader_peers.work import (
    BATCH_CLIPS,
    PREFETCH_BATCHES,
    Decoder,
    Place,
    Stream,
    clip_of_anyone,
    in_worker,
    with_decord,
    with_pyav,
    with_torchcodec,
)

_SHUFFLE_BUFFER = 64


class _Files(Dataset):
    """Files of class folders, read whole and decoded."""

    def __init__(self, folder: Path, decode: Decoder) -> None:
        self._paths = sorted(folder.glob("*/*.mp4"))
        self._decode = decode

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        return clip_of_anyone(self._paths[index].read_bytes(), self._decode)


def _loader(dataset: Any, *, workers: int, **options: Any) -> DataLoader[Any]:
    return DataLoader(
        dataset,
        num_workers=workers,
        prefetch_factor=PREFETCH_BATCHES if workers else None,
        worker_init_fn=in_worker,
        drop_last=options.get("batch_size") is not None,
        **options,
    )


def _endless(make: Callable[[], Any]) -> Stream:
    """Epoch after epoch of a loader whose workers stay."""
    loader = make()
    while True:
        yield from loader


def _dropping(batches: Stream, position: int) -> Stream:
    """The replay: batches before `position` are made and thrown away."""
    for _ in range(position // BATCH_CLIPS):
        next(batches)
    yield from batches


@contextmanager
def files_torchcodec(place: Place, workers: int, position: int = 0) -> Iterator[Stream]:
    """A plain map-style Dataset over files with PyTorch's DataLoader; it has no position: resuming replays."""
    dataset = _Files(place.files, with_torchcodec)
    make = partial(
        _loader, dataset, workers=workers, batch_size=BATCH_CLIPS, shuffle=True, persistent_workers=workers > 0
    )
    yield _dropping(_endless(make), position)


@contextmanager
def files_decord(place: Place, workers: int, position: int = 0) -> Iterator[Stream]:
    """The same with decord."""
    dataset = _Files(place.files, with_decord)
    make = partial(
        _loader, dataset, workers=workers, batch_size=BATCH_CLIPS, shuffle=True, persistent_workers=workers > 0
    )
    yield _dropping(_endless(make), position)


def _webdataset(place: Place, workers: int, position: int, decode: Decoder) -> Stream:
    import webdataset

    shards = sorted(map(str, place.shards.glob("*.tar")))
    # Shards drawn at random without end, as its documentation advises for training.
    dataset = (
        webdataset.WebDataset(shards, resampled=True, shardshuffle=False, seed=0, empty_check=False)
        .shuffle(_SHUFFLE_BUFFER)
        .to_tuple("mp4", "cls")
        .map_tuple(partial(clip_of_anyone, decode=decode), int)
        .batched(BATCH_CLIPS, partial=False)
    )
    prefetch = PREFETCH_BATCHES if workers else None
    loader = webdataset.WebLoader(
        dataset, batch_size=None, num_workers=workers, prefetch_factor=prefetch, worker_init_fn=in_worker
    )
    return _dropping(iter(loader), position)


@contextmanager
def webdataset_pyav(place: Place, workers: int, position: int = 0) -> Iterator[Stream]:
    """WebDataset with PyAV; it has no position: resuming replays."""
    yield _webdataset(place, workers, position, with_pyav)


@contextmanager
def webdataset_torchcodec(place: Place, workers: int, position: int = 0) -> Iterator[Stream]:
    """WebDataset with TorchCodec."""
    yield _webdataset(place, workers, position, with_torchcodec)


@contextmanager
def litdata_torchcodec(place: Place, workers: int, position: int = 0) -> Iterator[Stream]:
    """LitData's StreamingDataset and StreamingDataLoader with TorchCodec; it resumes from its state."""
    import litdata

    class Clips(litdata.StreamingDataset):
        """Bytes to clips."""

        def __getitem__(self, index: Any) -> torch.Tensor:
            return clip_of_anyone(bytes(super().__getitem__(index)["video"]), with_torchcodec)

    def make() -> Any:
        dataset = Clips(input_dir=str(place.litdata), shuffle=True, drop_last=True, seed=0)
        return litdata.StreamingDataLoader(
            dataset,
            batch_size=BATCH_CLIPS,
            num_workers=workers,
            prefetch_factor=PREFETCH_BATCHES,
            worker_init_fn=in_worker,
            persistent_workers=workers > 0,
        )

    if not position:
        yield _endless(make)
        return
    state_file = place.litdata.parent / f"litdata_state_{position}_{workers}.pt"
    if not state_file.is_file():
        first = make()
        batches = iter(first)
        for _ in range(position // BATCH_CLIPS):
            next(batches)
        torch.save(first.state_dict(), state_file)
    resumed = make()
    resumed.load_state_dict(torch.load(state_file, weights_only=False))
    yield iter(resumed)


def _anything(name: str) -> type:
    """An empty class for any name that a stub is asked for."""
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {})


def stub_torchvision() -> None:
    """MosaicML's streaming imports torchvision at its top and needs none of it here; its CPU builds may not import."""
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        for name in (
            "torchvision",
            "torchvision.transforms",
            "torchvision.transforms.functional",
            "torchvision.datasets",
        ):
            stub = types.ModuleType(name)
            stub.__spec__ = ModuleSpec(name, loader=None, is_package=True)
            stub.__path__ = []
            stub.__getattr__ = _anything  # type: ignore[method-assign]
            sys.modules[name] = stub


@contextmanager
def mosaicml_torchcodec(place: Place, workers: int, position: int = 0) -> Iterator[Stream]:
    """MosaicML's StreamingDataset with PyTorch's DataLoader and TorchCodec; it resumes from its state."""
    stub_torchvision()
    import streaming

    class Clips(streaming.StreamingDataset):
        """Bytes to clips."""

        def __getitem__(self, at: Any) -> torch.Tensor:
            return clip_of_anyone(super().__getitem__(at)["video"], with_torchcodec)

    streaming.base.util.clean_stale_shared_memory()
    dataset = Clips(local=str(place.mds), shuffle=True, batch_size=BATCH_CLIPS, shuffle_seed=0)
    if position:
        dataset.load_state_dict(dataset.state_dict(num_samples=position, from_beginning=True))
    yield _endless(partial(_loader, dataset, workers=workers, batch_size=BATCH_CLIPS, persistent_workers=workers > 0))


def write_litdata(files: Path, folder: Path) -> None:
    """The files as LitData's chunks of 8 MB."""
    import litdata

    litdata.optimize(
        fn=_litdata_sample, inputs=sorted(map(str, files.glob("*/*.mp4"))), output_dir=str(folder), chunk_bytes="8MB",
        num_workers=1, start_method="fork",
    )  # fmt: skip


def _litdata_sample(path: str) -> dict[str, Any]:
    return {"video": Path(path).read_bytes(), "label": 0}


def write_mds(files: Path, folder: Path) -> None:
    """The files as MosaicML's shards of 8 MB."""
    stub_torchvision()
    import streaming

    with streaming.MDSWriter(out=str(folder), columns={"video": "bytes", "label": "int"}, size_limit=8_000_000) as out:
        for path in sorted(files.glob("*/*.mp4")):
            out.write({"video": path.read_bytes(), "label": 0})
