"""What only a GPU can show. Skipped where there is none; benchmarks/gpu.sh runs it first."""

import pytest
import torch

import colorize
from data_utils import batches, read_photos
from unet import UNet
from utils.cli import explain_error
from utils.device import Precision, channels_last, check_compiler, choose_device, free_memory
from utils.muon import Muon
from utils.photos import list_photos

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no GPU')
PRECISIONS = ['fp32', 'bf16', 'fp16']


@pytest.fixture
def device():
    return choose_device('cuda')


def new_network(device):
    torch.manual_seed(0)
    net = channels_last(UNet(), device)
    return net, Muon(net.parameters(), 1e-4)


def drawn_batches(device, sizes=(4, 4, 2), image_size=32):
    torch.manual_seed(1)
    loader = []
    for size in sizes:
        y = torch.rand(size, 1, image_size, image_size) * torch.tensor([1, 0.6, 0.3]).view(3, 1, 1)
        y = y.to(device, memory_format=torch.channels_last)
        loader.append((y.mean(1, keepdim=True) * 2 - 1, y))
    return loader


@pytest.mark.parametrize('name', PRECISIONS)
def test_a_gpu_learns_what_a_cpu_learns(device, name):
    first, last = [], []
    for home, precision in (torch.device('cpu'), 'fp32'), (device, name):
        net, optimizer = new_network(home)
        recipe, loader = colorize.Recipe(Precision(precision, home)), drawn_batches(home)
        losses = [
            colorize.train_epoch(net, optimizer, loader, colorize.Progress(), recipe)
            for _ in range(9)
        ]
        first.append(losses[0])
        last.append(losses[-1])
    # later, rounding is amplified, and float16 skips a step where its scale is too large
    assert first[1] == pytest.approx(first[0], rel=0.03)
    assert max(last) < min(first) / 2


@pytest.mark.parametrize('name', PRECISIONS)
def test_a_step_does_not_wait_for_the_gpu(device, name):
    net, optimizer = new_network(device)
    recipe, ((x, y), *_) = colorize.Recipe(Precision(name, device)), drawn_batches(device)
    colorize.train_step(net, optimizer, x, y, 4, recipe)  # the first one prepares
    torch.cuda.set_sync_debug_mode('error')
    try:
        colorize.train_step(net, optimizer, x, y, 4, recipe)
    finally:
        torch.cuda.set_sync_debug_mode('default')


@pytest.mark.parametrize('name', PRECISIONS)
def test_a_step_without_a_photo(device, name):
    net, optimizer = new_network(device)
    before = [weight.clone() for weight in net.parameters()]
    x, y = drawn_batches(device, [0])[0]
    recipe = colorize.Recipe(Precision(name, device))
    assert colorize.train_step(net, optimizer, x, y, 4, recipe).item() == 0
    assert all(map(torch.equal, before, net.parameters()))


@pytest.mark.parametrize('kwargs', [{}, dict(mode='reduce-overhead')], ids=['compiled', 'graphs'])
def test_compiled_steps_are_the_same_steps(device, kwargs):
    check_compiler(device)
    losses = []
    for compiled in False, True:
        net, optimizer = new_network(device)
        if compiled:
            net.compile(dynamic=False, **kwargs)
        losses.append(colorize.train(net, optimizer, drawn_batches(device), epochs=3))
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


@pytest.mark.parametrize('home', ['GPU', 'host'])
def test_batches_are_those_of_a_run_on_the_cpu(drawings, device, home):
    names, cpu = list_photos(drawings), torch.device('cpu')
    on_host = read_photos(drawings, names, 0.1, 16, cpu)
    photos = read_photos(drawings, names, 0.1, 16, device) if home == 'GPU' else on_host
    assert photos.pixels.is_cuda == (home == 'GPU')
    theirs = batches(photos, range(50), 8, device, seed=3)
    for (x, y), (x1, y1) in zip(theirs, batches(on_host, range(50), 8, cpu, seed=3), strict=True):
        assert y.device.type == 'cuda'
        # a GPU multiplies by 1/255, whose last bit differs from a division's
        torch.testing.assert_close((x.cpu(), y.cpu()), (x1, y1), rtol=0, atol=1e-6)


def test_too_large_a_batch_names_a_smaller_one(device):
    with pytest.raises(torch.OutOfMemoryError) as error:
        torch.empty(2 * free_memory(device) + 2**40, dtype=torch.uint8, device=device)
    code, line = explain_error(error.value, 32)
    assert code == 1 and 'try a smaller --batch_size than 32' in line


@pytest.mark.parametrize(
    'first, second',
    [
        ('--precision fp16', '--precision bf16'),
        ('--precision bf16', '--precision fp16'),
        ('--device cpu', '--device cuda'),
    ],
)
def test_a_run_goes_on_in_another_precision_and_elsewhere(drawings, run, first, second):
    flags = '--data_path', drawings, '--image_size', 32, '--resume', '--epochs'
    for epochs, other in (1, first), (2, second):
        done = run('colorize.py', *flags, epochs, *other.split())
        assert done.stderr == '' and f'\n   {epochs}/{epochs} ' in done.stdout
