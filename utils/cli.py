"""Command lines: types of numbers, and errors told in one line."""

import argparse
import difflib
import math
import os
import sys

import torch
import torch.distributed as dist


class UsageError(Exception):
    """A request that cannot be met. The message is one line that names the value and the remedy."""


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Show the description as it is written, and defaults unless they are False or None."""

    def _get_help_string(self, action):
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """Show a program's docstring as its help, and refuse wrong arguments in one line."""

    def __init__(self, prog, description):
        super().__init__(prog, None, description, formatter_class=HelpFormatter, allow_abbrev=False)

    def error(self, message):
        word = message.removeprefix('unrecognized arguments: ').split(' ')[0]
        for flag in difflib.get_close_matches(word, self._option_string_actions, 1):
            message += f'; did you mean {flag}?'
        self.exit(2, f'{self.prog}: {message}\n')

    def add_flag(self, name, help):
        """Add a flag that is off unless it is given."""
        self.add_argument(name, action='store_true', help=help)

    def add_device(self):
        """Add --device, the same in every program."""
        choices = 'auto', 'cuda', 'mps', 'cpu'
        self.add_argument('--device', choices=choices, default='auto', help='where to compute')


def number(kind, is_allowed, rule):
    """Return an argparse type: `kind` of the text, refused with `rule` unless `is_allowed`."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not is_allowed(value):
            raise argparse.ArgumentTypeError(f'{text} is not {rule}')
        return value

    return parse


LARGEST = 2**31  # larger numbers are typing errors, and overflow in torch
positive_int = number(int, lambda n: 0 < n < LARGEST, 'a whole number above 0')
nonnegative_int = number(int, lambda n: 0 <= n < LARGEST, 'a whole number, 0 or above')
image_size = number(int, lambda n: 0 < n <= 4096 and n % 8 == 0, 'a multiple of 8, at most 4096')
positive_float = number(float, lambda x: 0 < x < math.inf, 'a number above 0')
factor = number(float, lambda x: 0 <= x <= 4, 'a number from 0 to 4')
fraction_below_1 = number(float, lambda x: 0 <= x < 1, 'at least 0 and below 1')
port = number(int, lambda n: 0 < n < 65536, 'a port, 1 to 65535')


def folder_name(text):
    """Return the text, an argparse type: the name of a folder that lies in another."""
    if not text or text[0] in '.-' or '/' in text or os.sep in text:
        raise argparse.ArgumentTypeError(f'{text!r} is not the name of a folder for a run')
    return text


def print_any_name():
    """Let standard output take the names of files, which need not be text."""
    if hasattr(sys.stdout, 'reconfigure'):  # not in a notebook
        sys.stdout.reconfigure(errors='backslashreplace')


def exit_code(error, program, batch_size=0):
    """Print an error that the user can mend in one line, and return the exit code.

    Any other is our own mistake: it is raised again, and shows its traceback.
    """
    code, line = explain_error(error, batch_size)
    if not code:
        raise error
    print(f'{program}: {line}', file=sys.stderr)
    return code


def explain_error(error, batch_size=0):
    """Return (exit code, one line) for an error that the user can mend, (0, '') for our own."""
    text = ' '.join(str(error).split())
    if isinstance(error, UsageError):
        return 2, text
    if 'env:// rendezvous' in text:  # a part of another launcher's environment
        return 2, f'{text}; start with torchrun, or unset RANK and WORLD_SIZE'
    if isinstance(error, OSError) and error.strerror:
        return 1, f'{error.filename}: {error.strerror}' if error.filename else error.strerror
    if isinstance(error, OSError | FloatingPointError):
        return 1, text
    # of the host; of CUDA and MPS; of two libraries of CUDA
    words = "can't allocate memory", 'out of memory', '_STATUS_ALLOC_FAILED'
    is_told = isinstance(error, RuntimeError) and any(word in text for word in words)
    if is_told or isinstance(error, MemoryError):
        smaller = f'--batch_size than {batch_size} or --image_size' if batch_size else '--size'
        return 1, f'out of memory: try a smaller {smaller}; nvidia-smi names other programs'
    if 'no kernel image is available' in text:
        where = 'https://pytorch.org/get-started/previous-versions'
        return 1, f'torch {torch.__version__} was not built for this GPU: see {where}'
    if isinstance(error, dist.DistError) or 'gloo' in text or 'Connection' in text:
        return 1, f'another process of this run has ended: {text}'
    return 0, ''
