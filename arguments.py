"""Command line arguments that are refused in one line, naming the flag, the value and the rule."""
import argparse


class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f'{self.prog}: {message}\n')


def number(kind, allowed, wish):
    """An argparse type: a number for which `allowed` holds; `wish` says which those are."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not allowed(value):
            raise argparse.ArgumentTypeError(f'{text} is not {wish}')
        return value
    return parse


count = number(int, lambda n: n > 0, 'a whole number above 0')
natural = number(int, lambda n: n >= 0, 'a whole number, 0 or above')
multiple_of_8 = number(int, lambda n: n > 0 and n % 8 == 0, 'a multiple of 8')
