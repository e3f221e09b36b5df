"""The training engine: world, collectives, strategies, optimizers, schedules, loop, checkpoints, ledger.

Imports nothing from `launch`, `data_shards` or `models`: a model is an `nn.Module`, a loader a Protocol.
"""
