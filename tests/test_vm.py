"""The README's section "On a GPU VM", from the key to the shutdown, on this machine.

The VM is a folder that an sshd of our own makes the home of whoever logs in, on the loopback.
"""
import contextlib
import importlib.util
import json
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from browser import browser, free_port, images, needs_browser, says, started, until
from conftest import ROOT
from PIL import Image, ImageChops
from test_download import KINDS, blob_id, make_zip
from test_readme import readme

SBIN = os.pathsep.join([os.environ['PATH'], '/usr/local/sbin', '/usr/sbin', '/sbin'])
SSHD = shutil.which('sshd', path=SBIN)
SFTP = next((path for path in ('/usr/lib/openssh/sftp-server', '/usr/lib/ssh/sftp-server',
                               '/usr/libexec/openssh/sftp-server', '/usr/libexec/sftp-server')
             if Path(path).exists()), None)
MISSING = [name for name, there in dict(
    sshd=SSHD, sftp_server=SFTP, proc=Path('/proc/self/environ').exists(),
    pip=importlib.util.find_spec('pip'),
    **{name: shutil.which(name) for name in ('ssh', 'scp', 'ssh-keygen', 'rsync', 'tmux', 'bash')}
).items() if not there]

pytestmark = pytest.mark.skipif(bool(MISSING), reason=f'not on this machine: {", ".join(MISSING)}')

LOGIN = '''#!/bin/sh
export HOME={vm}
cd
if [ -n "$SSH_ORIGINAL_COMMAND" ]; then exec bash -lc "$SSH_ORIGINAL_COMMAND"; fi
exec bash -le
'''
SSHD_CONFIG = '''ListenAddress 127.0.0.1
Port {port}
HostKey {tmp}/host_key
AuthorizedKeysFile {tmp}/authorized_keys
ForceCommand {tmp}/login
Subsystem sftp {SFTP}
PidFile none
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
StrictModes no
UsePAM no
'''
SSH_CONFIG = '''Host vm
HostName 127.0.0.1
Port {port}
IdentityFile {laptop}/.ssh/id_ed25519
IdentitiesOnly yes
IdentityAgent none
UserKnownHostsFile {laptop}/.ssh/known_hosts
GlobalKnownHostsFile /dev/null
StrictHostKeyChecking accept-new
'''
# as on a cloud's image, where the login finds Python; pip must not go out
PROFILE = '''export PATH={tmp}/bin:$PATH TMPDIR={tmp} TMUX_TMPDIR={tmp} OMP_NUM_THREADS=1
export PIP_NO_INDEX=1 PIP_DISABLE_PIP_VERSION_CHECK=1 LANDSCAPES_URL={url} LANDSCAPES_BLOB_ID={id}
'''


