"""The ledger: every second and every byte of every rank, from process start to exit.

`rows` names the rows, `clock` stamps time on the host or on the CUDA stream, `recorder` assigns the time between two
stamps to a row and writes one JSON-lines file a rank, `summary` reads these files back.

Communication: `flights` follows each collective, `bandwidth` says what it sends and how fast it was, `host` reads the
operating system's counters, `stragglers` says which rank holds the others up and why, `communication` and `standings`
do so for a file that is read back.
"""

from dist_train.ledger.recorder import Ledger, NullLedger, start_ledger
from dist_train.ledger.rows import RANK_ROWS, WORKER_ROWS

__all__ = ["RANK_ROWS", "WORKER_ROWS", "Ledger", "NullLedger", "start_ledger"]
