import io
import math
import re
import shlex
import signal
import subprocess
import sys
from functools import partialmethod

import pytest
import torch
from helpers import (
    CHECKPOINT,
    FLAGS,
    GAIN,
    IMAGES,
    ROOT,
    TAGS,
    WEIGHTS,
    TemplateUNet,
    Training,
    call,
    curves,
    events,
    load,
    series,
    signal_after,
)
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

import colorize
import data_utils
from unet import UNet
from utils import device
from utils.checkpoint import Progress, Stopped
from utils.device import Precision


def batches(n=3, size=16):
    torch.manual_seed(0)
    return [(torch.rand(4, 1, size, size) * 2 - 1, torch.rand(4, 3, size, size)) for _ in range(n)]


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
    assert [(tag, step) for tag, _, step in writer.seen] == [
        ('training loss', 1),
        ('training loss', 2),
    ]
    assert [value for _, value, _ in writer.seen] == pytest.approx(expected, rel=1e-4)


def test_train_takes_any_network():
    net = torch.nn.Conv2d(1, 3, 1)
    assert 0 < colorize.train(net, torch.optim.SGD(net.parameters(), 0.1), batches()) < 0.25


def test_without_an_epoch_nothing_changes_and_there_is_no_loss():
    net, writer = UNet(), Writer()
    before = [weight.clone() for weight in net.parameters()]
    assert math.isnan(colorize.train(net, torch.optim.Adam(net.parameters()), batches(), 0, writer))
    assert all(map(torch.equal, before, net.parameters())) and writer.seen == []


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
    with pytest.raises(FloatingPointError, match=f'at step {finite + 1} of epoch 1'):
        colorize.train(net, torch.optim.Adam(net.parameters()), loader)


def test_weights_that_became_infinite_in_the_last_step_are_seen():
    net = UNet()
    with pytest.raises(FloatingPointError, match='weight is not finite at step 1 of epoch 1'):
        colorize.train(net, torch.optim.SGD(net.parameters(), math.inf), batches(1), 1)


def test_a_stop_finishes_the_step_and_tells_the_place():
    class Stop:
        asked = 0

        @property
        def signum(self):
            self.asked += 1
            return 15 if self.asked > 2 else 0

    net, progress = UNet(), Progress()
    with pytest.raises(Stopped):
        colorize.train_epoch(
            net, torch.optim.Adam(net.parameters()), batches(), progress, stop=Stop()
        )
    assert (progress.epoch, progress.step, progress.photos) == (0, 2, 8)


@pytest.mark.parametrize('name', ['bf16', 'fp16'])
def test_half_precision_on_the_cpu_stays_near_float32(name):
    losses = []
    for precision in Precision('fp32'), Precision(name):
        torch.manual_seed(0)
        net = UNet()
        optimizer = torch.optim.Adam(net.parameters(), 1e-3)
        for epoch in range(2):
            loss = colorize.train_epoch(
                net, optimizer, batches(2, 8), Progress(epoch), colorize.Recipe(precision)
            )
        losses.append(loss)
        assert all(p.dtype == torch.float32 for p in net.parameters())
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.03)


# ---------------------------------------------------------------------------- whole runs


@pytest.fixture(scope='module')
def trained(drawings, tmp_path_factory):
    """The folder of a run of two epochs in a process of its own, which prints into `log`."""
    folder = tmp_path_factory.mktemp('trained')
    with open(folder / 'log', 'w') as log:
        subprocess.run(
            [
                sys.executable,
                ROOT / 'colorize.py',
                '--data_path',
                drawings,
                *FLAGS,
                '--epochs',
                '2',
                '--val_fraction',
                '0.4',
            ],
            cwd=folder,
            stdout=log,
            stderr=subprocess.STDOUT,
            check=True,
        )
    return folder


def test_weights_load_into_the_template_s_network(trained):
    state = load(trained / 'unet.pth')
    assert type(state).__name__ == 'OrderedDict' or type(state) is dict
    for value in state.values():
        assert value.dtype == torch.float32 and value.device.type == 'cpu'
        assert value.is_contiguous() and not value.requires_grad
    for net in TemplateUNet(), UNet():
        net.load_state_dict(state, strict=True)
    assert (trained / 'unet.pth').stat().st_size < 7.9e6  # the weights alone


