"""Every part of the benchmarks on the smallest input: their numbers mean nothing here."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from torch import nn

from data_utils import list_photos
from unet import UNet
from utils.color import psnr

BENCHMARKS = ROOT / 'benchmarks'
sys.path.append(str(BENCHMARKS))  # where they find each other

import gpu  # noqa: E402
import reference  # noqa: E402
import speed  # noqa: E402
import upsampling  # noqa: E402


@pytest.fixture
def tiny(drawings):
    """The flags of a benchmark on eight drawings."""
    return ['--data_path', drawings / 'lake', '--image_size', 16, '--batch_size', 4]


@pytest.fixture
def call(monkeypatch, tmp_path, capsys):
    """call(script, flags...): the exit code, stdout and stderr of a script's main() in here."""

    def call(script, *flags):
        monkeypatch.setattr(sys, 'argv', [script.__file__, *map(str, flags)])
        try:
            code = script.main() or 0
        except SystemExit as end:
            code = end.code or 0
        return code, *capsys.readouterr()

    monkeypatch.chdir(tmp_path)
    # `speed.py decoding` takes a single core, for good
    monkeypatch.setattr(os, 'sched_setaffinity', lambda *_: None, raising=False)
    monkeypatch.setattr(torch, 'set_num_threads', lambda _: None)
    return call


# ---------------------------------------------------------------------------- speed.py


@pytest.mark.parametrize(
    'part, flags, rows',
    [
        (
            'training',
            [],
            [r'reference \| [\d.]+', r'this project \| [\d.]+', r'ratio of the medians \| [\d.]+×'],
        ),
        (
            'quality',
            ['--epochs', 1],
            [
                r'reference \| \d+ \| 1 epochs',
                r'this project \| \d+ \| \d+ epochs \| [\d.]+ dB',
                r'ratio \| (1/[\d.]+|not reached)',
            ],
        ),
        (
            'decoding',
            ['--limit', 2],
            [r'reference pipeline \| [\d.]+', r'this project \| [\d.]+', r'ratio \| [\d.]+×'] * 2,
        ),
        (
            'network',
            ['--batch_sizes', 2],
            [
                r'copy \| \d+ GB/s',
                r'matrix product \| [\d.]+ TFLOP/s',
                r'floor \| [\d.]+ photos/s',
                r'eager, batch 2 \| [\d.]+ photos/s \| \d+%',
            ],
        ),
        (
            'start',
            [],
            [
                r'imports \| [\d.]+',
                r'reading \| [\d.]+',
                r'first step \| [\d.]+',
                r'together \| [\d.]+',
                r'peak \| \d+ MB host, 0 MB device',
            ],
        ),
        (
            'processes',
            [],
            [
                r'one process \| [\d.]+',
                r'two processes \| [\d.]+',
                r'ratio of the medians \| [\d.]+×',
            ],
        ),
    ],
)
def test_each_part_of_speed(call, tiny, drawings, part, flags, rows):
    code, printed, _ = call(
        speed, part, *tiny, '--repeat', 1, '--val_path', drawings / 'lake', *flags
    )
    assert code == 0
    shown = [line for line in printed.splitlines() if line.startswith('| ')]
    assert shown.pop(0).strip('| ') == ''
    for row in rows:
        found = next((line for line in shown if re.match(rf'\| {row} ', line)), None)
        assert found, (row, shown)
        shown.remove(found)


@pytest.mark.skipif(torch.cuda.is_available(), reason='the sizes are those of a host')
def test_a_row_that_fails_does_not_take_the_others_with_it(call, monkeypatch):
    """More photos than an address space has room for."""

    def measure_steps(part, args, really=speed.measure, **more):
        return (
            really(part, args, **more)
            if part == 'network'
            else dict(copy=1, matrix=1, floor=1e4, precision='fp32')
        )

    monkeypatch.setattr(speed, 'measure', measure_steps)
    code, shown, _ = call(
        speed,
        'network',
        '--image_size',
        128,
        '--precision',
        'fp32',
        '--batch_sizes',
        2**31 - 1,
        2,
        '--upsample',
        'matmul',
    )
    assert code == 0
    large, small = shown.splitlines()[-2:]
    assert large == (
        '| eager, batch 2147483647 | out of memory with --batch_size 2147483647: '
        'try --batch_size 1073741823 or less |  |  |'
    )
    assert re.fullmatch(
        r'\| eager, batch 2 \| [\d.]+ photos/s \| \d+% \| \d+ MB host, 0 MB '
        r'device \|',
        small,
    )


