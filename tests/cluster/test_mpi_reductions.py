"""Reductions of the strategy `allreduce` over a real MPI, from their lane's thread too.

Also the program that `mpirun` starts: python -m tests.cluster.test_mpi_reductions
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch.distributed as dist

from dist_train.world import World
from tests.cluster.mpi import own_mpi
from tests.dist_train import reductions

CONFIGS = {
    "average": reductions.EXACT["average"],
    "hierarchical bf16": reductions.ROUNDED["hierarchical bf16"],
    "adasum": reductions.ADASUM,
}


def _rank() -> None:
    import dist_train.mpi_backend  # noqa: F401  # registers the backend

    dist.init_process_group("mpi4py")
    group = dist.group.WORLD
    assert group is not None
    rank, world_size = group.rank(), group.size()
    world = World(rank=rank, world_size=world_size, local_rank=rank, local_world_size=world_size, launcher="test")
    by_rank = [None] * world_size
    dist.all_gather_object(by_rank, reductions.gradients_under(world, CONFIGS, 2))
    for name in CONFIGS if rank == 0 else ():
        reductions.check(name, [found[name] for found in by_rank], world_size)
    assert reductions.overlap(world, [replace(reductions.EXACT["hierarchical"], bucket_megabytes=0.0011)])
    print(f"rank {rank} is done")
    dist.destroy_process_group()


@pytest.mark.skipif(own_mpi() is None, reason="needs reelscale[mpi] (the packages mpi4py and openmpi)")
def test_reductions_over_mpi_keep_their_formulas_and_overlap():
    done = own_mpi().run(4, "-m", "tests.cluster.test_mpi_reductions")
    assert done.returncode == 0, done.stderr[-4000:]
    assert sorted(done.stdout.split("\n"))[-4:] == [f"rank {rank} is done" for rank in range(4)]


if __name__ == "__main__":
    _rank()