def script(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def traces(folder):
    """{process: command line} of what was started for this folder or in it, with what it started.

    Of programs in the background only their environment still tells, of sshd's only the parent.
    """
    found, others = {}, []
    for process in Path('/proc').glob('[0-9]*'):
        with contextlib.suppress(OSError):  # it has ended meanwhile, or is another user's
            words, parent = process.joinpath('cmdline').read_bytes(), process.joinpath('stat')
            parent = int(parent.read_bytes().rpartition(b')')[2].split()[1])
            marks = [words, process.joinpath('environ').read_bytes(),
                     os.fsencode(os.readlink(process / 'cwd'))]
            if any(os.fsencode(folder) in mark for mark in marks):
                found[int(process.name)] = words
            else:
                others.append((int(process.name), parent, words))
    for process, parent, words in sorted(others):  # parents come first
        if parent in found:
            found[process] = words
    return found


def power_off(folder):
    """Kills what is left; nothing may be left then."""
    for process in traces(folder):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    assert until(lambda: traces(folder), {}, 20) == {}


def outside():
    """What ssh and sshd could have left elsewhere: {path: when it was changed}."""
    return {path: path.stat().st_mtime_ns for path in [*Path.home().glob('.ssh/*'),
                                                       *Path('/run').glob('sshd')]}


@pytest.fixture
def sshd(tmp_path):
    """The port of an sshd that takes the key in `authorized_keys`, and logs into the folder vm."""
    before = outside()
    subprocess.run(['ssh-keygen', '-q', '-t', 'ed25519', '-N', '', '-f', tmp_path / 'host_key'],
                   check=True)
    port, config, log = free_port(), tmp_path / 'sshd_config', tmp_path / 'sshd.log'
    config.write_text(SSHD_CONFIG.format(port=port, tmp=tmp_path, SFTP=SFTP))
    script(tmp_path / 'login', LOGIN.format(vm=tmp_path / 'vm'))
    empty = Path('/run/sshd')  # which Debian makes when its own sshd starts
    own = os.geteuid() == 0 and not empty.exists()
    if own:
        empty.mkdir(mode=0o755)
    try:
        with started([SSHD, '-D', '-e', '-f', config], log) as program:
            says(log, program, 'Server listening')
            yield port
            power_off(tmp_path)
    finally:
        if own:
            empty.rmdir()
    assert outside() == before


@pytest.fixture
def mirror(drawings, tmp_path):
    """The address of a server that has the drawings for the data set, with licences, and its id."""
    photos = {path.relative_to(drawings).as_posix(): path.read_bytes()
              for path in drawings.rglob('*.jpg')}
    archive = make_zip(photos)
    (tmp_path / 'site/licenses').mkdir(parents=True)
    (tmp_path / 'site/landscapes_small.zip').write_bytes(archive)
    for kind in KINDS:  # of all kinds the oceans only may not be changed
        records = {name.split('/')[1]: dict(clean_name=name.split('/')[1],
                                            license='6' if kind == 'ocean' else '4')
                   for name in photos if name.startswith(kind)}
        (tmp_path / f'site/licenses/{kind}_photos_info.json').write_text(json.dumps(records))
    port, log = free_port(), tmp_path / 'server.log'
    words = [sys.executable, '-u', '-m', 'http.server', str(port), '--bind', '127.0.0.1']
    with started(words, log, cwd=tmp_path / 'site') as program:
        says(log, program, 'Serving HTTP')
        yield f'http://127.0.0.1:{port}/landscapes_small.zip', blob_id(archive)


@pytest.fixture
def vm(sshd, mirror, tmp_path):
    """The VM's home folder, where a login finds Python, as on a cloud's image."""
    home, (url, id) = tmp_path / 'vm', mirror
    for tool, call in dict(python='', pip='-m pip', tensorboard='-m tensorboard.main').items():
        script(tmp_path / f'bin/{tool}', f'#!/bin/sh\nexec {sys.executable} {call} "$@"\n')
    home.mkdir()
    (home / '.bash_profile').write_text(PROFILE.format(tmp=tmp_path, url=url, id=id))
    return home


class Laptop:
    """A home folder with the project in it, and a shell there whose ssh knows one address: vm."""

    def __init__(self, home, port):
        self.project = home / 'project'
        (home / '.ssh').mkdir(parents=True, mode=0o700)
        (home / 'ssh_config').write_text(SSH_CONFIG.format(port=port, laptop=home))
        for tool in 'ssh', 'scp':
            script(home / f'bin/{tool}',
                   f'#!/bin/sh\nexec {shutil.which(tool)} -F {home}/ssh_config "$@"\n')
        path = f'{home}/bin:{home.parent}/bin:{os.environ["PATH"]}'
        self.env = os.environ | dict(HOME=str(home), PATH=path, TMPDIR=str(home))
        self.user = pwd.getpwuid(os.getuid()).pw_name

    def fill(self, command):
        return command.replace('USER@VM_ADDRESS', f'{self.user}@vm')

    def type(self, command, input=''):
        """What a command prints."""
        done = subprocess.run(['bash', '-c', self.fill(command)], cwd=self.project, env=self.env,
                              input=input, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def type_there(self, *commands):
        """What commands print that are typed on the VM, after logging in."""
        return self.type(readme('ssh USER@VM_ADDRESS'), '\n'.join(['set -e', *commands, '']))

    def started(self, command, log, *there):
        """The same in the background."""
        lines = '\n'.join([f"{self.fill(command)} << 'END'", *there, 'END'])
        return started(['bash', '-c', lines], log, cwd=self.project, env=self.env)


@pytest.fixture
def laptop(sshd, drawings, tmp_path):
    laptop = Laptop(tmp_path / 'laptop', sshd)
    shutil.copytree(ROOT, laptop.project, ignore=shutil.ignore_patterns(
        '.?*', '__pycache__', 'data', 'runs', '*.pth'))
    shutil.copy(ROOT / '.gitignore', laptop.project)
    shutil.copytree(drawings, laptop.project / 'data/demo')
    for path in '.git/config', 'runs/demo/events':
        (laptop.project / path).parent.mkdir(parents=True)
        (laptop.project / path).touch()
    return laptop


@pytest.fixture
def login(laptop, tmp_path):
    """A key as the README makes it, which the cloud's console then gives to the VM."""
    laptop.type(readme('ssh-keygen -t ed25519 -f ~/.ssh/id_ed25519'), '\n\n')
    key = laptop.type(readme('cat ~/.ssh/id_ed25519.pub'))
    (tmp_path / 'authorized_keys').write_text(key)


def without_shutdown(command):
    """Not for the world: this machine is the VM."""
    command = command.replace('sudo shutdown -h now', 'touch off')
    assert 'shutdown' not in command
    return command


def in_color(path):
    red, _, blue = Image.open(path).split()
    return ImageChops.difference(red, blue).getextrema()[1] > 20


@needs_browser
def test_from_the_first_login_to_the_shutdown(laptop, vm, login, drawings, tmp_path):
    there, cd = vm / 'colorize', readme('cd colorize')

    said = laptop.type(readme('python colorize.py --demo --dry_run'))
    assert said.endswith('the dry run went through everything, and kept nothing\n')

    laptop.type(readme('ssh USER@VM_ADDRESS mkdir -p colorize'))
    laptop.type(readme('scp -r *.py *.sh *.txt *.toml tests USER@VM_ADDRESS:colorize'))
    assert {path.name for path in there.iterdir()} == {
        'tests', *(path.name for kind in ('py', 'sh', 'txt', 'toml')
                   for path in ROOT.glob(f'*.{kind}'))}
    (laptop.project / 'unet.py').write_text((ROOT / 'unet.py').read_text() + '# changed\n')
    laptop.type(readme('rsync -avz --exclude .git --exclude-from .gitignore ./ '
                       'USER@VM_ADDRESS:colorize'))
    assert (there / 'unet.py').read_text().endswith('# changed\n')
    assert [name for name in ('.git', 'data', 'runs') if (there / name).exists()] == []

    said = laptop.type_there(
        readme('python -c "import torch; print(torch.__version__, torch.cuda.is_available())"'))
    assert re.fullmatch(r'\d+\.\d+\S+ (True|False)\n', said)

    said = laptop.type_there(cd, readme('pip install -r requirements.txt'),
                             readme('./download_landscapes.sh'),
                             'mv data/landscapes data/all',
                             readme('./download_landscapes.sh --remixable'))
    assert 'Requirement already satisfied: torch>=' in said
    assert said.endswith('56 photos in data/landscapes: python colorize.py\n'
                         '48 photos in data/landscapes: python colorize.py\n')

    said = laptop.type_there(cd, readme('python colorize.py --dry_run'))
    assert said.endswith('the dry run went through everything, and kept nothing\n')
    said = laptop.type_there(cd, readme('python colorize.py --epochs 1'))
    assert re.search(r'^epoch 1/1  training loss .* photos/s$', said, re.MULTILINE)

    laptop.type_there(cd, readme('nohup python colorize.py --resume > colorize.log 2>&1 &'))
    log = tmp_path / 'tail.log'
    with laptop.started('ssh USER@VM_ADDRESS', log, cd, readme('tail -f colorize.log')) as tail:
        says(log, tail, '\nepoch 2/2  training loss ')
        says(log, tail, 'the weights are in unet.pth')

    port, port_there = free_port(), free_port()
    tunnel = readme('ssh -L 8898:localhost:8898 USER@VM_ADDRESS')
    tunnel = tunnel.replace('8898:localhost:8898', f'{port}:localhost:{port_there}')
    show = readme('tensorboard --logdir runs --port 8898').replace('8898', str(port_there))
    log = tmp_path / 'tensorboard.log'
    with laptop.started(tunnel, log, cd, show) as session, browser() as page:
        says(log, session, f' at http://localhost:{port_there}/ (Press CTRL+C to quit)')
        # 10 to 12 photos of 32 pixels in a grid of four, with lines of two pixels
        assert images(page, f'http://localhost:{port}') == {
            'Input': ('UNet', 138, 104, False), 'Predicted': ('UNet', 138, 104, True),
            'Ground truth': ('UNet', 138, 104, True)}

    laptop.type(readme('scp USER@VM_ADDRESS:colorize/unet.pth .'))
    laptop.type(readme('rsync -avz USER@VM_ADDRESS:colorize/runs .'))
    for name in 'unet.pth', 'runs/UNet/checkpoint.pth':
        assert (laptop.project / name).read_bytes() == (there / name).read_bytes()
    shutil.copy(drawings / 'lake/lake_001.jpg', laptop.project / 'old_photo.jpg')
    laptop.type(readme('python predict.py old_photo.jpg'))
    assert in_color(laptop.project / 'colorized/old_photo.jpg')
    shutil.copytree(drawings / 'city', laptop.project / 'album')
    laptop.type(readme('python predict.py album/ --output album_colorized --weights unet.pth'))
    assert len(list(laptop.project.glob('album_colorized/*.jpg'))) == 8

    end = readme("nohup sh -c 'python colorize.py --resume && sudo shutdown -h now' "
                 '> colorize.log 2>&1 &')
    laptop.type_there(cd, without_shutdown(end))
    assert until((there / 'off').exists, True)
    assert 'this run is finished' in (there / 'colorize.log').read_text()


def test_tmux(laptop, vm, login, drawings):
    shutil.copytree(laptop.project, vm / 'colorize')
    shutil.copytree(drawings, vm / 'colorize/data/landscapes')
    cd = readme('cd colorize')
    laptop.type_there(cd, readme("tmux new -d -s colorize 'python colorize.py --resume; bash'"))

    def screen():
        return laptop.type_there('tmux capture-pane -J -p -t colorize')
    assert until(lambda: 'the weights are in unet.pth' in screen(), True, 60), screen()
    said = laptop.type_there(
        cd, without_shutdown(readme('python colorize.py --resume && sudo shutdown -h now')))
    assert 'this run is finished' in said
    assert (vm / 'colorize/off').exists()

