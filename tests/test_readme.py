"""README.md keeps up with the programs: what it tells to type is run by a test, from its text."""
import ast
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from checkpoint import load_weights
from conftest import ROOT

import colorize
import predict
from unet import UNet

TEXT = (ROOT / 'README.md').read_text('utf-8')
BLOCKS = re.findall(r'^```(.*)\n([^`]*?)^```$', TEXT, re.MULTILINE)

SMALL = ('--epochs 2 --image_size 32 --batch_size 16 --val_fraction 0.25 --device cpu '
         '--num_workers 2')
# the commands that no test takes from the README, and why
ELSEWHERE = {
    'pip install -r requirements.txt && python colorize.py --demo': '.ci/run runs it',
    'pip install -r tests/requirements.txt && python -m pytest': '.ci/run runs it',
    'torchrun --nproc_per_node=gpu colorize.py': 'needs a GPU',
    'nvidia-smi': 'needs a GPU',
    'tmux attach -t colorize': 'needs someone at a terminal',
    'sudo shutdown -h now': 'is better not tried here',
}


def commands():
    """The commands in the README's blocks, in order."""
    for language, block in BLOCKS:
        if language == 'bash':
            for line in re.sub(r' *\\\n *', ' ', block).splitlines():
                if line := re.sub(r'(^| +)# .*', '', line):
                    yield line


def readme(command):
    """A command of the README, with colorize.py made small: flags that stand there win."""
    assert command in commands()
    return command.replace('colorize.py', f'colorize.py {SMALL}')


def taken():
    """The commands that tests take from the README: what they call `readme` with."""
    for path in ROOT.glob('tests/test_*.py'):
        for node in ast.walk(ast.parse(path.read_text('utf-8'))):
            if isinstance(node, ast.Call) and getattr(node.func, 'id', '') == 'readme':
                yield ast.literal_eval(node.args[0])


def words_after(program):
    """The arguments of every call of a program that the README shows, in blocks and in text."""
    code = [*commands(), *re.findall(r'`([^`\n]+)`', TEXT)]
    for call in re.findall(rf"{program}((?: [^;&|>#'\n]+)?)", '\n'.join(code)):
        yield shlex.split(call)


def test_blocks_are_commands_or_say_what_they_are():
    assert TEXT.count('\n```') == 2 * len(BLOCKS)
    assert {language for language, _ in BLOCKS} <= {'bash', 'python', 'text'}


def test_each_command_is_run_by_a_test():
    here = {command for command in commands() if not command.startswith('gcloud ')}
    assert here == {*taken(), *ELSEWHERE}


def test_each_call_of_colorize_is_understood():
    calls = list(words_after(r'(?:python|torchrun) .*?colorize\.py'))
    assert ['--demo'] in calls
    for words in calls:
        colorize.parse_args(words)


def test_each_call_of_predict_is_understood():
    calls = list(words_after(r'python predict\.py'))
    assert ['old_photo.jpg'] in calls
    for words in calls:
        predict.parse_args(words)


@pytest.mark.parametrize('code', [block for language, block in BLOCKS if language == 'python'])
def test_the_python_of_the_page_runs(code, drawings, tmp_path):
    landscapes = tmp_path / 'data/landscapes'
    landscapes.mkdir(parents=True)
    for drawing in sorted(drawings.rglob('*.jpg'))[:2]:
        shutil.copy(drawing, landscapes)
    shutil.copy(drawing, tmp_path / 'old_photo.jpg')
    torch.save(UNet().state_dict(), tmp_path / 'unet.pth')
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True,
                          text=True, timeout=200, env={**os.environ, 'PYTHONPATH': str(ROOT)})
    assert (done.returncode, done.stderr) == (0, '')
    if 'my_unet.pth' in code:
        assert 0 < float(done.stdout) < 0.2
        load_weights(tmp_path / 'my_unet.pth')


def test_the_table_of_flags(capsys):
    with pytest.raises(SystemExit):
        colorize.parse_args(['--help'])
    flags = set(re.findall(r'^  (--\w+)', capsys.readouterr().out, re.MULTILINE))
    assert set(re.findall(r'^\| `(--\w+)`', TEXT, re.MULTILINE)) == flags


def test_each_file_is_there():
    names = set(re.findall(r'(?<![\w./])[\w./]+\.(?:py|sh|txt|png)\b', TEXT))
    assert 'docs/tensorboard_graph.png' in names
    assert [name for name in sorted(names) if not (ROOT / name).exists()] == []


def test_links_within_the_page():
    headings = re.findall(r'^#+ (.*)$', TEXT, re.MULTILINE)
    anchors = {re.sub(r'[^\w -]', '', heading).lower().replace(' ', '-') for heading in headings}
    assert set(re.findall(r'\]\(#(.*?)\)', TEXT)) <= anchors
