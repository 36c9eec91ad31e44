"""The benchmarks run, on few drawings: each prints what it promises."""

import importlib
import re
import subprocess
import sys

import pytest
import torch
from helpers import ROOT

from unet import UNet


@pytest.fixture
def few(drawings, tmp_path):
    """A folder of four drawings."""
    folder = tmp_path / 'few'
    folder.mkdir()
    for number, path in enumerate(sorted(drawings.rglob('*.jpg'))[:4]):
        (folder / f'{number}.jpg').symlink_to(path)
    return folder


def run(*words):
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


SMALL = '--image_size', 8, '--batch_size', 4


def test_quality(few):
    out = run('benchmarks/quality.py', few, few, '--epochs', 1, '--device', 'cpu', *SMALL)
    rows = re.findall(r'^\| here \| (0|all) \| [+-]\d\.\d\d \| \+?\d+.* \|$', out, re.MULTILINE)
    assert rows == ['0', 'all']


@pytest.mark.parametrize(
    'program, part, says', [('speed', 'steps', ' photos/s, '), ('gpu', 'empty', 'the weights stay')]
)
def test_steps_and_a_step_without_a_photo(monkeypatch, capsys, program, part, says):
    monkeypatch.syspath_prepend(ROOT / 'benchmarks')
    monkeypatch.setattr('sys.argv', [program, part, *map(str, SMALL)])
    module = importlib.import_module(program)
    if program == 'speed':
        monkeypatch.setattr(module, 'keep_memory', lambda: None)  # it would outlast the test
    assert not module.main()
    assert says in capsys.readouterr().out


def test_the_plain_script_is_the_same_network(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / 'benchmarks')
    import reference

    torch.manual_seed(0)
    plain, net = reference.UNet(), UNet()
    shapes = [[tuple(p.shape) for p in model.parameters()] for model in (plain, net)]
    assert shapes[0] == shapes[1]


def test_a_gain_is_interpolated_at_90_percent(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / 'benchmarks')
    import quality

    assert quality.interpolate([(1.5, 80), (1.3, 88), (1.1, 96)]) == pytest.approx(1.25)
