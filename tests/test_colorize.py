import fcntl
import io
import math
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time

import pytest
import torch
from browser import TAGS
from checkpoint import Progress, Stopped
from conftest import ROOT
from device import Precision
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_unet import TemplateUNet
from torchvision.transforms.functional import pil_to_tensor

import colorize
from unet import UNet


def events(folder):
    return EventAccumulator(str(folder), size_guidance={'images': 0, 'scalars': 0}).Reload()


def series(page, tag):
    return [(event.step, event.value) for event in page.Scalars(tag)]


def batches(n=3, size=16):
    torch.manual_seed(0)
    return [(torch.rand(4, 1, size, size) * 2 - 1, torch.rand(4, 3, size, size))
            for _ in range(n)]


class Writer:
    def __init__(self):
        self.seen = []

    def add_scalar(self, *event):
        self.seen.append(event)


# ---------------------------------------------------------------------------- train()

def test_train_as_a_student_calls_it():
    torch.manual_seed(1)
    net, by_hand = UNet(), UNet()
    by_hand.load_state_dict(net.state_dict())
    writer, loader = Writer(), batches()
    loss = colorize.train(net, torch.optim.Adam(net.parameters(), 1e-3), loader, 2, writer)

    optimizer, losses = torch.optim.Adam(by_hand.parameters(), 1e-3), []
    for _ in range(2):
        for x, y in loader:
            optimizer.zero_grad()
            error = torch.nn.functional.mse_loss(by_hand(x), y)
            error.backward()
            optimizer.step()
            losses.append(error.item())
    expected = [sum(losses[:3]) / 3, sum(losses[3:]) / 3]
    assert loss == pytest.approx(expected[1], rel=1e-4)
    assert [(tag, step) for tag, _, step in writer.seen] == [('training loss', 1),
                                                             ('training loss', 2)]
    assert [value for _, value, _ in writer.seen] == pytest.approx(expected, rel=1e-4)


def test_train_takes_any_network():
    net = torch.nn.Conv2d(1, 3, 1)
    assert 0 < colorize.train(net, torch.optim.SGD(net.parameters(), 0.1), batches()) < 0.25


def test_a_batch_of_many_weighs_more_in_the_mean():
    net = torch.nn.Conv2d(1, 3, 1)
    for parameter in net.parameters():
        torch.nn.init.zeros_(parameter)
    x = torch.zeros(3, 1, 8, 8)
    loader = [(x, torch.ones(3, 3, 8, 8)), (x[:1], torch.zeros(1, 3, 8, 8))]
    assert colorize.train(net, torch.optim.SGD(net.parameters(), 0.0), loader, 1) == 0.75


@pytest.mark.parametrize('bad, finite', [(float('nan'), 1), (float('inf'), 2)])
def test_a_loss_that_is_not_finite_names_its_step(bad, finite):
    loader = batches()
    loader[finite][1][0, 0, 0, 0] = bad
    net = UNet()
    with pytest.raises(FloatingPointError, match=f'at step {finite + 1} of epoch 1.*--lr'):
        colorize.train(net, torch.optim.Adam(net.parameters()), loader)


def test_weights_that_became_infinite_in_the_last_step_are_seen():
    net = UNet()
    with pytest.raises(FloatingPointError, match='weight is not finite at step 1 of epoch 1'):
        colorize.train(net, torch.optim.SGD(net.parameters(), math.inf), batches(1), 1)


def test_a_stop_finishes_the_step_and_tells_the_place():
    class Stop:
        asked = 0

        @property
        def number(self):
            self.asked += 1
            return 15 if self.asked > 2 else 0

    net, progress = UNet(), Progress()
    with pytest.raises(Stopped):
        colorize.train(net, torch.optim.Adam(net.parameters()), batches(), progress=progress,
                       stop=Stop())
    assert (progress.epoch, progress.step, progress.photos) == (0, 2, 8)


