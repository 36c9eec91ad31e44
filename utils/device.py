"""The machine: its device, its memory, its processors, and the precision that it is fastest in."""

import ctypes
import os
import platform
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn as nn

from utils import distributed
from utils.cli import UsageError


def choose_device(name):
    """Return the torch.device for --device `name`: of several GPUs, this process's own.

    Raises UsageError if there is no such device.
    """
    if name == 'cuda' and not torch.cuda.is_available():
        build = f'torch {torch.__version__} is a CUDA build'
        raise UsageError(f'--device cuda: torch sees no GPU (check nvidia-smi, and that {build})')
    if name == 'mps' and not torch.backends.mps.is_available():
        raise UsageError('--device mps: torch sees no Apple GPU here; --device cpu works')
    if name == 'cuda' or name == 'auto' and torch.cuda.is_available():
        rank, gpus = distributed.local_rank, torch.cuda.device_count()
        if rank >= gpus:
            raise UsageError(f'process {rank} has no GPU of {gpus}: torchrun --nproc_per_node=gpu')
        torch.cuda.set_device(rank)
        torch.backends.cudnn.benchmark = True  # pays off: batches have few shapes
        return torch.device('cuda', rank)
    mps = name == 'mps' or name == 'auto' and torch.backends.mps.is_available()
    return torch.device('mps' if mps else 'cpu')


def describe_device(device):
    """Return the device in words."""
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    return f'{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)'


def available_cpus():
    """Return how many processors this process may use: its share if torchrun started several."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    return max(1, cpus // distributed.local_world_size)


def check_compiler(device):
    """Compile a sum on the device. Raises UsageError with the compiler's reason if that fails."""
    try:
        torch.compile(lambda x: x + 1)(torch.ones(8, device=device))
    except Exception as error:  # of triton, of a C compiler, of a Python too new for this torch
        lines = [line for line in str(error).splitlines() if line and not line.endswith('raised:')]
        remedy = 'sudo apt-get install -y build-essential python3-dev may help'
        raise UsageError(f'--compile: {lines[0] if lines else error}; {remedy}') from error


class Precision:
    """The numbers that the network computes in: an autocast context and a gradient scaler.

    Both do nothing in float32. The scaler does nothing in bfloat16 either, which reaches as far
    as float32. Raises UsageError if torch cannot compute in that precision on the device.
    """

    def __init__(self, name='fp32', device='cpu'):
        device = torch.device(device)
        self.name = self.fastest(device) if name == 'auto' else name
        dtype = dict(fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)[self.name]
        self.autocast = nullcontext()  # torch 2.4 has no autocast object for an Apple GPU
        if self.name != 'fp32':
            try:
                self.autocast = torch.autocast(device.type, dtype)
            except RuntimeError as error:
                line = f'--precision {self.name}: not on this {device.type}; fp32 works'
                raise UsageError(line) from error
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.name == 'fp16')

    @staticmethod
    def fastest(device):
        """Return the name of the fastest precision that is safe: one the hardware computes in."""
        if device.type == 'cuda':
            capability = torch.cuda.get_device_capability(device)
            return 'bf16' if capability >= (8, 0) else 'fp16' if capability >= (7, 0) else 'fp32'
        # older versions of torch cannot tell: float32 is always safe
        if device.type == 'cpu' and hasattr(torch.cpu, 'get_capabilities'):
            has = torch.cpu.get_capabilities()
            return 'bf16' if any(has[name] is True for name in has if 'bf16' in name) else 'fp32'
        return 'fp32'


def channels_last(net, device):
    """Move `net` to the device, in the memory layout in which convolutions are fastest.

    In the backward pass, torch.cat hands nn.Upsample a slice that torch does not recognize as
    channels-last. On a CPU, the slow path that follows takes a third of the whole training step.
    """

    def copy_gradient(module, inputs, output):
        if output.requires_grad and not torch.compiler.is_compiling():
            output.register_hook(lambda grad: grad.contiguous(memory_format=torch.channels_last))

    for module in net.modules():
        if isinstance(module, nn.Upsample):
            module.register_forward_hook(copy_gradient)
    return net.to(device, memory_format=torch.channels_last)


def to_device(tensor, device):
    """Copy a tensor to the device, without waiting for the work that is queued on a GPU.

    A plain copy from the host waits. One from pinned memory does not, and torch keeps that memory
    until the copy is done.
    """
    if torch.device(device).type == 'cuda' and tensor.device.type == 'cpu':
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def free_memory(device):
    """Return the bytes that are free on the device. On a CPU, a container's limit counts."""
    if device.type == 'cuda':
        return torch.cuda.mem_get_info(device)[0]
    if device.type == 'mps':
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    try:
        lines = Path('/proc/meminfo').read_text().splitlines()
        free = 1024 * next(int(line.split()[1]) for line in lines if 'MemAvailable' in line)
    except OSError:  # not Linux
        free = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    try:
        files = (Path('/sys/fs/cgroup', name) for name in ('memory.max', 'memory.current'))
        limit, used = (int(file.read_text()) for file in files)
        stat = Path('/sys/fs/cgroup/memory.stat').read_text().split()
        # of what is used, the kernel gives back copies of files, as of packages just installed
        return min(free, limit - used + int(stat[stat.index('inactive_file') + 1]))
    except (OSError, ValueError):  # no limit, or 'max'
        return free


def keep_memory():
    """Make glibc keep the memory of one step's activations for the next step.

    By default the kernel gets large blocks back, and clears each page before it is used again.
    """
    if sys.platform == 'linux' and hasattr(libc := ctypes.CDLL(None), 'mallopt'):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: take no block directly from the kernel
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: give nothing back
