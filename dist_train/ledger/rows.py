"""The rows of the ledger.

`RANK_ROWS` partition the timeline of a rank's main thread: at any instant exactly one row is running, so the
rows add up to the wall time by construction, and what nobody claimed is `remainder`. `WORKER_ROWS` do the same
for a loader's worker processes, which run beside the rank.
"""

from __future__ import annotations

import re

STARTUP = "startup"  # process start (before Python) to the first step, minus what has a row of its own
READ = "read"  # bytes of shards into memory, when the rank reads by itself (num_workers=0)
DECODE = "decode"  # likewise: compressed video to frames
AUGMENT = "augment"  # likewise: crop, resize, flip, collate
LOADER_WAIT = "loader_wait"  # waiting for the next batch from the loader's workers
HOST_TO_DEVICE = "host_to_device"
FORWARD = "forward"
BACKWARD = "backward"
WAIT_FOR_PEER = "wait_for_peer"  # blocked in a collective that a later rank has not started yet
WIRE = "wire"  # blocked in a collective that every rank has started
OPTIMIZER = "optimizer"
CHECKPOINT = "checkpoint"
EVALUATION = "evaluation"
LOGGING = "logging"
REMAINDER = "remainder"  # what no other row claims

RANK_ROWS = (
    STARTUP,
    READ,
    DECODE,
    AUGMENT,
    LOADER_WAIT,
    HOST_TO_DEVICE,
    FORWARD,
    BACKWARD,
    WAIT_FOR_PEER,
    WIRE,
    OPTIMIZER,
    CHECKPOINT,
    EVALUATION,
    LOGGING,
    REMAINDER,
)

# In which a training step launches its collectives; what evaluation, checkpoints and logging launch is theirs.
TRAINING_ROWS = (FORWARD, BACKWARD, WAIT_FOR_PEER, WIRE, OPTIMIZER, REMAINDER)

WORKER_ROWS = (READ, DECODE, AUGMENT, "idle")

TIER_COST = re.compile(r"read_(?P<tier>[a-z]+)_(?P<unit>seconds|bytes)")
"""How a loader names what it read from a tier of storage, and the time for it, among the costs of a batch."""