@pytest.mark.parametrize('name', ['bf16', 'fp16'])
def test_half_precision_on_the_cpu_stays_near_float32(name):
    losses = []
    for precision in Precision('fp32'), Precision(name):
        torch.manual_seed(0)
        net = UNet()
        losses.append(colorize.train(net, torch.optim.Adam(net.parameters(), 1e-3), batches(), 3,
                                     precision=precision))
        assert all(p.dtype == torch.float32 for p in net.parameters())
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.03)


# ---------------------------------------------------------------------------- whole runs

@pytest.fixture(scope='module')
def trained(drawings, tmp_path_factory):
    """The folder of a run of two epochs on the drawings, and what it printed."""
    folder = tmp_path_factory.mktemp('trained')
    done = subprocess.run(
        [sys.executable, ROOT / 'colorize.py', '--data_path', drawings, '--image_size', '32',
         '--batch_size', '16', '--epochs', '2', '--val_fraction', '0.4', '--device', 'cpu'],
        cwd=folder, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, '')
    return folder, done.stdout.splitlines()


def test_weights_load_into_the_template_s_network(trained):
    state = torch.load(trained[0] / 'unet.pth', weights_only=True)
    assert type(state).__name__ == 'OrderedDict' or type(state) is dict
    for value in state.values():
        assert value.dtype == torch.float32 and value.device.type == 'cpu'
        assert value.is_contiguous() and not value.requires_grad
    TemplateUNet().load_state_dict(state, strict=True)
    own = UNet()
    own.load_state_dict(torch.load(trained[0] / 'unet.pth'))
    assert (trained[0] / 'unet.pth').stat().st_size < 7.9e6  # the weights alone


def test_a_line_an_epoch_and_what_comes_next(trained):
    _, lines = trained
    epochs = [line for line in lines if line.startswith('epoch ')]
    assert len(epochs) == 2 and len(lines) == 6
    assert re.fullmatch(
        r'epoch 2/2  training loss 0\.\d{5}  validation loss 0\.\d{5}  PSNR \d+\.\d\d dB, '
        r'with luminance \d+\.\d\d \(grey copy \d+\.\d\d\)  colorfulness \d+ of \d+  lr 0\.001  '
        r'\d+\.\d photos/s', epochs[1])
    assert 'tensorboard --logdir runs --port 8898' in lines[-2]
    assert 'python predict.py' in lines[-1]


def test_tensorboard_has_scalars_grids_graph_and_settings(trained):
    page = events(trained[0] / 'runs/UNet')
    assert set(page.Tags()['scalars']) == TAGS
    for tag in TAGS:
        assert [step for step, _ in series(page, tag)] == [1, 2]
    assert series(page, 'learning rate')[0][1] == pytest.approx(1e-3)
    for tag in 'Input', 'Predicted', 'Ground truth':
        assert [event.step for event in page.Images(tag)] == [1, 2]
    first, last = ([pixels(page.Images(tag)[n]) for tag in ('Input', 'Ground truth', 'Predicted')]
                   for n in (0, 1))
    assert torch.equal(first[0], last[0]) and torch.equal(first[1], last[1])
    assert not torch.equal(first[2], last[2])
    gray, truth = first[0], first[1]
    # the input is undone from [-1, 1]: it is the truth's own grey
    assert torch.equal(gray[0], gray[1])
    assert (gray[0] - (0.299 * truth[0] + 0.587 * truth[1] + 0.114 * truth[2])).abs().max() <= 1
    nodes = {node.name for node in page.Graph().node}
    for n in 1, 2, 3:
        for block in f'downsample_block_{n}', f'upsample_block_{n}':
            assert any(block in node for node in nodes)


def pixels(event):
    return pil_to_tensor(Image.open(io.BytesIO(event.encoded_image_string)).convert('RGB')).int()


