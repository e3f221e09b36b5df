"""What the MPI tests run once: objects, groups, futures, threads, DDP, FSDP2, checkpoints, misuse."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from tests.dist_train.mpi_table import all_values, reduced, values

SCENARIOS = (
    "any_source", "objects", "barrier", "subgroups", "local_subgroups", "futures", "threads", "pieces", "progress",
    "rounding", "ddp", "fsdp2_and_checkpoint", "functional", "misuse",
)  # fmt: skip


class Scenarios:
    """Each a method, on the group under test; Gloo's is there to compare with."""

    def __init__(self, mpi: Any, gloo: Any) -> None:
        self.mpi, self.gloo = mpi, gloo
        self.rank, self.size = mpi.rank(), mpi.size()

    def any_source(self) -> None:
        """Rank 0 receives from whoever sends."""
        for group in (self.mpi, self.gloo):
            if self.rank:
                dist.send(torch.full((3,), float(self.rank)), 0, group)
                continue
            senders = set()
            for _ in range(self.size - 1):
                got = torch.zeros(3)
                sender = dist.recv(got, None, group)
                assert got.tolist() == [sender] * 3
                senders.add(sender)
            assert senders == set(range(1, self.size))

    def objects(self) -> None:
        """Pickled objects through every collective that takes them."""
        mine = {"rank": self.rank, "text": "x" * (100 + 37 * self.rank)}
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, mine, self.mpi)
        assert [o["rank"] for o in everyone] == list(range(self.size))
        shared = [mine if self.rank == 0 else None]
        dist.broadcast_object_list(shared, 0, self.mpi)
        assert shared[0]["rank"] == 0
        gathered: list[Any] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object(mine, gathered, 0, self.mpi)
        assert gathered is None or gathered == everyone
        got: list[Any] = [None]
        dist.scatter_object_list(got, everyone if self.rank == 0 else None, 0, self.mpi)
        assert got[0] == mine

    def barrier(self) -> None:
        """Nobody leaves before all have come."""
        dist.barrier(self.mpi)
        work = dist.barrier(self.mpi, async_op=True)
        work.wait()

    def subgroups(self) -> None:
        """A group of some ranks, in another order, which the others do not take part in; two that overlap."""
        backwards = dist.new_group([self.size - 1, 0], backend="mpi4py", use_local_synchronization=False)
        everyone = dist.new_group(list(range(self.size)), backend="mpi4py")
        tensor = torch.tensor([float(self.rank)])
        if self.rank in (0, self.size - 1):
            work = dist.all_reduce(tensor, group=backwards, async_op=True)
            other = torch.ones(1)
            dist.all_reduce(other, group=everyone)
            work.wait()
            assert tensor.item() == self.size - 1
            assert other.item() == self.size
            gathered = [torch.zeros(1) for _ in range(2)]
            dist.all_gather(gathered, torch.tensor([float(self.rank)]), backwards)
            assert sorted(t.item() for t in gathered) == [0.0, self.size - 1.0]
            dist.destroy_process_group(backwards)
        else:
            dist.all_reduce(torch.ones(1), group=everyone)
        dist.destroy_process_group(everyone)

    def local_subgroups(self) -> None:
        """Groups that only their members make, at the same time."""
        half = [rank for rank in range(self.size) if rank % 2 == self.rank % 2]
        group = dist.new_group(half, backend="mpi4py", use_local_synchronization=True)
        tensor = torch.ones(1)
        dist.all_reduce(tensor, group=group)
        assert tensor.item() == len(half)
        dist.destroy_process_group(group)

    def futures(self) -> None:
        """Futures of work under way and done, with callbacks that call collectives themselves."""
        tensor = torch.ones(1000)
        work = dist.all_reduce(tensor, group=self.mpi, async_op=True)
        doubled = work.get_future().then(lambda future: future.value()[0] * 2)
        assert torch.equal(doubled.wait(), torch.full((1000,), 2.0 * self.size))
        work.wait()
        assert work.get_future().value()[0] is tensor
        assert work.is_success()
        assert work.exception() is None
        assert work.result()[0] is tensor

        def again(future: Any) -> torch.Tensor:
            value = future.value()[0]
            dist.all_reduce(value, group=self.mpi)
            return value

        chained = dist.all_reduce(torch.ones(3), group=self.mpi, async_op=True).get_future().then(again)
        assert chained.wait().tolist() == [float(self.size) ** 2] * 3

    def threads(self) -> None:
        """Many operations outstanding at once, waited for in another order and by several threads."""
        import threading

        tensors = [torch.full((500 * (k + 1),), float(k)) for k in range(12)]
        works = [dist.all_reduce(tensor, group=self.mpi, async_op=True) for tensor in tensors]
        waiters = [threading.Thread(target=work.wait) for work in reversed(works)]
        for waiter in waiters:
            waiter.start()
        for waiter in waiters:
            waiter.join()
        assert all(torch.equal(t, torch.full_like(t, float(k * self.size))) for k, t in enumerate(tensors))

    def pieces(self) -> None:
        """Tensors so large that one operation is several of MPI's, several at a time, with a small one after them."""
        length = self.size * (5 << 18) + 3  # of 4 bytes: a piece and a quarter a rank
        tensors = [values(self.rank, torch.int32, length, seed=seed) for seed in range(2)] + [torch.ones(1)]
        works = [dist.all_reduce(tensor, group=self.mpi, async_op=True) for tensor in tensors]
        for work in works:
            work.wait()
        for seed in range(2):
            assert torch.equal(tensors[seed], reduced(all_values(self.size, torch.int32, length, seed=seed), "SUM"))
        dist.broadcast(tensors[0], 0, self.mpi)
        dist.reduce(tensors[1], 0, group=self.mpi)
        if self.rank == 0:
            assert torch.equal(
                tensors[1], reduced(all_values(self.size, torch.int32, length, seed=1), "SUM") * self.size
            )

    def progress(self) -> None:
        """A collective completes while the program never waits for it."""
        import time

        work = dist.all_reduce(torch.ones(1 << 20), group=self.mpi, async_op=True)
        for _ in range(3000):
            if work.is_completed():
                return
            time.sleep(0.01)
        raise AssertionError("not complete after 30 s without a wait")

    def rounding(self) -> None:
        """Half-precision sums of any numbers are as near as additions in that type can be; AVG and PREMUL_SUM."""
        everyone = [torch.randn(4001, generator=torch.Generator().manual_seed(rank)) for rank in range(self.size)]
        for dtype in (torch.float16, torch.bfloat16):
            exact = torch.stack([part.to(dtype).double() for part in everyone]).sum(0)
            scale = torch.stack([part.to(dtype).double().abs() for part in everyone]).sum(0)
            tensor = everyone[self.rank].to(dtype)
            dist.all_reduce(tensor, group=self.mpi)
            reference = everyone[self.rank].to(dtype)
            dist.all_reduce(reference, group=self.gloo)
            bound = self.size * torch.finfo(dtype).eps * scale
            assert ((tensor.double() - exact).abs() <= bound).all()
            if self.size == 2:
                assert torch.equal(tensor, reference)
        tensor = torch.ones(5)
        dist.all_reduce(tensor, dist._make_nccl_premul_sum(2.5), group=self.mpi)
        assert tensor.tolist() == [2.5 * self.size] * 5

    def ddp(self) -> None:
        """Steps of DistributedDataParallel, plain and with a hook that sends bfloat16, as over Gloo."""

        def compress(group, bucket):  # no annotations: DDP compares them with its own types
            work = dist.all_reduce(bucket.buffer().bfloat16().div_(self.size), group=group, async_op=True)
            return work.get_future().then(lambda future: future.value()[0].float())

        for hook in (None, compress):

            def run(group: Any, hook: Any = hook) -> list[torch.Tensor]:
                torch.manual_seed(1)
                model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
                wrapped = torch.nn.parallel.DistributedDataParallel(model, process_group=group, bucket_cap_mb=0.01)
                if hook is not None:
                    wrapped.register_comm_hook(group, hook)
                optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
                for step in range(3):
                    optimizer.zero_grad()
                    wrapped(values(self.rank, torch.float32, 4, 64, seed=step)).square().mean().backward()
                    optimizer.step()
                return [parameter.detach() for parameter in model.parameters()]

            for got, want in zip(run(self.mpi), run(self.gloo), strict=True):
                tolerance = 0 if self.size == 2 else (1e-6 if hook is None else 1e-3)
                assert torch.allclose(got, want, rtol=tolerance, atol=tolerance)

    def fsdp2_and_checkpoint(self) -> None:
        """Steps of fully_shard as over Gloo; its sharded state saved and loaded with DCP."""
        import tempfile

        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import get_model_state_dict
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.fsdp import fully_shard

        def build(group: Any) -> Any:
            torch.manual_seed(1)
            model = torch.nn.Sequential(torch.nn.Linear(64, 50), torch.nn.ReLU(), torch.nn.Linear(50, 7))
            mesh = DeviceMesh.from_group(group, "cpu")
            for layer in model:
                fully_shard(layer, mesh=mesh)
            return fully_shard(model, mesh=mesh)

        def run(group: Any) -> Any:
            model = build(group)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for step in range(3):
                optimizer.zero_grad()
                model(values(self.rank, torch.float32, 4, 64, seed=step)).square().mean().backward()
                optimizer.step()
            return model

        mpi, gloo = run(self.mpi), run(self.gloo)
        for got, want in zip(mpi.parameters(), gloo.parameters(), strict=True):
            assert torch.allclose(got.full_tensor(), want.full_tensor(), rtol=1e-6, atol=1e-6)
        folder = [tempfile.mkdtemp() if self.rank == 0 else None]
        dist.broadcast_object_list(folder, 0, self.mpi)
        dcp.save(get_model_state_dict(mpi), checkpoint_id=folder[0], process_group=self.mpi)
        fresh = build(self.mpi)
        for parameter in fresh.parameters():
            torch.nn.init.zeros_(parameter)
        state = get_model_state_dict(fresh)
        dcp.load(state, checkpoint_id=folder[0], process_group=self.mpi)
        for name, got in get_model_state_dict(mpi).items():
            assert torch.equal(state[name].full_tensor(), got.full_tensor()), name

    def functional(self) -> None:
        """The functional collectives, which come from C++."""
        from torch.distributed import _functional_collectives as functional

        whole = torch.arange(float(2 * self.size))
        total = functional.all_reduce(whole, "sum", self.mpi)
        assert torch.equal(total, whole * self.size)
        part = functional.reduce_scatter_tensor(whole, "sum", 0, self.mpi)
        assert torch.equal(functional.all_gather_tensor(part, 0, self.mpi), whole * self.size)
        moved = functional.all_to_all_single(whole, None, None, self.mpi)
        assert torch.equal(moved, whole[2 * self.rank : 2 * self.rank + 2].repeat(self.size))

    def misuse(self) -> None:
        """Errors that are known before anything is sent, with what was wrong."""
        for call, words in (
            (lambda: dist.all_reduce(torch.ones(2), dist.ReduceOp.BAND, group=self.mpi), "float32 by BAND"),
            (lambda: dist.all_reduce(torch.ones(2).to_sparse(), group=self.mpi), "to_dense"),
            (lambda: dist.all_gather_into_tensor(torch.ones(3), torch.ones(2), self.mpi), "do not fit"),
        ):
            try:
                call()
                said = "no error"
            except ValueError as error:
                said = str(error)
            assert words in said
        dist.barrier(self.mpi)
