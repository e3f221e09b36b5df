"""The parts of `data_shards.pack`: which sample goes into which shard, writing them in processes, resuming."""