def test_a_log_file_has_a_line_an_epoch_and_what_comes_next(trained):
    text = (trained / 'log').read_text()
    epochs = [line.split() for line in text.splitlines() if re.match(r' +\d/2 ', line)]
    assert '\r' not in text and len(epochs) == 2
    page = events(trained / 'runs/UNet')
    for number, words in enumerate(epochs):
        value = {tag: series(page, tag)[number][1] for tag in TAGS}
        assert words[:3] == [
            f'{number + 1}/2',
            f'{value["training loss"]:.5f}',
            f'{value["validation loss"]:.5f}',
        ]
        assert f'{value[GAIN]:+.2f}' in words
        assert f'{value["photos per second"]:.1f}' in words
    assert 'tensorboard --logdir runs --port 8898' in text and 'python predict.py' in text


def test_a_terminal_sees_bars(drawings, tmp_path):
    training = Training(tmp_path, drawings, '--epochs', '1')
    assert training.end() == 0, training.text
    assert 'reading photos: ' in training.text and 'epoch 1: ' in training.text
    assert len(re.findall(r' 1/1 +0\.', training.text)) == 1


def pixels(event):
    return pil_to_tensor(Image.open(io.BytesIO(event.encoded_image_string)).convert('RGB')).int()


def test_tensorboard_has_scalars_grids_graph_and_settings(trained):
    page = events(trained / 'runs/UNet')
    assert set(page.Tags()['scalars']) == TAGS
    for tag in TAGS:
        assert [step for step, _ in series(page, tag)] == [1, 2]
    for tag in IMAGES:
        assert [event.step for event in page.Images(tag)] == [1, 2]
    first, last = (
        [pixels(page.Images(tag)[n]) for tag in ('Input', 'Ground truth', 'Predicted')]
        for n in (0, 1)
    )
    assert torch.equal(first[0], last[0]) and torch.equal(first[1], last[1])
    assert not torch.equal(first[2], last[2])
    # the input is undone from [-1, 1]: it is the truth's own gray, but for the JPEG's losses
    gray, truth = first[0].float(), first[1].float()
    luma = 0.299 * truth[0] + 0.587 * truth[1] + 0.114 * truth[2]
    assert (gray - luma).abs().mean() < 2 and luma.std() > 20
    nodes = {node.name for node in page.Graph().node}
    for n in 1, 2, 3:
        for block in f'downsample_block_{n}', f'upsample_block_{n}':
            assert any(block in node for node in nodes)


def test_without_validation_the_last_weights_are_saved(train, tmp_path):
    assert '56 photos to train on, 0 held out' in train('--val_fraction', 0, '--epochs', 2).out
    weights = load(tmp_path / 'unet.pth')
    assert all(
        torch.equal(weights[name], value)
        for name, value in load(tmp_path / CHECKPOINT)['net'].items()
    )
    assert 'validation loss' not in curves(tmp_path)


def test_a_dry_run_goes_through_everything_and_keeps_nothing(train, tmp_path):
    printed = train('--dry_run')
    assert '8 photos to train on' in printed.out and ' 1/1 ' in printed.out
    assert list(tmp_path.iterdir()) == [] and printed.err == ''


def squared_error(path, truth):
    a, b = (pil_to_tensor(image).float() for image in (Image.open(path).convert('RGB'), truth))
    return (a - b).square().mean().item()