def test_best_weights_are_kept(small, run, tmp_path):
    run('colorize.py', *small)
    checkpoint = torch.load(tmp_path / 'runs/UNet/checkpoint.pth', weights_only=True)
    losses = [value for _, value in series(events(tmp_path / 'runs/UNet'), 'validation loss')]
    assert checkpoint['progress']['best'] == pytest.approx(min(losses))
    # a third epoch with a ruinous learning rate changes the checkpoint but not the weights
    weights = (tmp_path / 'unet.pth').read_bytes()
    run('colorize.py', *small, '--epochs', 3, '--lr', 0.3, '--resume')
    assert (tmp_path / 'unet.pth').read_bytes() == weights
    checkpoint = torch.load(tmp_path / 'runs/UNet/checkpoint.pth', weights_only=True)
    assert checkpoint['progress']['epoch'] == 3


def test_a_second_run_keeps_the_first_one_s_curves_and_weights(small, run, tmp_path):
    one = [*small, '--epochs', 1]
    run('colorize.py', *one)
    weights = (tmp_path / 'unet.pth').read_bytes()
    done = run('colorize.py', *one, '--seed', 1)
    assert 'logging in runs/UNet_2' in done.stdout
    assert 'the unet.pth that was here is now unet_1.pth' in done.stdout
    assert (tmp_path / 'unet_1.pth').read_bytes() == weights
    assert (tmp_path / 'unet.pth').read_bytes() != weights
    # also where the first run goes on after the second
    other = (tmp_path / 'unet.pth').read_bytes()
    run('colorize.py', *small, '--epochs', 4, '--resume')
    assert (tmp_path / 'unet_2.pth').read_bytes() == other
    for name, epochs in ('UNet', 4), ('UNet_2', 1):
        assert len(series(events(tmp_path / 'runs' / name), 'training loss')) == epochs


def test_without_validation_the_last_weights_are_saved(small, run, tmp_path):
    done = run('colorize.py', *small, '--val_fraction', 0)
    assert '56 photos to train on, 0 held out' in done.stdout
    checkpoint = torch.load(tmp_path / 'runs/UNet/checkpoint.pth', weights_only=True)
    weights = torch.load(tmp_path / 'unet.pth', weights_only=True)
    assert all(torch.equal(weights[name], value) for name, value in checkpoint['net'].items())
    assert 'validation loss' not in events(tmp_path / 'runs/UNet').Tags()['scalars']


def test_a_dry_run_goes_through_everything_and_keeps_nothing(drawings, run, tmp_path):
    done = run('colorize.py', '--data_path', drawings, '--dry_run', '--device', 'cpu',
               '--image_size', 32)
    assert '8 photos to train on' in done.stdout and 'validation loss' in done.stdout
    assert list(tmp_path.iterdir()) == [] and done.stderr == ''


def test_a_tiny_run_learns(drawings, tmp_path, run):
    """The script is its own test: it must get somewhere."""
    run('colorize.py', '--data_path', drawings, '--image_size', 32, '--batch_size', 8,
        '--epochs', 8, '--val_fraction', 0.25, '--device', 'cpu')
    page = events(tmp_path / 'runs/UNet')
    gray = series(page, 'PSNR/gray copy')[-1][1]
    assert series(page, 'PSNR/prediction')[-1][1] > gray + 1
    assert series(page, 'PSNR/with luminance')[-1][1] > gray + 1


def test_a_demo_that_does_not_learn_says_so(run, drawings, tmp_path):
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data/demo').symlink_to(drawings)
    done = run('colorize.py', '--demo', '--epochs', 1, '--lr', 1e-9, '--device', 'cpu', code=1)
    assert re.search(r'does not colorize: -?\d+\.\d dB over the grey copy, not 3', done.stderr)
    assert (tmp_path / 'unet.pth').exists()


