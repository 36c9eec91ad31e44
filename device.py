"""The machine that one trains or colorizes on: its processors, its memory, its fastest numbers."""
import ctypes
import os
import platform
import sys

import torch
import torch.nn as nn

import distributed
from data_utils import RequestError


def processors():
    """Processors that this process may use, its share where torchrun started several."""
    if hasattr(os, 'sched_getaffinity'):
        return max(1, len(os.sched_getaffinity(0)) // distributed.local_world)
    return max(1, os.cpu_count() // distributed.local_world)


def keep_freed_memory():
    """Lets glibc keep the memory of each step's activations for the next step.

    By default it returns such large blocks to the kernel, which zeroes them page by page when they
    are asked for again: without that, bfloat16 training on two cores went from 16 to 23 photos/s.
    mallopt(3): M_MMAP_MAX = 0, so that none is mapped on its own, M_TRIM_THRESHOLD = -1, so that
    none is given back.
    """
    if sys.platform == 'linux' and hasattr(libc := ctypes.CDLL(None), 'mallopt'):
        libc.mallopt(-4, 0)
        libc.mallopt(-1, -1)


def choose_device(name, local_rank=0):
    """The torch.device for --device `name`, in process `local_rank` of those on this machine.

    Raises RequestError where there is none.
    """
    if name == 'cuda' and not torch.cuda.is_available():
        raise RequestError('--device cuda: torch sees no GPU here (check nvidia-smi, and that '
                           f'torch {torch.__version__} is a CUDA build); --device cpu works')
    if name == 'mps' and not torch.backends.mps.is_available():
        raise RequestError('--device mps: torch sees no Apple GPU here; --device cpu works')
    if name == 'cuda' or name == 'auto' and torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise RequestError(f'process {local_rank} has no GPU: this machine has '
                               f'{torch.cuda.device_count()}; torchrun --nproc_per_node=gpu')
        torch.cuda.set_device(local_rank)
        torch.backends.cudnn.benchmark = True  # all batches but the last have one shape
        return torch.device('cuda', local_rank)
    mps = name == 'mps' or name == 'auto' and torch.backends.mps.is_available()
    return torch.device('mps' if mps else 'cpu')


def channels_last(net, device):
    """`net` on the torch.device, laid out as convolutions are fastest, in the backward pass too.

    torch.cat hands back a slice of its gradient, which nn.Upsample does not see as channels-last:
    on a CPU, its other way took a third of the whole training step.
    """
    def whole_gradient(module, inputs, output):
        if output.requires_grad and not torch.compiler.is_compiling():  # which has its own ways
            output.register_hook(
                lambda gradient: gradient.contiguous(memory_format=torch.channels_last))

    for module in net.modules():
        if isinstance(module, nn.Upsample):
            module.register_forward_hook(whole_gradient)
    return net.to(device, memory_format=torch.channels_last)


def free_memory(device):
    """Bytes that may still be taken on a torch.device; in a container, what its limit leaves."""
    if device.type == 'cuda':
        return torch.cuda.mem_get_info(device)[0]
    if device.type == 'mps':
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    try:
        with open('/proc/meminfo') as info:
            free = 1024 * next(int(line.split()[1]) for line in info if 'MemAvailable' in line)
    except OSError:  # not Linux
        free = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    try:
        with open('/sys/fs/cgroup/memory.max') as most, \
                open('/sys/fs/cgroup/memory.current') as used:
            return min(free, int(most.read()) - int(used.read()))
    except (OSError, ValueError):  # no limit, or 'max'
        return free


class Precision:
    """In which numbers the network computes: autocast and a scaler for the gradients.

    Both do nothing in float32, the scaler also in bfloat16, whose exponents reach as far as
    float32's.
    """

    def __init__(self, name='fp32', device='cpu'):
        device = torch.device(device)
        self.name = self.fastest(device) if name == 'auto' else name
        dtype = dict(fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)[self.name]
        self.autocast = torch.autocast(device.type, dtype, enabled=self.name != 'fp32')
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.name == 'fp16')

    @staticmethod
    def fastest(device):
        """The fastest that is safe: what the device has hardware for."""
        if device.type == 'cuda':
            capability = torch.cuda.get_device_capability(device)
            return 'bf16' if capability >= (8, 0) else 'fp16' if capability >= (7, 0) else 'fp32'
        # newer torch only; where the question cannot be asked, the answer is no
        if device.type == 'cpu' and hasattr(torch.cpu, 'get_capabilities'):
            has = torch.cpu.get_capabilities()
            return 'bf16' if any(has[name] is True for name in has if 'bf16' in name) else 'fp32'
        return 'fp32'


def describe_device(device):
    """The device in words."""
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    return f'{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)'
