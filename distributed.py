"""One process, or one of many that torchrun started: what they must tell each other.

    torchrun --nproc_per_node=gpu colorize.py
"""
import os

import torch
import torch.distributed as dist

# the defaults are those of a single process; nothing else in the project asks how many there are
rank = int(os.environ.get('RANK', 0))
local_rank = int(os.environ.get('LOCAL_RANK', 0))
local_world = int(os.environ.get('LOCAL_WORLD_SIZE', 1))  # on this machine
world = int(os.environ.get('WORLD_SIZE', 1))


def start(device):
    """Joins the other processes, where there are any. Tensors are exchanged on CPU and `device`."""
    if world == 1:
        return
    store, *_ = next(dist.rendezvous('env://'))
    if local_world == world:
        # torchrun's store outlives a failed attempt, and with it the addresses of dead processes
        store = dist.PrefixStore(os.environ.get('TORCHELASTIC_RESTART_COUNT', '0'), store)
    dist.init_process_group('cpu:gloo,cuda:nccl' if device.type == 'cuda' else 'gloo',
                            store=store, rank=rank, world_size=world)


def end():
    if dist.is_initialized():
        dist.destroy_process_group()


def total(*numbers):
    """The sum over all processes of each number, as floats."""
    if world == 1:
        return numbers
    # on the CPU: the GPU's queue of work is not waited for
    sums = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(sums)
    return sums.tolist()


def from_first(thing):
    """The first process's `thing` (anything that pickles), in every process."""
    if world == 1:
        return thing
    things = [thing]
    dist.broadcast_object_list(things, device=torch.device('cpu'))
    return things[0]
