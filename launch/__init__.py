"""The `reelscale` command: how a job starts, what it trains, and how its parts are wired together.

This is the only package that knows the other three (`dist_train`, `data_shards`, `models`).
"""

__version__ = "0.1.0"
