"""The benchmarks run, on few drawings: each prints what it promises."""

import importlib
import io
import re
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import ROOT, call

SMALL = '--image_size', 8, '--batch_size', 16


@pytest.fixture
def benchmark(monkeypatch, capsys):
    """benchmark('speed', words...): what it prints, run in this process.

    So are the trainings that it starts: each process would spend seconds on its imports.
    """
    monkeypatch.syspath_prepend(ROOT / 'benchmarks')
    speed = importlib.import_module('speed')
    monkeypatch.setattr(speed, 'keep_memory', lambda: None)  # it would outlast the test
    monkeypatch.setattr(speed, 'MATRIX', 64)
    monkeypatch.setattr(speed, 'CALLS', 1)

    def train_here(words, cwd, **_):
        program = importlib.import_module(Path(words[1]).stem)
        workers = ('--num_workers', 0) if program.__name__ == 'reference' else ()
        with redirect_stdout(io.StringIO()) as printed:
            assert not call(cwd, *words[2:], *workers, program=program)
        return SimpleNamespace(stdout=printed.getvalue())

    def popen_here(*args, **kwargs):
        lines = train_here(*args, **kwargs).stdout.splitlines()
        return SimpleNamespace(stdout=lines, wait=lambda: 0)

    def benchmark(name, *words):
        monkeypatch.setattr('sys.argv', [name, *map(str, words)])
        with monkeypatch.context() as patch:
            patch.setattr('subprocess.run', train_here)
            patch.setattr('subprocess.Popen', popen_here)
            assert not importlib.import_module(name).main()
        return capsys.readouterr().out

    return benchmark


def test_quality_of_a_variant_of_two_checkouts(benchmark, drawings):
    flags = '--variants', '--lr 2e-3', '--against', ROOT, '--epochs', 1, '--device', 'cpu'
    out = benchmark('quality', drawings, next(drawings.iterdir()), '--seeds', 0, 1, *flags, *SMALL)
    gain = r'[+-]\d\.\d\d'
    row = rf'^\| (.+?) \| ([01]|together) \| {gain} \| \d+\.\d \| (?:{gain}|\+?nan) \| \d+ \|$'
    versions = 'here --lr 2e-3', 'earlier --lr 2e-3'
    expected = [(version, seed) for seed in ('0', '1', 'together') for version in versions]
    assert re.findall(row, out, re.MULTILINE) == expected


def test_the_gain_at_90_percent(benchmark, capsys):
    quality = importlib.import_module('quality')
    assert quality.interpolate([(1.5, 80), (1.3, 88), (1.1, 96)]) == pytest.approx(1.25)
    nowhere = quality.interpolate([(1.5, 95)])
    quality.print_row('here', 'all', [(1.5, 95.0, nowhere, 9.0), (1.7, 93.0, nowhere, 9.0)])
    row = '| here | all | +1.60 ± 0.14 | 94.0 ± 1.4 | +nan ± nan | 9 ± 0 |\n'
    assert capsys.readouterr().out == row


def test_training_beside_the_plain_script_and_a_checkout(benchmark, drawings):
    flags = '--data_path', drawings, '--repeat', 1, '--epochs', 1, *SMALL
    row = r'here [\d.]+, {} [\d.]+: [\d.]+ times as fast'
    assert re.search(row.format('the plain script'), benchmark('speed', 'training', *flags))
    out = benchmark('speed', 'training', '--against', ROOT, *flags)
    assert re.search(row.format(ROOT), out)


def test_the_parts_of_a_start(benchmark, drawings):
    out = benchmark('speed', 'start', '--data_path', drawings, *SMALL)
    seconds = [float(second) for second in re.findall(r'^ +([\d.]+) s  \w', out, re.MULTILINE)]
    assert len(seconds) == 3 and seconds == sorted(seconds)
