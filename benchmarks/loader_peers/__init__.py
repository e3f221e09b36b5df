"""The loaders that `benchmarks.loader` compares, each in a process (and, for the peers, a Python) of its own."""