def test_a_measurement_that_is_killed_is_a_row_too():
    with pytest.raises(speed.MeasurementFailed, match='-c failed: exit code -9'):
        speed.json_of('-c', 'import os; os.kill(os.getpid(), 9)')
    assert speed.json_of('-c', 'print("words"); print({})') == {}


@pytest.mark.parametrize(
    'flags, line',
    [
        (['training', '--data_path', 'nowhere'], 'no such folder: nowhere'),
        (['quality', '--data_path', '.'], 'no photos in .'),
        (['fly'], "argument part: invalid choice: 'fly'"),
        (['network', '--image_size', '30'], 'argument --image_size: 30 is not a multiple of 8'),
    ],
)
def test_a_wrong_request_to_speed(call, flags, line):
    code, _, errors = call(speed, *flags)
    assert code == 2 and len(errors.splitlines()) == 1 and errors.startswith(f'speed.py: {line}')


def test_quality_needs_photos_to_measure_on(call, tiny):
    code, _, errors = call(speed, 'quality', *tiny)
    assert (code, errors) == (
        2,
        'speed.py: quality needs --val_path, a folder of photos to measure the PSNR on\n',
    )


@pytest.mark.parametrize('script', [speed, gpu])
def test_without_arguments_a_benchmark_says_what_it_takes(call, script):
    code, shown, errors = call(script)
    assert (code, errors) == (0, '') and '--data_path' in shown
    assert f'python benchmarks/{script.__name__}.py ' in shown
    assert call(script, '--help') == (0, shown, '')


# ---------------------------------------------------------------------------- reference.py


def test_the_reference_reports_its_epochs(call, tiny, drawings):
    code, shown, errors = call(
        reference,
        *tiny,
        '--epochs',
        2,
        '--limit',
        5,
        '--num_workers',
        0,
        '--val_path',
        drawings / 'lake',
    )
    assert (code, errors) == (0, '')
    report = json.loads(shown.splitlines()[-1])
    assert report['photos'] == 5 and len(report['epochs']) == 2
    for epoch in report['epochs']:
        assert epoch['seconds'] > 0 and 0 < epoch['loss'] < 1
    assert 0 < report['val_psnr'] < 40


def test_the_reference_needs_photos(call):
    code, _, errors = call(reference)
    assert code == 2
    assert errors == ('reference.py: no photos in data/landscapes; name some with --data_path\n')


def test_the_reference_is_the_same_network_and_the_same_measure(drawings):
    theirs, ours = reference.UNet(), UNet()
    ours.load_state_dict(theirs.state_dict())
    photos = reference.GrayColorPhotos(drawings / 'lake', 16)
    assert len(photos) == 8
    x, y = torch.utils.data.default_collate([photos[index] for index in range(8)])
    assert x.shape == (8, 1, 16, 16) and y.shape == (8, 3, 16, 16)
    with torch.no_grad():
        assert torch.allclose(theirs(x), ours(x), atol=1e-6)
        errors = (ours(x).clamp(0, 1) - y).square().flatten(1).mean(1).tolist()
        expected = sum(map(psnr, errors)) / len(errors)
    loader = torch.utils.data.DataLoader(photos, 3)
    assert reference.mean_psnr(theirs, loader, 'cpu') == pytest.approx(expected, abs=1e-4)


# ---------------------------------------------------------------------------- upsampling.py


@pytest.mark.parametrize('size', [1, 2, 7])
def test_upsampling_by_matrix_products_is_the_same(size):
    torch.manual_seed(0)
    x = torch.rand(2, 5, size, size).contiguous(memory_format=torch.channels_last).requires_grad_()
    results = []
    for module in (nn.Upsample(scale_factor=2, mode='bilinear'), upsampling.MatmulUpsample(size)):
        y = module(x)
        (gradient,) = torch.autograd.grad(y, x, torch.linspace(-1, 1, y.numel()).view_as(y))
        results.append((y, gradient))
    for value, other in zip(*results, strict=True):
        assert torch.allclose(value, other, atol=1e-5)
    assert results[1][0].is_contiguous(memory_format=torch.channels_last)


