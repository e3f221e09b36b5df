"""Every launcher's environment gives the right place in the job."""

from __future__ import annotations

import pytest

from dist_train.placement import Placement, find_placement, first_host

TORCHRUN = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1", "GROUP_WORLD_SIZE":
    "2", "MASTER_ADDR": "n1", "MASTER_PORT": "29500",
}  # fmt: skip
SLURM = {
    "SLURM_JOB_ID": "42", "SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
    "SLURM_NTASKS": "5", "SLURM_STEP_NUM_TASKS": "5", "SLURM_STEP_NODELIST": "gpu[07-08,12]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1", "SLURM_TASKS_PER_NODE": "2(x2),1", "SLURM_JOB_NODELIST": "gpu[07-08,12]",
}  # fmt: skip
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "PMIX_NAMESPACE": "prterun-1@1",
}  # fmt: skip


def test_nothing_is_one_process():
    assert find_placement({"PATH": "/bin"}) == Placement()


def test_torchrun():
    placement = find_placement(TORCHRUN)
    assert (placement.launcher, placement.rank, placement.local_rank, placement.node_rank) == ("torchrun", 5, 1, 1)
    assert (placement.world_size, placement.local_world_size, placement.num_nodes) == (8, 4, 2)
    assert (placement.master_address, placement.master_port) == ("n1", 29500)
    assert not placement.on_one_node


def test_attempts_under_torchrun_have_keys_of_their_own_in_the_store_of_its_agent():
    agent = {**TORCHRUN, "TORCHELASTIC_RUN_ID": "7", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    first, second = (find_placement({**agent, "TORCHELASTIC_RESTART_COUNT": count}) for count in "01")
    assert first.store_is_there
    assert second.store_is_there
    assert first.job_key != second.job_key
    assert not find_placement(TORCHRUN).store_is_there


def test_torchrun_inside_slurm_is_torchruns():
    assert find_placement({**SLURM, **TORCHRUN}).launcher == "torchrun"


def test_srun_on_unequal_nodes():
    placement = find_placement(SLURM)
    assert (placement.launcher, placement.rank, placement.local_rank, placement.node_rank) == ("slurm", 3, 1, 1)
    assert (placement.world_size, placement.local_world_size, placement.num_nodes) == (5, 2, 3)
    assert placement.master_address == "gpu07"
    assert placement.master_port == find_placement({**SLURM, "SLURM_PROCID": "0", "SLURM_NODEID": "0"}).master_port


def test_a_batch_script_is_one_process_whatever_the_allocation_says():
    batch = {key: value for key, value in SLURM.items() if "STEP" not in key}
    assert find_placement({**batch, "SLURM_PROCID": "0"}) == Placement()


def test_openmpi_under_srun_is_read_from_openmpi():
    assert find_placement({**SLURM, **OPENMPI}).launcher == "openmpi"


def test_openmpi_on_two_nodes():
    placement = find_placement(OPENMPI)
    assert (placement.rank, placement.world_size, placement.node_rank, placement.num_nodes) == (3, 4, 1, 2)
    assert placement.job_key == "openmpi-prterun-1@1"


def test_hydra_of_mpich_and_intel():
    placement = find_placement({"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"})
    assert (placement.launcher, placement.rank, placement.world_size) == ("mpich", 1, 2)
    assert placement.on_one_node


def test_a_missing_variable_is_named():
    with pytest.raises(ValueError, match="OMPI_COMM_WORLD_SIZE"):
        find_placement({"OMPI_COMM_WORLD_RANK": "0"})


@pytest.mark.parametrize(
    "nodelist,host",
    [("n1", "n1"), ("n[1-4]", "n1"), ("gpu[03-07,9],login1", "gpu03"), ("a1,b[2-3]", "a1"), ("rack[2,5]-x", "rack2-x")],
)
def test_the_first_host_of_a_node_list(nodelist, host):
    assert first_host(nodelist) == host


def test_variables_set_by_hand_are_all_on_this_node_or_have_to_say_more():
    ours = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    placement = find_placement(ours)
    assert (placement.rank, placement.local_rank, placement.local_world_size, placement.num_nodes) == (1, 1, 2, 1)
    with pytest.raises(ValueError, match=r"MASTER_ADDR node-0: set LOCAL_RANK and LOCAL_WORLD_SIZE"):
        find_placement({**ours, "MASTER_ADDR": "node-0"})
    pod = find_placement({**ours, "MASTER_ADDR": "node-0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"})
    assert (pod.node_rank, pod.num_nodes, pod.local_rank) == (1, 2, 0)


def test_a_launchers_own_variables_say_more_than_those_of_a_process_group():
    """`dist_train.mpi_backend` sets the latter under mpirun, for PyTorch's sake."""
    launcher = {"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "0",
                "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}  # fmt: skip
    group = {"RANK": "2", "WORLD_SIZE": "4", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    placement = find_placement({**launcher, **group})
    assert (placement.launcher, placement.num_nodes, placement.node_rank) == ("openmpi", 2, 1)
