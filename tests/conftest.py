"""Drawings for photos, and the programs run as a user runs them."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

# small networks only wait for each other's threads; also in the programs that the tests start
os.environ.setdefault('OMP_NUM_THREADS', '1')

import demo_landscapes  # noqa: E402

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope='session')
def drawings(tmp_path_factory):
    """A folder of 56 drawings, eight of each of the seven kinds. Not to be written to."""
    folder = tmp_path_factory.mktemp('drawings') / 'demo'
    assert demo_landscapes.draw_landscapes(folder, per_kind=8) == 56
    return folder


@pytest.fixture
def run(tmp_path):
    """run('colorize.py', flags...) in a folder of the test's own: what it printed."""
    def run(script, *words, cwd=tmp_path, code=0, **kwargs):
        done = subprocess.run([sys.executable, ROOT / script, *map(str, words)], cwd=cwd,
                              capture_output=True, text=True, timeout=300, **kwargs)
        assert done.returncode == code, done.stdout + done.stderr
        assert 'Traceback' not in done.stderr, done.stderr
        return done
    return run


@pytest.fixture
def small(drawings):
    """The flags of a training that takes seconds."""
    return ['--data_path', drawings, '--image_size', 32, '--batch_size', 16, '--epochs', 2,
            '--val_fraction', 0.25, '--device', 'cpu', '--num_workers', min(2, os.cpu_count())]
