"""The device's branches, on a CPU: what a GPU would answer is patched in."""

import io

import pytest
import torch
from torch import nn

from utils import device as device_module, distributed
from utils.cli import UsageError
from utils.device import (
    Precision,
    check_compiler,
    choose_device,
    describe_device,
    free_memory,
)

CPU, CUDA, MPS = map(torch.device, ('cpu', 'cuda', 'mps'))


@pytest.fixture
def gpus(monkeypatch):
    """gpus(count, capability): torch sees so many GPUs of that compute capability."""

    def gpus(count, capability=(8, 0)):
        chosen = []
        for name, answer in dict(
            is_available=lambda: count > 0,
            device_count=lambda: count,
            set_device=chosen.append,
            get_device_name=lambda device: f'GPU {device.index}',
            get_device_capability=lambda device: capability,
            mem_get_info=lambda device: (10**9, 2 * 10**9),
        ).items():
            monkeypatch.setattr(torch.cuda, name, answer)
        return chosen

    monkeypatch.setattr(torch.backends.cudnn, 'benchmark', False)  # so that it is put back
    return gpus


@pytest.fixture
def apple_gpu(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: True)


# ---------------------------------------------------------------------------- devices


def test_each_process_takes_the_gpu_of_its_rank(gpus, monkeypatch):
    chosen = gpus(2)
    assert choose_device('auto') == torch.device('cuda', 0)
    monkeypatch.setattr(distributed, 'local_rank', 1)
    assert choose_device('cuda') == torch.device('cuda', 1)
    assert chosen == [0, 1] and torch.backends.cudnn.benchmark
    monkeypatch.setattr(distributed, 'local_rank', 2)
    with pytest.raises(UsageError, match='process 2 has no GPU, this machine has 2: torchrun'):
        choose_device('auto')
    assert describe_device(torch.device('cuda', 1)) == 'GPU 1'
    assert choose_device('cpu') == CPU


def test_an_apple_gpu_is_taken_if_there_is_no_other(gpus, apple_gpu):
    gpus(0)
    assert choose_device('auto') == choose_device('mps') == MPS
    with pytest.raises(UsageError, match='--device cuda: torch sees no GPU here'):
        choose_device('cuda')
    gpus(1)
    assert choose_device('auto').type == 'cuda'


def test_without_any_gpu_the_cpu_is_taken(gpus, monkeypatch):
    gpus(0)
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: False)
    assert choose_device('auto') == CPU
    with pytest.raises(UsageError, match='--device mps: torch sees no Apple GPU here'):
        choose_device('mps')


# ---------------------------------------------------------------------------- precision


@pytest.mark.parametrize(
    'capability, name',
    [
        ((6, 1), 'fp32'),
        ((7, 0), 'fp16'),
        ((7, 5), 'fp16'),
        ((8, 0), 'bf16'),
        ((8, 9), 'bf16'),
        ((9, 0), 'bf16'),
        ((12, 0), 'bf16'),
    ],
)
def test_the_fastest_precision_of_a_gpu(gpus, capability, name):
    gpus(1, capability)
    assert Precision.fastest(CUDA) == name


@pytest.mark.parametrize(
    'capabilities, name',
    [
        (dict(avx2=True, avx512_bf16=False, amx_bf16=False), 'fp32'),
        (dict(avx2=True, avx512_bf16=True), 'bf16'),
        (dict(architecture='aarch64', bf16=True), 'bf16'),
        (dict(architecture='bf16', bf16=False), 'fp32'),
    ],
)
def test_the_fastest_precision_of_a_cpu(monkeypatch, capabilities, name):
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: capabilities, raising=False)
    assert Precision.fastest(CPU) == name


def test_an_older_torch_cannot_tell_what_a_cpu_is_fast_in(monkeypatch):
    monkeypatch.delattr(torch.cpu, 'get_capabilities', raising=False)
    assert Precision('auto', 'cpu').name == 'fp32'


def refuse_mps(monkeypatch):
    """Make torch.autocast refuse an Apple GPU, as torch 2.4 does."""

    def autocast(kind, *args, accept=torch.autocast, **kwargs):
        if kind == 'mps':
            raise RuntimeError("User specified an unsupported autocast device_type 'mps'")
        return accept(kind, *args, **kwargs)

    monkeypatch.setattr(torch, 'autocast', autocast)


def test_nothing_is_cast_on_an_apple_gpu(monkeypatch):
    refuse_mps(monkeypatch)
    precision = Precision('auto', 'mps')
    assert precision.name == 'fp32' and not precision.scaler.is_enabled()
    net = nn.Linear(2, 2)
    for _ in range(2):  # a step enters the context again
        with precision.autocast:
            assert net(torch.ones(2)).dtype == torch.float32


def test_a_precision_that_torch_refuses_is_a_wrong_request(monkeypatch):
    refuse_mps(monkeypatch)
    with pytest.raises(
        UsageError,
        match='--precision bf16: torch .* cannot on this mps device; --precision fp32 works',
    ):
        Precision('bf16', 'mps')


@pytest.mark.parametrize(
    'name, dtype, scales',
    [
        ('fp32', torch.float32, False),
        ('bf16', torch.bfloat16, False),
        ('fp16', torch.float16, True),
    ],
)
def test_each_precision_computes_in_its_numbers(name, dtype, scales):
    precision = Precision(name)
    with precision.autocast:
        assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == dtype
    assert precision.scaler.is_enabled() == scales


# ---------------------------------------------------------------------------- compiler, memory


def test_a_compiler_that_fails_is_told_in_a_line(monkeypatch):
    def compile(function):
        raise RuntimeError('no C++ compiler here\nand a long story')

    monkeypatch.setattr(torch, 'compile', compile)
    with pytest.raises(
        UsageError, match='--compile: no C.. compiler here; .* leave --compile out$'
    ):
        check_compiler(CPU)
    monkeypatch.setattr(torch, 'compile', lambda function: function)
    check_compiler(CPU)


@pytest.mark.parametrize('limit, free', [('3000000', 2000000), ('max', 8192000)])
def test_a_container_s_limit_counts(monkeypatch, limit, free):
    files = {
        '/proc/meminfo': 'MemTotal: 9000 kB\nMemAvailable: 8000 kB\n',
        '/sys/fs/cgroup/memory.max': limit,
        '/sys/fs/cgroup/memory.current': '1000000',
    }

    monkeypatch.setattr(device_module, 'open', lambda name: io.StringIO(files[name]), raising=False)
    assert free_memory(CPU) == free


def test_the_memory_of_a_gpu(gpus):
    gpus(1)
    assert free_memory(CUDA) == 10**9
