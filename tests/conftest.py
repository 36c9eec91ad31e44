"""Drawings for photos, and the programs run as a user runs them."""

import os
import subprocess
import sys

import pytest

# small networks only wait for each other's threads; also in the programs that the tests start
os.environ.setdefault('OMP_NUM_THREADS', '1')

from helpers import FLAGS, ROOT, call  # noqa: E402
from tensorboard.summary.writer import event_file_writer  # noqa: E402

from demo_landscapes import draw_landscapes  # noqa: E402


@pytest.fixture(scope='session')
def drawings(tmp_path_factory):
    """A folder of 56 drawings, eight of each of the seven kinds. Not to be written to."""
    folder = tmp_path_factory.mktemp('drawings') / 'demo'
    assert draw_landscapes(folder, per_kind=8) == 56
    return folder


@pytest.fixture
def run(tmp_path):
    """run('colorize.py', flags...) in a folder of the test's own: what it printed."""

    def run(script, *words, cwd=tmp_path, code=0, **kwargs):
        command = [sys.executable, ROOT / script, *map(str, words)]
        options = dict(capture_output=True, text=True, timeout=300) | kwargs
        done = subprocess.run(command, cwd=cwd, **options)
        assert done.returncode == code, done.stdout + done.stderr
        assert 'Traceback' not in done.stderr, done.stderr
        return done

    return run


@pytest.fixture
def train(drawings, tmp_path, monkeypatch, capfd):
    """train(flags..., code=0): a run of seconds in this process, in a folder of the test's own.

    Returns what it printed, as capfd has it.
    """
    # TensorBoard reads the files of one second in the order of their names: the 10th before the 9th
    monkeypatch.setattr(event_file_writer, '_global_uid', event_file_writer.AtomicCounter(0))

    def train(*flags, code=0):
        capfd.readouterr()
        ended = call(tmp_path, '--data_path', drawings, *FLAGS, *flags)
        printed = capfd.readouterr()
        assert ended == code and 'Traceback' not in printed.err, printed
        return printed

    return train
