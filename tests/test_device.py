"""The device's branches, on a CPU: what a GPU would answer is patched in."""

import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.overrides import TorchFunctionMode

import colorize
import data_utils
from data_utils import PhotoFolder, PhotoLoader, find_room, load_photos
from unet import UNet
from utils import distributed
from utils.checkpoint import Progress, State
from utils.cli import UsageError, explain_error
from utils.device import (
    Precision,
    check_compiler,
    choose_device,
    describe_device,
    free_memory,
    to_device,
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


def test_each_process_takes_the_gpu_of_its_rank(gpus):
    chosen = gpus(2)
    assert choose_device('auto') == torch.device('cuda', 0)
    assert choose_device('cuda', local_rank=1) == torch.device('cuda', 1)
    assert chosen == [0, 1] and torch.backends.cudnn.benchmark
    with pytest.raises(UsageError, match='process 2 has no GPU: this machine has 2; torchrun'):
        choose_device('auto', local_rank=2)
    assert describe_device(torch.device('cuda', 1)) == 'GPU 1'
    assert choose_device('cpu', local_rank=2) == CPU


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


@pytest.mark.parametrize('device, backends', [(CUDA, 'cpu:gloo,cuda:nccl'), (CPU, 'gloo')])
def test_the_backends_of_several_processes(monkeypatch, device, backends):
    started = []
    monkeypatch.setattr(distributed, 'world_size', 2)
    monkeypatch.setattr(dist, 'rendezvous', lambda url: iter([('store', 0, 2)]))
    monkeypatch.setattr(
        dist, 'init_process_group', lambda name, **kwargs: started.append((name, kwargs))
    )
    distributed.init(device)
    assert started == [(backends, dict(store='store', rank=0, world_size=2))]


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


# ---------------------------------------------------------------------------- compiling


@pytest.fixture
def program(drawings, tmp_path, monkeypatch):
    """program(flags...): the exit code of colorize.py on eight drawings, called in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(colorize, 'keep_memory', lambda: None)  # it would outlast the test
    monkeypatch.setattr(colorize.checkpoint, 'StopSignal', lambda: SimpleNamespace(signum=0))
    return lambda *flags: colorize.main(
        [
            '--data_path',
            str(drawings / 'lake'),
            '--image_size',
            '8',
            '--val_fraction',
            '0',
            '--device',
            'cpu',
            '--num_workers',
            '0',
            '--precision',
            'fp32',
            *flags,
        ]
    )


class CountingBackend:
    """A backend of torch.compile that runs each graph as it is, and counts."""

    def __init__(self):
        self.symbolic, self.runs, self.graphs = [], [], 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        number = self.graphs
        self.symbolic += [value for value in inputs if isinstance(value, torch.SymInt)]

        def run(*values):
            photos = next(value for value in values if value.shape[1:] == (1, 8, 8))
            if torch.is_grad_enabled():
                self.runs.append((number, len(photos)))
            return graph(*values)

        return run


def test_full_batches_run_their_own_graph_in_every_epoch(program, monkeypatch):
    """The smaller last batch must not lead to one graph for batches of any size."""
    torch._dynamo.reset()
    backend, compile_net = CountingBackend(), UNet.compile
    monkeypatch.setattr(
        UNet, 'compile', lambda net, **kwargs: compile_net(net, backend=backend, **kwargs)
    )
    assert program('--compile', '--epochs', '3', '--batch_size', '3') == 0
    assert backend.symbolic == []
    graphs = {size: number for number, size in backend.runs}
    assert graphs.keys() == {3, 2} and graphs[3] != graphs[2]
    assert [size for _, size in backend.runs] == 3 * [3, 3, 2]
    assert all(number == graphs[size] for number, size in backend.runs)


def test_compiled_training_is_the_same_training(program, monkeypatch):
    """On the CPU, by the backend that traces forward and backward pass and compiles nothing."""
    torch._dynamo.reset()
    compile_net, losses = UNet.compile, []
    monkeypatch.setattr(
        UNet, 'compile', lambda net, **kwargs: compile_net(net, backend='aot_eager', **kwargs)
    )
    for flags in [], ['--compile']:
        assert program('--epochs', '2', '--batch_size', '3', *flags) == 0
        losses.append(torch.load('runs/UNet/unet.pth', weights_only=True))
        Path('runs').rename(f'runs{len(losses)}')
    assert all(
        (a - b).abs().max() < 1e-4 for a, b in zip(*(loss.values() for loss in losses), strict=True)
    )


def test_a_compiler_that_works_is_accepted():
    check_compiler(CPU)


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """compiler(exit_code): what torch takes for its compilers ends with that code."""

    def compiler(exit_code):
        script = tmp_path / 'compiler'
        script.write_text(f'#!/bin/sh\nexit {exit_code}\n')
        script.chmod(0o755)
        monkeypatch.setenv('CC', str(script))
        monkeypatch.setenv('CXX', str(script))
        return script

    return compiler


REMEDY = '; sudo apt-get install -y build-essential python3-dev, or leave --compile out'


@pytest.mark.parametrize('device', [CPU, CUDA], ids=str)
def test_what_torch_compile_needs_is_named(gpus, compiler, monkeypatch, device):
    gpus(1)
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: name == 'triton')
    compiler(0)
    check_compiler(device)
    script = compiler(1)
    with pytest.raises(UsageError) as refused:
        check_compiler(device)
    assert re.fullmatch(f'--compile: {script} finds no Python.h in /.*{REMEDY}', str(refused.value))
    script.unlink()
    with pytest.raises(UsageError) as refused:
        check_compiler(device)
    assert str(refused.value) == f'--compile: no C compiler ({script}){REMEDY}'


def test_a_gpu_that_triton_cannot_use(gpus, monkeypatch):
    gpus(1, (6, 1))
    with pytest.raises(
        UsageError,
        match='--compile: GPU 0 is too old for triton, which needs '
        'compute capability 7.0; leave --compile out',
    ):
        check_compiler(torch.device('cuda', 0))
    gpus(1, (7, 0))
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(UsageError, match='--compile: pip install triton, or leave --compile out'):
        check_compiler(torch.device('cuda', 0))


def test_a_python_that_torch_compile_does_not_know(monkeypatch):
    def refuse(_):
        raise RuntimeError('torch.compile is not supported on Python 3.99+')

    monkeypatch.setattr(torch, 'compile', refuse)
    with pytest.raises(UsageError, match=r'--compile: .* Python 3.99\+; leave --compile out'):
        check_compiler(CPU)


def test_the_program_refuses_to_compile_before_it_starts(
    program, compiler, monkeypatch, tmp_path, capsys
):
    def too_late(*_, **__):
        raise AssertionError('the run has started')

    monkeypatch.setattr(UNet, 'compile', too_late)
    compiler(1)
    assert program('--compile') == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith('colorize.py: --compile: ')
    assert not (tmp_path / 'runs').exists()


# ---------------------------------------------------------------------------- resuming elsewhere


def state_of(fused, lr=1e-3, precision='fp32'):
    torch.manual_seed(0)
    net = nn.Conv2d(1, 3, 3, padding=1)
    optimizer = torch.optim.Adam(net.parameters(), lr, fused=fused)
    return State(net, optimizer, Precision(precision).scaler, Progress(), {})


def take_steps(state, precision, steps=2):
    torch.manual_seed(1)
    for _ in range(steps):
        x = torch.rand(2, 1, 8, 8)
        batch = x, x.expand(2, 3, 8, 8)
        colorize.train_step(
            state.net, state.optimizer, colorize.Recipe(Precision(precision)), batch, 2
        )


@pytest.mark.parametrize('precision', ['fp32', 'bf16', 'fp16'])
@pytest.mark.parametrize(
    'before, after', [(False, True), (True, False)], ids=['from MPS', 'to MPS']
)
def test_resuming_on_another_kind_of_device(tmp_path, before, after, precision):
    """The moments come from the checkpoint; the learning rate, fused or not, from the run."""
    old = state_of(before, lr=0.5)
    take_steps(old, 'fp32')
    old.save(tmp_path / 'checkpoint.pth')
    new = state_of(after, lr=1e-3, precision=precision)
    new.restore(torch.load(tmp_path / 'checkpoint.pth', weights_only=True))
    (group,) = new.optimizer.param_groups
    assert (group['fused'], group['lr']) == (after, 1e-3)
    for parameter, saved in zip(new.net.parameters(), old.net.parameters(), strict=True):
        assert torch.equal(parameter, saved)
        moments, were = new.optimizer.state[parameter], old.optimizer.state[saved]
        assert moments['step'] == 2
        assert torch.equal(moments['exp_avg'], were['exp_avg'])
        assert torch.equal(moments['exp_avg_sq'], were['exp_avg_sq'])
    take_steps(new, precision)
    assert all(moments['step'] == 4 for moments in new.optimizer.state.values())


@pytest.mark.parametrize('first, second', [('fp16', 'bf16'), ('bf16', 'fp16'), ('fp16', 'fp16')])
def test_a_run_goes_on_in_another_precision(program, first, second):
    flags = ['--batch_size', '4', '--resume']
    assert program(*flags, '--epochs', '1', '--precision', first) == 0
    before = torch.load('runs/UNet/checkpoint.pth', weights_only=True)
    assert program(*flags, '--epochs', '2', '--precision', second) == 0
    after = torch.load('runs/UNet/checkpoint.pth', weights_only=True)
    assert after['progress']['epoch'] == 2
    for checkpoint, precision in (before, first), (after, second):
        assert ('scale' in checkpoint['scaler']) == (precision == 'fp16')
    assert after['optimizer'][0]['step'] > before['optimizer'][0]['step'] > 0


# ---------------------------------------------------------------------------- to and fro


@pytest.fixture
def copies(monkeypatch):
    """The copies between host and device, in order; a GPU is played by the CPU."""
    done, move = [], torch.Tensor.to

    def pin(tensor):
        done.append('pin')
        return tensor

    def to(tensor, *target, **kwargs):
        if target == (CUDA,):
            done.append(kwargs)
            return tensor
        return move(tensor, *target, **kwargs)

    monkeypatch.setattr(torch.Tensor, 'pin_memory', pin)
    monkeypatch.setattr(torch.Tensor, 'to', to)
    return done


def test_a_copy_to_a_gpu_does_not_wait(copies):
    x = torch.rand(2)
    assert to_device(x, CUDA) is x
    assert copies == ['pin', {'non_blocking': True}]
    assert to_device(x, CPU) is x and to_device(x, 'cpu') is x
    assert len(copies) == 2  # on a CPU nothing is pinned


@pytest.mark.parametrize('in_memory', [True, False], ids=['host memory', 'streamed'])
def test_photos_are_mirrored_on_the_device(drawings, copies, in_memory):
    """Bytes and flips are copied; the batches are those of a run without a GPU."""
    folder = PhotoFolder(drawings, 8)
    photos = load_photos(folder, CPU) if in_memory else folder
    expected = list(PhotoLoader(photos, range(20), 8, CPU, seed=3))
    assert copies == []
    batches = list(PhotoLoader(photos, range(20), 8, CUDA, seed=3))
    assert copies == 3 * 2 * ['pin', {'non_blocking': True}]
    for batch, other in zip(batches, expected, strict=True):
        assert torch.equal(batch[0], other[0]) and torch.equal(batch[1], other[1])


class Waits(TorchFunctionMode):
    """The calls that make the host wait for a GPU."""

    NAMES = {'cpu', 'item', 'tolist', 'numpy', '__bool__', '__float__', '__int__', 'nonzero'}

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, '__name__', '') in self.NAMES:
            self.seen.append(function.__name__)
        return function(*args, **(kwargs or {}))


def test_evaluation_waits_for_the_device_once():
    torch.manual_seed(0)
    loader = [(torch.rand(2, 1, 8, 8) * 2 - 1, torch.rand(2, 3, 8, 8)) for _ in range(5)]
    with Waits() as waits:
        metrics = colorize.evaluate(UNet(), loader, Precision(), SimpleNamespace(signum=0))
    assert waits.seen == ['tolist']
    assert metrics['PSNR of prediction'] > 0


def test_a_training_step_does_not_wait():
    net = UNet()
    optimizer = torch.optim.Adam(net.parameters(), fused=True)
    batch = torch.rand(2, 1, 8, 8), torch.rand(2, 3, 8, 8)
    for name in 'fp32', 'bf16':
        with Waits() as waits:
            colorize.train_step(net, optimizer, colorize.Recipe(Precision(name)), batch, 2)
        assert waits.seen == []


# ---------------------------------------------------------------------------- memory


def test_the_free_memory_of_each_device(gpus, monkeypatch):
    gpus(1)
    assert free_memory(CUDA) == 10**9
    monkeypatch.setattr(torch.mps, 'recommended_max_memory', lambda: 9, raising=False)
    monkeypatch.setattr(torch.mps, 'current_allocated_memory', lambda: 2)
    assert free_memory(MPS) == 7


@pytest.mark.parametrize(
    'free, home',
    [
        (dict(cuda=9000, cpu=9000), 'cuda'),
        (dict(cuda=100, cpu=9000), 'cpu'),
        (dict(cuda=100, cpu=100), None),
    ],
)
def test_photos_go_where_there_is_room(drawings, monkeypatch, capsys, free, home):
    folder = PhotoFolder(drawings, 8)
    folder.keep(list(range(20)), [])  # 3840 bytes; half of what is free may be taken
    monkeypatch.setattr(data_utils, 'free_memory', lambda device: free[device.type])
    room = find_room(folder, CUDA)
    assert (room and room.type) == home
    assert ('streaming the photos' in capsys.readouterr().out) == (home is None)


# ---------------------------------------------------------------------------- errors of a device

OTHERS = (
    'out of memory on the GPU: if nvidia-smi shows another program there, end that; else try '
    '--batch_size 16 or less'
)
SMALLER = 'out of memory with --batch_size 32: try --batch_size 16 or less'
ADVICE = '\nCUDA kernel errors might be asynchronously reported at some other API call'


@pytest.mark.parametrize(
    'error, line',
    [
        (
            torch.OutOfMemoryError(
                'CUDA out of memory. Tried to allocate 9 GiB. GPU 0 has a total '
                'capacity of 15 GiB of which 1 GiB is free. Including non-PyTorch '
                'memory, this process has 14 GiB memory in use.'
            ),
            SMALLER,
        ),
        (
            torch.OutOfMemoryError(
                'CUDA out of memory. Tried to allocate 9 GiB. GPU 0 has a total '
                'capacity of 15 GiB of which 1 GiB is free. Process 4711 has 12 GiB '
                'memory in use.'
            ),
            OTHERS,
        ),
        (
            getattr(torch, 'AcceleratorError', RuntimeError)(f'CUDA error: out of memory{ADVICE}'),
            OTHERS,
        ),
        (
            RuntimeError(
                'MPS backend out of memory (MPS allocated: 17.91 GB, other allocations: 1 MB, '
                'max allowed: 18.13 GB). Tried to allocate 9 GB on private pool.'
            ),
            SMALLER,
        ),
        (RuntimeError('cuDNN error: CUDNN_STATUS_ALLOC_FAILED'), SMALLER),
        (
            RuntimeError(
                'CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`'
            ),
            OTHERS,
        ),
        (
            RuntimeError(
                "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
            ),
            SMALLER,
        ),
        (MemoryError(), SMALLER),
        (
            RuntimeError(
                f'CUDA error: no kernel image is available for execution on the device{ADVICE}'
            ),
            f'torch {torch.__version__} was not built for this GPU: install one that was '
            '(https://pytorch.org/get-started/previous-versions), or --device cpu',
        ),
    ],
    ids=[
        'allocator',
        'allocator, other program',
        'CUDA',
        'MPS',
        'cuDNN',
        'cuBLAS',
        'host',
        'Python',
        'old GPU',
    ],
)
def test_errors_of_a_device_in_one_line(error, line):
    assert explain_error(error, 32) == (1, line)


@pytest.mark.parametrize(
    'processes, batch_size, remedy',
    [
        (1, 1, 'a smaller --image_size'),
        (1, 2, '--batch_size 1 or less'),
        (4, 4, 'a smaller --image_size'),
        (4, 5, '--batch_size 2 or less'),
    ],
)
def test_the_batch_that_is_named_needs_less_memory(monkeypatch, processes, batch_size, remedy):
    """Where each process has one photo, no smaller batch does."""
    monkeypatch.setattr(dist, 'is_initialized', lambda: True)
    monkeypatch.setattr(dist, 'get_world_size', lambda: processes)
    assert explain_error(MemoryError(), batch_size) == (
        1,
        f'out of memory with --batch_size {batch_size}: try {remedy}',
    )


def test_our_own_errors_keep_their_traceback():
    assert explain_error(RuntimeError('CUDA error: an illegal memory access'), 32) == (0, '')
    assert explain_error(ValueError('out of memory'), 32) == (0, '')