def test_a_tiny_run_learns(train, run, drawings, tmp_path):
    """The script is its own test: it and the commands that it prints must get somewhere."""
    out = train('--batch_size', 8, '--epochs', 8).out
    curve = curves(tmp_path)
    # a network that learns nothing, or only gray, is not better than the gray copy
    assert curve[GAIN][-1][1] > 1
    assert curve['validation loss'][-1][1] < 0.7 * curve['validation loss'][0][1]

    commands = re.findall(r'^    python (predict\.py) (.*)$', out, re.MULTILINE)
    assert len(commands) == 2
    for program, words in commands:
        run(program, *shlex.split(words.replace('YOUR_PHOTOS', str(drawings)), comments=True))
    assert len(list((tmp_path / 'compared').glob('*.jpg'))) == 4
    results = sorted((tmp_path / 'colorized').rglob('*.jpg'))
    assert len(results) == 56
    colorized = gray = 0
    for result in results:
        truth = Image.open(drawings / result.relative_to(tmp_path / 'colorized'))
        truth.convert('L').save(tmp_path / 'gray.png')
        colorized += squared_error(result, truth)
        gray += squared_error(tmp_path / 'gray.png', truth)
    assert colorized < 0.8 * gray  # about 1 dB


def test_a_demo_that_does_not_learn_says_so(train, drawings, tmp_path):
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data/demo').symlink_to(drawings)
    printed = train('--demo', '--data_path', 'data/demo', '--epochs', 1, '--lr', 1e-9, code=1)
    assert 'the demo should gain 3 dB' in printed.err
    assert (tmp_path / 'unet.pth').exists()


@pytest.mark.parametrize('way', [[], ['--stream']], ids=['in memory', 'streaming'])
def test_photos_that_cannot_be_read_are_named_and_counted(train, drawings, tmp_path, way):
    data = tmp_path / 'data'
    data.mkdir()
    for n, photo in enumerate(sorted(drawings.rglob('*.jpg'))[:30]):
        (data / f'{n}.jpg').symlink_to(photo)
    (data / 'words.jpg').write_text('not a photo')
    (data / 'empty.png').touch()
    printed = train('--data_path', data, '--epochs', 1, *way)
    assert printed.err.splitlines() == [
        "skipped 'empty.png': no photo that Pillow can read",
        "skipped 'words.jpg': no photo that Pillow can read",
    ]
    assert (tmp_path / 'runs/UNet/skipped.txt').read_text().splitlines() == [
        line.removeprefix('skipped ') for line in printed.err.splitlines()
    ]


def test_streaming_gives_the_same_weights(train, tmp_path, monkeypatch):
    train('--epochs', 2)
    in_memory = (tmp_path / WEIGHTS).read_bytes()
    for workers in 0, 2:
        train('--epochs', 2, '--stream', '--num_workers', workers, '--name', f'{workers}')
        assert (tmp_path / f'runs/{workers}/unet.pth').read_bytes() == in_memory
    # as a run does by itself where the photos do not fit
    monkeypatch.setattr(data_utils, 'free_memory', lambda device: 100_000)
    assert 'streaming the photos' in train('--epochs', 2, '--name', 'full').out
    assert (tmp_path / 'runs/full/unet.pth').read_bytes() == in_memory


def test_a_compiled_network_trains_and_saves_plain_weights(train, tmp_path, monkeypatch):
    """With Dynamo's graphs run as they are: a C++ compiler would take minutes over them."""
    graphs, compile_ = [], torch.nn.Module.compile

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch.nn.Module, 'compile', partialmethod(compile_, backend=backend))
    monkeypatch.setattr(device, 'check_compiler', lambda _: None)
    train('--epochs', 1)
    assert graphs == []
    train('--epochs', 1, '--compile', '--name', 'compiled')
    plain, compiled = load(tmp_path / WEIGHTS), load(tmp_path / 'runs/compiled/unet.pth')
    assert plain.keys() == compiled.keys() and graphs
    for name, value in plain.items():
        torch.testing.assert_close(compiled[name], value, atol=1e-3, rtol=1e-3)


def test_a_run_in_float16_goes_on_with_its_scaler(train, tmp_path):
    # few pixels, because many processors compute float16 in software: two steps an epoch
    half = '--precision', 'fp16', '--image_size', 8, '--batch_size', 24
    train(*half, '--epochs', 2, '--name', 'whole')
    with signal_after(3):
        train(*half, '--epochs', 2, code=128 + signal.SIGTERM)
    scaler = load(tmp_path / CHECKPOINT)['scaler']
    assert scaler['_growth_tracker'] == 3 and scaler['scale'] == 65536
    with signal_after(None) as made:
        train(*half, '--epochs', 2, '--resume')
    assert len(made) == 1
    assert load(tmp_path / CHECKPOINT)['scaler']['_growth_tracker'] == 4
    assert (tmp_path / WEIGHTS).read_bytes() == (tmp_path / 'runs/whole/unet.pth').read_bytes()


