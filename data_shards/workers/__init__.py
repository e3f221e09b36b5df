"""The loader's worker processes: shared memory, who makes which batch, restarts, how many."""
