"""Two ranks over the simulated hccl; every assertion holds on both. Run by test_device.py."""

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _coalescing_manager
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group("hccl")
rank, size = dist.get_rank(), dist.get_world_size()
torch.npu.set_device(rank)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float32, device="npu")


def check_collectives():
    for operation, expected in ((dist.ReduceOp.SUM, 3), (dist.ReduceOp.AVG, 1.5), (dist.ReduceOp.MAX, 2)):
        x = tensor(rank + 1)
        dist.all_reduce(x, operation)
        assert x.item() == expected and x.get_device() == rank, operation
    x = tensor(rank)
    dist.broadcast(x, src=1)
    assert x.item() == 1
    x = tensor(rank + 1)
    dist.reduce(x, dst=0)
    assert rank == 1 or x.item() == 3

    parts = [tensor(-1) for _ in range(size)]
    dist.all_gather(parts, tensor(rank))
    assert [part.item() for part in parts] == [0, 1]
    whole = torch.empty(size, 2, 1, device="npu")
    dist.all_gather_into_tensor(whole, tensor(rank, 10 * rank))  # of another shape, as hccl allows
    assert whole.flatten().tolist() == [0, 0, 1, 10]
    part = torch.empty(2, device="npu")
    dist.reduce_scatter_tensor(part, torch.arange(4.0, device="npu"))
    assert part.tolist() == ([0, 2], [4, 6])[rank]
    dist.reduce_scatter(part, [tensor(1, 2), tensor(3, 4)])
    assert part.tolist() == ([2, 4], [6, 8])[rank]
    swapped = torch.empty(2, device="npu")
    dist.all_to_all_single(swapped, tensor(10 * rank, 10 * rank + 1))
    assert swapped.tolist() == [rank, 10 + rank]
    gathered = [tensor(-1) for _ in range(size)] if rank == 0 else None
    dist.gather(tensor(rank + 5), gathered, dst=0)
    assert rank == 1 or [part.item() for part in gathered] == [5, 6]
    x = tensor(-1)
    dist.scatter(x, [tensor(7), tensor(8)] if rank == 0 else None, src=0)
    assert x.item() == 7 + rank

    x = tensor(rank)
    dist.send(x, 1) if rank == 0 else dist.recv(x, 0)
    assert x.item() == 0
    objects = [None, None]
    dist.all_gather_object(objects, {"rank": rank})
    assert objects == [{"rank": 0}, {"rank": 1}]
    work = dist.all_reduce(x := tensor(1), async_op=True)
    work.wait()
    assert x.item() == 2
    dist.barrier()


def check_coalesced_collectives():
    wholes = [torch.empty(size, 1, device="npu") for _ in range(2)]
    with _coalescing_manager():
        for index, whole in enumerate(wholes):
            dist.all_gather_into_tensor(whole, tensor(rank + 10 * index))
    assert [whole.flatten().tolist() for whole in wholes] == [[0, 1], [10, 11]]
    parts = [torch.empty(1, 1, device="npu") for _ in range(2)]
    with _coalescing_manager():
        for index, part in enumerate(parts):
            dist.reduce_scatter_tensor(part, tensor(1, 2 + index))
    assert [part.item() for part in parts] == ([2, 2], [4, 6])[rank]
    sums = [tensor(rank), tensor(rank, 2)]
    dist.all_reduce_coalesced(sums)
    assert [each.tolist() for each in sums] == [[1], [1, 4]]


def check_that_host_memory_is_refused():
    try:
        dist.all_reduce(torch.ones(1))
    except RuntimeError:
        return
    raise AssertionError("hccl took a CPU tensor")


def check_data_parallel_training():
    """Two ranks with half of the batch each learn what one learns from the whole batch."""
    batch = torch.linspace(-1, 1, 24, device="npu").view(8, 3)
    weights = []
    for distributed in (False, True):
        torch.manual_seed(0)
        module = torch.nn.Linear(3, 2).to("npu")
        module = DistributedDataParallel(module) if distributed else module
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        for _ in range(3):
            mine = batch[4 * rank : 4 * rank + 4] if distributed else batch
            module(mine).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        weights.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    assert torch.allclose(*weights, atol=1e-6)


check_collectives()
check_coalesced_collectives()
check_that_host_memory_is_refused()
check_data_parallel_training()
dist.destroy_process_group()
print(f"rank {rank} is done", flush=True)