# ---------------------------------------------------------------------------- the weights


def test_best_weights_are_kept(train, tmp_path):
    plain = '--colorfulness_weight', 0  # the best then has the lowest validation loss
    train('--epochs', 2, *plain)
    best = min(value for _, value in curves(tmp_path)['validation loss'])
    assert load(tmp_path / CHECKPOINT)['progress']['best'] == pytest.approx(best)
    # a third epoch with a ruinous learning rate changes the checkpoint but not the weights
    weights = (tmp_path / WEIGHTS).read_bytes()
    train('--epochs', 3, '--lr', 0.3, '--resume', *plain)
    assert load(tmp_path / CHECKPOINT)['progress']['epoch'] == 3
    assert (tmp_path / WEIGHTS).read_bytes() == (tmp_path / 'unet.pth').read_bytes() == weights


def test_every_run_keeps_its_weights_and_unet_pth_is_the_latest_one_s(train, tmp_path):
    def weights():
        return [
            (tmp_path / name).read_bytes() for name in ('unet.pth', WEIGHTS, 'runs/UNet_2/unet.pth')
        ]

    train('--epochs', 1)
    assert 'logging in runs/UNet_2' in train('--epochs', 1, '--seed', 1).out
    latest, first, second = weights()
    assert latest == second != first
    train('--epochs', 2, '--resume', '--name', 'UNet')
    latest, first_goes_on, still = weights()
    assert latest == first_goes_on != first and still == second
    assert sorted(path.name for path in tmp_path.glob('*')) == ['runs', 'unet.pth']
    assert [step for step, _ in curves(tmp_path)['training loss']] == [1, 2]


def test_weights_from_elsewhere_are_renamed_and_kept(train, tmp_path):
    for number in 1, 2:
        (tmp_path / 'unet.pth').write_bytes(b'%d' % number)
        assert f'unet_{number}.pth' in train('--epochs', 1).out
        assert (tmp_path / f'unet_{number}.pth').read_bytes() == b'%d' % number
    assert (tmp_path / 'unet.pth').read_bytes() == (tmp_path / 'runs/UNet_2/unet.pth').read_bytes()


# ---------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    'flags, names',
    [
        (['--data_path', 'nowhere'], ['nowhere', './download_landscapes.sh', '--demo']),
        (['--data_path', 'file.jpg'], ['file.jpg', 'a file', '--data_path']),
        (['--data_path', 'empty'], ['empty', 'no photos']),
        (['--data_path', 'three', '--val_fraction', '0.01'], ['--val_fraction 0.01', '3 photos']),
        (['--data_path', 'three', '--val_fraction', '1'], ['--val_fraction', 'below 1']),
        (['--data_path', 'three', '--val_fraction', '0'], ['no training photo', 'Pillow']),
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
        (['--name', '.lock'], ['--name', '.lock']),
        (['--name=-x'], ['--name', '-x']),
        (['--name', ''], ['--name', "''"]),
        (['--device', 'tpu'], ['--device', 'tpu']),
        (['--epoch', '3'], ['--epoch']),
        pytest.param(
            ['--device', 'cuda'],
            ['--device cuda', 'nvidia-smi', '--device cpu'],
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU'),
        ),
    ],
)
def test_a_wrong_request_gets_one_line(tmp_path, capfd, flags, names):
    (tmp_path / 'file.jpg').touch()
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'three').mkdir()
    for n in range(3):
        (tmp_path / f'three/{n}.jpg').write_text('no photo')
    assert call(tmp_path, *flags, '--image_size', 8, *flags[:2]) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if 'skipped' not in line]
    assert len(lines) == 1 and lines[0].startswith('colorize.py: ')
    assert all(name in lines[0] for name in names), lines
    assert not list(tmp_path.rglob('*.pth'))
