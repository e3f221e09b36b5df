"""Decoders of encoded pictures, chosen by `data_shards.decoding.choice`; PyAV's is `data_shards.decode.Video`."""
