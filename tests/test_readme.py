"""README.md and docs/ keep up with the programs: a test runs what they tell to type."""

import re
import shutil

import pytest
import torch
from helpers import call
from pages import PAGES, README, ROOT, arguments, blocks, commands, from_page, runners
from PIL import Image

import colorize
import predict
from unet import UNet
from utils.checkpoint import load_weights

# the commands that no test takes from a page, and why
ELSEWHERE = {
    'pip install -r requirements.txt && python colorize.py --demo': '.ci/run runs it',
    'pip install -r tests/requirements.txt && python -m pytest': '.ci/run runs it',
    'pip install -r requirements-app.txt': '.ci/run does, as a part of tests/requirements.txt',
    'pip install -r requirements-pretrained.txt': 'so it does',
    'python app.py': 'tests/test_app.py starts it, on a free port',
    'ssh -L 7860:localhost:7860 USER@VM_ADDRESS': 'tests/test_vm.py does, for port 8898',
    'cd DISK && python ~/colorize/colorize.py --name spot --resume '
    '--data_path ~/colorize/data/landscapes': 'tests/test_kill.py resumes, without a DISK',
    'nvidia-smi': 'needs a GPU',
    'tmux attach -t colorize': 'needs someone at a terminal',
    'sudo shutdown -h now': 'is better not tried here',
}


def is_skipped(item):
    return item.get_closest_marker('skip') is not None or any(
        all(mark.args) for mark in item.iter_markers('skipif')
    )


def test_each_command_is_run_by_a_test(request):
    for path, text in PAGES.items():  # commands are looked for in blocks that say bash
        assert {language for language, _ in blocks(text)} <= {'bash', 'python', 'text'}, path
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


def test_each_call_is_understood():
    for words in arguments(r'(?:python|torchrun) .*?colorize\.py'):
        colorize.parse_args(words)
    for words in arguments(r'python predict\.py'):
        predict.parse_args(words)


def test_the_table_of_flags_has_the_defaults():
    table = re.findall(r'^\| `--(\w+)` \|(.*?)\|', README, re.MULTILINE)
    rows = {flag: default.strip(' `') for flag, default in table}
    defaults = vars(colorize.parse_args([])) | dict(name='UNet')  # of --demo: demo
    assert rows.keys() == defaults.keys()
    for flag, default in rows.items():
        assert (type(defaults[flag])(default) if default else False) == defaults[flag], flag


def test_small_commands_run(drawings, tmp_path, capsys):
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data/demo').symlink_to(drawings)
    dry_run = from_page('python colorize.py --demo --dry_run')
    assert call(tmp_path, *dry_run.split()[2:]) == 0
    assert capsys.readouterr().out.endswith('went through everything, and kept nothing\n')

    shutil.copytree(drawings / 'city', tmp_path / 'album')
    (tmp_path / 'runs/UNet_2').mkdir(parents=True)
    torch.save(UNet().state_dict(), tmp_path / 'runs/UNet_2/unet.pth')
    album = from_page(
        'python predict.py album/ --output album_colorized --weights runs/UNet_2/unet.pth'
    )
    assert call(tmp_path, *album.split()[2:], '--size', 32, program=predict) == 0
    assert len(list(tmp_path.glob('album_colorized/*.jpg'))) == 8


def test_code_of_your_own_runs(drawings, tmp_path, monkeypatch, capsys):
    ((_, code),) = blocks(PAGES[ROOT / 'docs/own_code.md'])
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'data/landscapes').mkdir(parents=True)
    for drawing in sorted(drawings.rglob('*.jpg'))[:2]:
        with Image.open(drawing) as photo:
            photo.save(tmp_path / 'data/landscapes' / drawing.name)
    exec(code.replace('epochs=5', 'epochs=1'), {})
    assert 0 < float(capsys.readouterr().out.splitlines()[-1]) < 0.2
    load_weights(UNet(), 'my_unet.pth')


def test_files_and_links_are_there():
    assert '](docs/gpu_vm.md)' in README
    for path, text in PAGES.items():
        local = re.sub(r'https?://[^\s)]+', '', text)
        names = set(re.findall(r'(?<![\w./~-])[\w./-]+\.(?:py|sh|txt|png|md|ipynb)\b', local))
        homes = path.parent, ROOT, ROOT / 'utils'
        assert {n for n in names if not any((home / n).exists() for home in homes)} == set(), path
        for link in re.findall(r'\]\((?!https?://)(.*?)\)', text):
            name, _, anchor = link.partition('#')
            target = (path.parent / name).resolve() if name else path
            assert target.exists(), (path, link)
            headings = re.findall(r'^#+ (.*)$', PAGES.get(target, ''), re.MULTILINE)
            anchors = {re.sub(r'[^\w -]', '', h).lower().replace(' ', '-') for h in headings}
            assert not anchor or anchor in anchors, (path, link)
