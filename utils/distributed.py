"""One process, or one of many that torchrun started: what they tell each other.

torchrun --nproc_per_node=gpu colorize.py
"""

import os
import sys

import torch
import torch.distributed as dist

# set by torchrun; the defaults are those of a single process
rank = int(os.environ.get('RANK') or 0)
world_size = int(os.environ.get('WORLD_SIZE') or 1)
local_rank = int(os.environ.get('LOCAL_RANK') or 0)  # among those of this machine
local_world_size = int(os.environ.get('LOCAL_WORLD_SIZE') or 1)
no_bar = None if rank == 0 else True  # tqdm's `disable`: None shows bars on a terminal only


def init(device):
    """Join the other processes, if there are any; tensors travel on the CPU and on `device`."""
    if world_size == 1:
        return
    store, *_ = next(dist.rendezvous('env://'))
    if local_world_size == world_size:
        # torchrun's store outlives a failed attempt, and with it the addresses of dead processes
        store = dist.PrefixStore(os.environ.get('TORCHELASTIC_RESTART_COUNT', '0'), store)
    backend = 'cpu:gloo,cuda:nccl' if device.type == 'cuda' else 'gloo'
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)


def exit(code):
    """End the process with the exit code, without the interpreter's own end.

    That waits for the thread that serves the process group, with torch 2.4 maybe forever; and a
    signal that comes during it would be the exit code.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def all_reduce_sum(*numbers):
    """Return the sum of each number over all processes, as floats if there are several."""
    if world_size == 1:
        return numbers
    # on the CPU, so that nobody waits for the work queued on the GPU
    sums = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(sums)
    return sums.tolist()


def barrier():
    """Wait until every process is here."""
    all_reduce_sum(0)


def broadcast(value):
    """Return rank 0's `value` (anything that pickles) in every process."""
    if world_size == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, device=torch.device('cpu'))
    return values[0]


def all_gather(value):
    """Return a list of every process's `value` (anything that pickles), by rank."""
    values = [value] * world_size
    if world_size > 1:
        dist.all_gather_object(values, value)
    return values


def print0(*words, file=None):
    """Print on rank 0 only, and flush, so that a log file can be followed."""
    if rank == 0:
        try:
            print(*words, file=file, flush=True)
        except OSError:  # a closed terminal or a full disk must not end the run
            os.dup2(os.open(os.devnull, os.O_WRONLY), (file or sys.stdout).fileno())