def test_photos_that_cannot_be_read_are_named_and_counted(small, run, drawings, tmp_path):
    data = tmp_path / 'data'
    data.mkdir()
    for n, photo in enumerate(sorted(drawings.rglob('*.jpg'))[:30]):
        (data / f'{n}.jpg').symlink_to(photo)
    (data / 'words.jpg').write_text('not a photo')
    (data / 'empty.png').touch()
    for stream in [], ['--stream']:
        done = run('colorize.py', *small, '--data_path', data, '--name', 'bad', *stream)
        assert sorted(line for line in done.stderr.splitlines() if 'skipped' in line) == [
            "skipped 'empty.png': no photo that Pillow can read",
            "skipped 'words.jpg': no photo that Pillow can read"]
        assert '2 of 32 photos could not be read and were skipped' in done.stdout


def test_streaming_gives_the_same_weights(small, run, tmp_path):
    weights = []
    for flags in [], ['--stream'], ['--stream', '--num_workers', 0]:
        run('colorize.py', *small, *flags)
        weights.append((tmp_path / 'unet.pth').read_bytes())
    assert weights[0] == weights[1] == weights[2]


# ---------------------------------------------------------------------------- refusals

@pytest.mark.parametrize('flags, names', [
    (['--data_path', 'nowhere'], ['nowhere', './download_landscapes.sh', '--demo']),
    (['--data_path', 'file.jpg'], ['file.jpg', 'a file', '--data_path']),
    (['--data_path', 'empty'], ['empty', 'no photos']),
    (['--data_path', 'three', '--val_fraction', '0.01'], ['--val_fraction 0.01', '3 photos']),
    (['--data_path', 'three', '--val_fraction', '1'], ['--val_fraction', 'below 1']),
    (['--data_path', 'three', '--val_fraction', '0'], ['none of the photos could be read']),
    (['--batch_size', '0'], ['--batch_size', '0 is not a whole number above 0']),
    (['--batch_size', 'many'], ['--batch_size', 'many is not']),
    (['--epochs', '-1'], ['--epochs', '-1 is not']),
    (['--lr', 'nan'], ['--lr', 'nan is not a number above 0']),
    (['--lr', '0'], ['--lr', '0 is not']),
    (['--lr', 'inf'], ['--lr', 'inf is not']),
    (['--image_size', '225'], ['--image_size', '225 is not a multiple of 8']),
    (['--num_workers', '-1'], ['--num_workers', '-1 is not']),
    (['--seed', 'x'], ['--seed', 'x is not']),
    (['--name', '../up'], ['--name', '../up']),
    (['--device', 'tpu'], ['--device', 'tpu']),
    (['--epoch', '3'], ['--epoch']),
    pytest.param(['--device', 'cuda'], ['--device cuda', 'nvidia-smi', '--device cpu'],
                 marks=pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')),
])
def test_a_wrong_request_gets_one_line(run, tmp_path, flags, names):
    (tmp_path / 'file.jpg').touch()
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'three').mkdir()
    for n in range(3):
        (tmp_path / f'three/{n}.jpg').write_text('no photo')
    done = run('colorize.py', *flags, '--image_size', 8, *flags[:2], code=2)
    lines = [line for line in done.stderr.splitlines() if 'skipped' not in line]
    assert len(lines) == 1 and lines[0].startswith('colorize.py: ')
    assert all(name in lines[0] for name in names), lines
    assert not (tmp_path / 'unet.pth').exists()


def test_a_log_file_stays_quiet_and_a_terminal_sees_a_bar(small, tmp_path):
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        os.execv(sys.executable, [sys.executable, str(ROOT / 'colorize.py'), *map(str, small)])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack('HHHH', 25, 120, 0, 0))
    shown = b''
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            shown += os.read(terminal, 4096)
        except OSError:  # the other end is closed
            break
    os.waitpid(pid, 0)
    assert b'reading photos' in shown and b'epoch 1:' in shown
    assert shown.count(b'epoch 2/2') == 1
