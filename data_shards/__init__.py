"""Videos to shards and shards to clips: manifest, sample order, reading, decoding, transforms, loader.

Imports nothing from `launch`, `dist_train` or `models`: a rank and a world size are integers here.
"""
