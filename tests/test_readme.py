"""README.md and docs/ keep up with the programs: a test runs what they tell to type."""

import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from pages import PAGES, README, ROOT, arguments, blocks, commands, runners

import colorize
import predict
from unet import UNet
from utils.checkpoint import load_weights
from utils.device import available_cpus

# the commands that no test takes from a page, and why
ELSEWHERE = {
    'pip install -r requirements.txt && python colorize.py --demo': '.ci/run runs it',
    'pip install -r tests/requirements.txt && python -m pytest': '.ci/run runs it',
    'torchrun --nproc_per_node=gpu colorize.py': 'needs a GPU',
    'nvidia-smi': 'needs a GPU',
    'tmux attach -t colorize': 'needs someone at a terminal',
    'sudo shutdown -h now': 'is better not tried here',
}


def is_skipped(item):
    return item.get_closest_marker('skip') is not None or any(
        all(mark.args) for mark in item.iter_markers('skipif')
    )


def test_each_command_is_run_by_a_test(request):
    tests = runners()
    told = {command for command in commands() if not command.startswith('gcloud ')}
    assert told == {*tests, *ELSEWHERE}
    # being named in a test that is skipped, or not asked for, is not being run
    running = {
        (item.path.name, item.originalname)
        for item in request.session.items
        if not is_skipped(item)
    }
    if missed := [command for command in tests if not tests[command] & running]:
        pytest.skip(f'the tests that run these are skipped here: {"; ".join(missed)}')


def test_blocks_are_commands_or_say_what_they_are():
    for path, text in PAGES.items():
        assert text.count('\n```') == 2 * len(blocks(text)), path
        assert {language for language, _ in blocks(text)} <= {'bash', 'python', 'text'}, path


def test_each_call_of_colorize_is_understood():
    calls = list(arguments(r'(?:python|torchrun) .*?colorize\.py'))
    assert ['--demo'] in calls
    assert ['--name', 'spot', '--resume', '--data_path', '~/colorize/data/landscapes'] in calls
    for words in calls:
        colorize.parse_args(words)


def test_each_call_of_predict_is_understood():
    calls = list(arguments(r'python predict\.py'))
    assert ['old_photo.jpg'] in calls
    for words in calls:
        predict.parse_args(words)


def test_the_table_of_flags_has_the_defaults():
    table = re.findall(r'^\| `--(\w+)` \|(.*?)\|', README, re.MULTILINE)
    rows = {flag: default.strip(' `') for flag, default in table}
    defaults = vars(colorize.parse_args([]))
    assert rows.keys() == defaults.keys()
    assert rows.pop('num_workers') == 'up to 8'
    assert defaults.pop('num_workers') == min(8, available_cpus())
    for flag, default in rows.items():
        assert (type(defaults[flag])(default) if default else False) == defaults[flag], flag


def python_blocks():
    """Yield the Python code of all pages but the notebook's, which test_colab.py runs."""
    for path, text in PAGES.items():
        if path.name != 'colab.md':
            for number, (language, block) in enumerate(blocks(text)):
                if language == 'python':
                    yield pytest.param(block, id=f'{path.name}-{number}')


@pytest.mark.parametrize('code', list(python_blocks()))
def test_the_python_of_the_pages_runs(code, drawings, tmp_path):
    landscapes = tmp_path / 'data/landscapes'
    landscapes.mkdir(parents=True)
    for drawing in sorted(drawings.rglob('*.jpg'))[:2]:
        shutil.copy(drawing, landscapes)
    shutil.copy(drawing, tmp_path / 'old_photo.jpg')
    torch.save(UNet().state_dict(), tmp_path / 'unet.pth')
    done = subprocess.run(
        [sys.executable, '-c', code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    if 'my_unet.pth' in code:
        assert 0 < float(done.stdout.splitlines()[-1]) < 0.2
        load_weights(UNet(), tmp_path / 'my_unet.pth')


def test_each_file_is_there():
    for path, text in PAGES.items():
        text = re.sub(r'https?://[^\s)]+', '', text)
        names = set(re.findall(r'(?<![\w./~-])[\w./-]+\.(?:py|sh|txt|png|md|ipynb)\b', text))
        assert [
            name
            for name in sorted(names)
            if not (path.parent / name).exists() and not (ROOT / name).exists()
        ] == [], path


def test_links_lead_somewhere():
    anchors = {
        path: {
            re.sub(r'[^\w -]', '', heading).lower().replace(' ', '-')
            for heading in re.findall(r'^#+ (.*)$', text, re.MULTILINE)
        }
        for path, text in PAGES.items()
    }
    assert '](docs/gpu_vm.md)' in README
    for path, text in PAGES.items():
        for link in re.findall(r'\]\((?!https?://)(.*?)\)', text):
            name, _, anchor = link.partition('#')
            target = (path.parent / name).resolve() if name else path
            assert target.exists(), (path, link)
            assert not anchor or anchor in anchors[target], (path, link)


def test_the_readme_is_short():
    assert len(README.splitlines()) < 200


def test_the_plot_is_that_of_the_table(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / 'docs')
    import plot

    points = plot.read_points((ROOT / 'docs/measurements.md').read_text('utf-8'))
    assert [len(points[name]) for name in plot.CURVES] == [6, 3]
    assert (ROOT / 'docs/colorfulness.svg').read_text('utf-8') == plot.draw(points)