def test_a_network_with_matrix_products_is_the_same():
    net, x = UNet(), torch.rand(2, 1, 16, 16)
    names = list(net.state_dict())
    with torch.no_grad():
        expected = net(x)
        assert torch.allclose(upsampling.use_matmul(net, 16)(x), expected, atol=1e-6)
    assert list(net.state_dict()) == names


# ---------------------------------------------------------------------------- gpu.py, gpu.sh


@pytest.mark.parametrize(
    'part, rows',
    [
        ('device', [r'\| torch \| ' + re.escape(torch.__version__)]),
        (
            'upsampling',
            [
                rf'\| torch\.{name} \| {channels} × {size}²'
                for name in ('float32', 'bfloat16', 'float16')
                for channels, size in ((256, 2), (128, 4), (64, 8))
            ],
        ),
        ('profile', ['a step takes', r'.*aten::']),
        (
            'empty',
            [rf'\| {name} \| loss 0, the weights as before' for name in ('fp32', 'bf16', 'fp16')],
        ),
    ],
)
def test_each_part_of_gpu(call, tiny, part, rows):
    code, shown, errors = call(gpu, part, *tiny)
    assert (code, errors) == (0, '')
    for row in rows:
        assert any(re.match(row, line) for line in shown.splitlines()), (row, shown)


def test_the_parts_of_an_epoch(run, tiny, drawings):
    shown = run('benchmarks/gpu.py', 'epoch', *tiny, '--data_path', drawings).stdout
    assert re.findall(r'^\| (\w+) \| [\d.]+ \|$', shown, re.MULTILINE) == [
        'train_epoch',
        'evaluate',
        'save_weights',
        'log_epoch',
        'save',
    ]


def test_photos_are_split_by_links(call, drawings, tmp_path):
    flags = 'split', '--data_path', drawings, '--output', tmp_path / 'data'
    assert call(gpu, *flags) == (0, '56 photos\n', '')
    training, held_out = (list_photos(tmp_path / 'data' / name) for name in ('train', 'val'))
    assert (len(training), len(held_out)) == (50, 6)
    assert sorted(training + held_out) == list_photos(drawings)


@pytest.fixture
def gpu_sh(tmp_path):
    """gpu_sh(flags...): benchmarks/gpu.sh with a `python` that only fails to profile."""
    python = tmp_path / 'bin/python'
    python.parent.mkdir()
    python.write_text("""#!/bin/sh
        [ "$2" != profile ] || { echo 'no luck' >&2; exit 3; }
        echo '| ran |'
    """)
    python.chmod(0o755)
    return lambda *words: subprocess.run(
        [BENCHMARKS / 'gpu.sh', *map(str, words)],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, 'PATH': f'{python.parent}:{os.environ["PATH"]}'},
    )


def test_a_part_that_fails_does_not_take_the_others_with_it(gpu_sh, drawings):
    done = gpu_sh(drawings, '--small')
    titles = re.findall('^## (.*)', done.stdout, re.MULTILINE)
    assert titles[0] == 'The tests that need a GPU' and titles[-1] == 'goes on in bfloat16'
    assert done.stdout.count('**failed with exit code 3') == done.stdout.count('no luck') == 3
    assert done.stdout.count('| ran |') == len(titles) - 3 + 2  # and device, split
    assert re.search(r'All of it took \d+ s; 3 parts failed\.$', done.stdout.rstrip())
    assert done.returncode == 1
    assert [line.removesuffix(' ...') for line in done.stderr.splitlines()] == titles


def test_the_command_says_what_it_takes(gpu_sh):
    for flags, code, error in (
        ([], 2, ''),
        (['--help'], 0, ''),
        (['nowhere'], 2, 'no such folder: nowhere\n'),
    ):
        done = gpu_sh(*flags)
        assert (done.returncode, done.stderr) == (code, error)
        assert 'benchmarks/gpu.sh PHOTOS > report.md' in done.stdout
