"""The errors of `data_shards` that bad input causes: one line each, for a person to act on.

What the machine did wrong (a full disk, a denied file) stays an `OSError` and is not wrapped here.
"""

from __future__ import annotations

from typing import Any

FILE_ERRORS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
"""The kinds of OSError that are one file's: others can be read."""


class DataError(ValueError):
    """Bad input in the data; the message says what, the value, where, and what to do next."""


class SampleError(DataError):
    """A sample that is damaged or cannot be decoded; the message names its shard and key."""


class ManifestError(DataError):
    """A packed split that is absent, damaged, or does not match its shards."""


class PackError(DataError):
    """Videos that cannot be packed as asked.

    `rejected` lists the `data_shards.pack.Rejected` rows, where single files were the cause.
    """

    rejected: tuple[Any, ...] = ()
