"""Several packed splits read as one: the samples of all, numbered one set after the other."""

from collections.abc import Sequence

import numpy as np

from data_shards.interleaving import whole_shares
from data_shards.manifest import Manifest
from data_shards.storage import below


class Mixture:
    """Splits with the same classes, and each one's share of the training clips.

    Sample ids count through all sets: `sample_ids(sets, samples)` and `locate(sample_id)` go between these ids and a
    set's own rows. `shares` in any unit; none: in proportion to the sets' sizes. Raises ValueError where the sets do
    not fit together.
    """

    def __init__(self, manifests: Sequence[Manifest], shares: Sequence[float] = ()) -> None:
        if not manifests:
            raise ValueError("a mixture needs at least one packed split")
        if shares and len(shares) != len(manifests):
            raise ValueError(f"{len(shares)} shares are given for {len(manifests)} sets: give one for each, or none")
        first = manifests[0]
        for other in manifests[1:]:
            if other.classes != first.classes:
                difference = _difference(first.classes, other.classes)
                raise ValueError(
                    f"{first.location} and {other.location} cannot be mixed: {difference}; pack both with the same "
                    "classes"
                )
        if shares:
            whole_shares(shares)  # says what is wrong with them
        self.manifests = tuple(manifests)
        self.shares = tuple(shares)
        self.classes, self.split = first.classes, first.split
        self._firsts = np.cumsum([0, *(len(manifest) for manifest in manifests)])

    def __len__(self) -> int:
        return int(self._firsts[-1])

    @property
    def labels(self) -> tuple[np.ndarray, ...]:
        """Labels of each set's samples: views of the manifests' columns, nothing is read."""
        return tuple(manifest.samples["label"] for manifest in self.manifests)

    def sample_ids(self, sets: np.ndarray, samples: np.ndarray) -> np.ndarray:
        """Ids of rows `samples` of `sets`: int64, same shape; what is negative stays as it is."""
        return np.where(samples < 0, samples, self._firsts[sets] + samples)

    def locate(self, sample_id: int) -> tuple[int, int]:
        """Number of the set that holds a sample, and the sample's row there."""
        if not 0 <= sample_id < len(self):
            raise ValueError(f"sample {sample_id} does not exist: the sets hold samples 0 to {len(self) - 1}")
        number = int(np.searchsorted(self._firsts, sample_id, side="right")) - 1
        return number, sample_id - int(self._firsts[number])

    def key(self, sample_id: int) -> str:
        """Key of a sample in its set."""
        number, row = self.locate(sample_id)
        return self.manifests[number].key(row)

    def describe(self, sample_id: int) -> str:
        """ "FOLDER/shard-000003.tar:KEY", for messages about a sample."""
        number, row = self.locate(sample_id)
        return below(self.manifests[number].location, self.manifests[number].describe(row))


def as_mixture(sets: Manifest | Mixture) -> Mixture:
    """A mixture as it is; one split as a mixture of one, whose sample ids are the split's own."""
    return sets if isinstance(sets, Mixture) else Mixture([sets])


def _difference(first: Sequence[str], second: Sequence[str]) -> str:
    missing, more = sorted(set(first) - set(second)), sorted(set(second) - set(first))
    if missing:
        return f"the second lacks class {missing[0]!r}"
    if more:
        return f"the first lacks class {more[0]!r}"
    return "their classes have different numbers"
