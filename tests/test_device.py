"""The device's branches, on a CPU: what a GPU would answer is patched in."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode

import colorize
from unet import UNet
from utils import distributed
from utils.cli import UsageError
from utils.device import Precision, choose_device, free_memory
from utils.muon import Muon

CPU, CUDA, MPS = map(torch.device, ('cpu', 'cuda', 'mps'))


@pytest.fixture
def gpus(monkeypatch):
    """gpus(count, capability, apple): torch sees so many GPUs; gives those that were set."""

    def gpus(count, capability=(8, 0), apple=False):
        chosen = []
        for name, answer in dict(
            is_available=lambda: count > 0,
            device_count=lambda: count,
            set_device=chosen.append,
            get_device_capability=lambda device: capability,
            mem_get_info=lambda device: (10**9, 2 * 10**9),
        ).items():
            monkeypatch.setattr(torch.cuda, name, answer)
        monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: apple)
        return chosen

    monkeypatch.setattr(torch.backends.cudnn, 'benchmark', False)  # so that it is put back
    return gpus


def test_each_process_takes_the_gpu_of_its_rank(gpus, monkeypatch):
    chosen = gpus(2)
    assert choose_device('auto') == torch.device('cuda', 0)
    monkeypatch.setattr(distributed, 'local_rank', 1)
    assert choose_device('cuda') == torch.device('cuda', 1)
    assert chosen == [0, 1] and torch.backends.cudnn.benchmark
    monkeypatch.setattr(distributed, 'local_rank', 2)
    with pytest.raises(UsageError, match='process 2 has no GPU of 2: torchrun'):
        choose_device('auto')
    assert choose_device('cpu') == CPU


@pytest.mark.parametrize(
    'count, apple, name, expected',
    [
        (1, True, 'auto', 'cuda'),
        (1, True, 'mps', 'mps'),
        (0, True, 'auto', 'mps'),
        (0, False, 'auto', 'cpu'),
        (0, True, 'cuda', '--device cuda: torch sees no GPU .*nvidia-smi'),
        (1, False, 'mps', '--device mps: torch sees no Apple GPU here; --device cpu works'),
    ],
)
def test_the_best_device_is_taken_and_a_missing_one_refused(gpus, count, apple, name, expected):
    gpus(count, apple=apple)
    if ' ' not in expected:
        assert choose_device(name).type == expected
        return
    with pytest.raises(UsageError, match=expected):
        choose_device(name)


@pytest.mark.parametrize(
    'capability, name',
    [((6, 1), 'fp32'), ((7, 0), 'fp16'), ((7, 5), 'fp16'), ((8, 0), 'bf16'), ((12, 0), 'bf16')],
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
        (None, 'fp32'),  # an older torch, which cannot tell
    ],
)
def test_the_fastest_precision_of_a_cpu(monkeypatch, capabilities, name):
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: capabilities, raising=False)
    if capabilities is None:
        monkeypatch.delattr(torch.cpu, 'get_capabilities')
    assert Precision('auto', 'cpu').name == name


@pytest.mark.parametrize('limit, free', [('3000000', 2250000), ('max', 8192000)])
def test_a_container_s_limit_counts(monkeypatch, limit, free):
    files = {
        '/proc/meminfo': 'MemTotal: 9000 kB\nMemAvailable: 8000 kB\n',
        '/sys/fs/cgroup/memory.max': limit,
        '/sys/fs/cgroup/memory.current': '1000000',
        '/sys/fs/cgroup/memory.stat': 'anon 750000\ninactive_file 250000\n',
    }
    monkeypatch.setattr(Path, 'read_text', lambda path: files[str(path)])
    assert free_memory(CPU) == free


class Waits(TorchFunctionMode):
    """Notes in `seen` the calls that make the host wait for a GPU."""

    NAMES = {'cpu', 'item', 'tolist', 'numpy', '__bool__', '__float__', '__int__', 'nonzero'}

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, '__name__', '') in self.NAMES:
            self.seen.append(function.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize('name', ['fp32', 'bf16', 'fp16'])
def test_a_step_does_not_wait_for_the_device_and_a_validation_waits_once(name):
    net, recipe = UNet(), colorize.Recipe(Precision(name), colorfulness_weight=0.025)
    x, y = torch.rand(2, 1, 8, 8) * 2 - 1, torch.rand(2, 3, 8, 8)
    with Waits() as waits:
        colorize.train_step(net, Muon(net.parameters()), x, y, 2, recipe)
        assert waits.seen == []
        colorize.evaluate(net, 3 * [(x, y)], recipe.precision, SimpleNamespace(signum=0))
        assert waits.seen == ['tolist']
