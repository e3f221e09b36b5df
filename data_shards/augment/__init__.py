"""What training does to a clip's pixels and label, drawn once for the whole clip: mirroring, colours, RandAugment.

Clips are uint8 (T, H, W, 3). Every random number comes from the sample's own generator (`sampling.sample_generator`).
"""
