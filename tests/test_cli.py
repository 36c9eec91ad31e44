"""Errors told in one line, and the types of numbers on a command line."""

import argparse
import errno

import pytest
import torch

from utils import cli

SMALLER = 'out of memory: try a smaller --batch_size than 32 or --image_size; nvidia-smi names'


@pytest.mark.parametrize(
    'error, code, line',
    [
        (cli.UsageError('no\nsuch folder'), 2, 'no such folder'),
        (OSError(errno.ENOSPC, 'No space left on device', 'a.pth'), 1, 'a.pth: No space left'),
        (OSError('image file is truncated'), 1, 'image file is truncated'),
        (FloatingPointError('the loss is nan'), 1, 'the loss is nan'),
        (MemoryError(), 1, SMALLER),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 1, SMALLER),
        (torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 9 GiB'), 1, SMALLER),
        (RuntimeError('MPS backend out of memory (MPS allocated: 17.91 GB'), 1, SMALLER),
        (RuntimeError('cuDNN error: CUDNN_STATUS_ALLOC_FAILED'), 1, SMALLER),
        (RuntimeError('CUDA error: no kernel image is available'), 1, f'torch {torch.__version__}'),
        (torch.distributed.DistError('lost'), 1, 'another process of this run has ended: lost'),
        (RuntimeError('CUDA error: an illegal memory access'), 0, ''),
        (ValueError('out of memory'), 0, ''),
    ],
)
def test_an_error_that_a_user_can_mend_is_one_line(error, code, line):
    found, text = cli.explain_error(error, 32)
    assert found == code and text.startswith(line) and '\n' not in text


def test_our_own_mistake_shows_its_traceback():
    with pytest.raises(KeyError):
        cli.exit_code(KeyError('step'), 'colorize.py')


@pytest.mark.parametrize(
    'kind, text, value, refused',
    [
        (cli.positive_int, '1', 1, ['0', '-1', '1.5', 'a', str(2**31)]),
        (cli.nonnegative_int, '0', 0, ['-1', '1e3', str(2**64)]),
        (cli.image_size, '64', 64, ['0', '60', '4104']),
        (cli.positive_float, '1e-3', 0.001, ['0', 'nan', 'inf']),
        (cli.factor, '0', 0.0, ['-0.1', '1001', 'nan']),
        (cli.fraction_below_1, '0.5', 0.5, ['1', '-0.1', 'nan']),
        (cli.port, '7860', 7860, ['0', '65536']),
        (cli.folder_name, 'UNet 2', 'UNet 2', ['', '.lock', '-x', 'a/b']),
    ],
)
def test_numbers_and_names(kind, text, value, refused):
    assert kind(text) == value
    for other in refused:
        with pytest.raises(argparse.ArgumentTypeError):
            kind(other)
