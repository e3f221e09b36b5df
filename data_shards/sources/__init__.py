"""Where samples and their labels come from; `data_shards.sources.reading` says which layouts are read."""

from data_shards.sources.base import Content, Missing, Source, SourceSample
from data_shards.sources.reading import read_source
from data_shards.sources.splits import assign_splits

__all__ = ["Content", "Missing", "Source", "SourceSample", "assign_splits", "read_source"]
