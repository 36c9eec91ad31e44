"""Command lines: types of numbers, and errors told in one line."""
import argparse
import math

import torch
import torch.distributed as dist


class UsageError(Exception):
    """A request that cannot be met. The message is one line that names the value and the remedy."""


class ArgumentParser(argparse.ArgumentParser):
    """Show the program's docstring as help, and refuse wrong arguments in one line."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
                         **kwargs)

    def error(self, message):
        self.exit(2, f'{self.prog}: {message}\n')


# ---------------------------------------------------------------------------- types of numbers

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


LARGEST = 2 ** 31  # larger numbers are typing errors, and overflow in torch
positive_int = number(int, lambda n: 0 < n < LARGEST, 'a whole number above 0')
nonnegative_int = number(int, lambda n: 0 <= n < LARGEST, 'a whole number, 0 or above')
multiple_of_8 = number(int, lambda n: 0 < n < LARGEST and n % 8 == 0, 'a multiple of 8')
positive_float = number(float, lambda x: 0 < x < math.inf, 'a number above 0')
nonnegative_float = number(float, lambda x: 0 <= x < math.inf, 'a number, 0 or above')
fraction = number(float, lambda x: 0 <= x < 1, 'at least 0 and below 1')


# ---------------------------------------------------------------------------- errors

def explain_error(error, batch_size, num_workers):
    """Return (exit code, one line) for an error that the user can mend, (0, '') for our own."""
    text = ' '.join(str(error).split())
    if isinstance(error, UsageError):
        return 2, text
    if isinstance(error, OSError) and error.strerror:
        return 1, f'{error.filename}: {error.strerror}' if error.filename else error.strerror
    if isinstance(error, OSError | FloatingPointError):
        return 1, text
    if is_out_of_memory(error):
        smaller = (f'--batch_size {batch_size // 2}' if batch_size > 1 else
                   'a smaller --image_size')
        return 1, f'out of memory with --batch_size {batch_size}: try {smaller}'
    if 'DataLoader worker' in text:
        return 1, f'{text}: out of memory? Try fewer than --num_workers {num_workers}'
    if isinstance(error, dist.DistError) or 'gloo' in text or 'Connection' in text:
        return 1, f'another process of this run has ended: {text}'
    return 0, ''


def is_out_of_memory(error):
    return (isinstance(error, MemoryError | torch.cuda.OutOfMemoryError)
            or "can't allocate memory" in str(error))
