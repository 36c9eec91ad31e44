"""What README.md and the pages in docs/ tell to type, and which tests type it."""

import ast
import re
import shlex
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = {path: path.read_text('utf-8') for path in (ROOT / 'README.md', *ROOT.glob('docs/*.md'))}
README = PAGES[ROOT / 'README.md']
# flags that make a training take seconds
SMALL = '--epochs 2 --image_size 32 --batch_size 16 --val_fraction 0.25 --device cpu'


def blocks(text):
    """Return the blocks of a page, as (language, content)."""
    return re.findall(r'^```(\w*)\n(.*?)^```$', text, re.MULTILINE | re.DOTALL)


def commands():
    """Yield the commands in the blocks of all pages; one that is continued is one command."""
    for text in PAGES.values():
        for language, block in blocks(text):
            if language == 'bash':
                for line in re.sub(r' *\\\n *', ' ', block).splitlines():
                    if line := re.sub(r'(^| +)# .*', '', line):
                        yield line


def from_page(command):
    """Return a command that a page tells to type, with colorize.py made small by more flags.

    Flags that the page itself gives win.
    """
    assert command in commands()
    return command.replace('colorize.py', f'colorize.py {SMALL}')


def copy_project(folder):
    """Copy what belongs to this checkout, as it is, into a new folder."""
    rest = '.?*', '__pycache__', 'data', 'runs', 'colorized', 'compared', '*.pth'
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*rest))


def write_script(path, text):
    """Write a shell script that can be called by its name."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(f'#!/bin/sh\n{text}\n')
    path.chmod(0o755)


def make_tools(folder):
    """Make the commands that the pages call, of the Python that runs the tests."""
    for tool, call in dict(python='', pip='-m pip', tensorboard='-m tensorboard.main').items():
        write_script(folder / tool, f'exec {sys.executable} {call} "$@"')


def runners():
    """Return {command: tests that take it by from_page}, each test as (file name, function name).

    A call outside a test, in a fixture or a helper, counts for all tests of its file.
    """
    found = {}
    for path in ROOT.glob('tests/test_*.py'):
        functions = ast.parse(path.read_text('utf-8')).body
        tests = [f.name for f in functions if getattr(f, 'name', '').startswith('test_')]
        for function in functions:
            callers = [f for f in tests if f == getattr(function, 'name', '')] or tests
            for node in ast.walk(function):
                if isinstance(node, ast.Call) and getattr(node.func, 'id', '') == 'from_page':
                    tests_of = found.setdefault(ast.literal_eval(node.args[0]), set())
                    tests_of.update((path.name, caller) for caller in callers)
    return found


def arguments(program):
    """Yield the arguments of all calls of a program (a pattern), in blocks and in the text."""
    code = [*commands(), *re.findall(r'`([^`\n]+)`', '\n'.join(PAGES.values()))]
    for call in re.findall(rf"{program}((?: [^;&|>#'\n]+)?)", '\n'.join(code)):
        yield shlex.split(call)
