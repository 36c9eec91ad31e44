"""The tour of docs/gpu_vm.md, from the key to the shutdown, on this machine.

The VM is a folder that an sshd of our own makes the home of whoever logs in, on the loopback.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
import zipfile
from pathlib import Path

import pytest
import torch
from browser import free_port, says, started, until
from pages import ROOT, from_page
from PIL import Image, ImageChops

from unet import UNet

SBIN = os.pathsep.join([os.environ['PATH'], '/usr/local/sbin', '/usr/sbin', '/sbin'])
SSHD = shutil.which('sshd', path=SBIN)
SFTP = next(
    (
        path
        for path in (
            '/usr/lib/openssh/sftp-server',
            '/usr/lib/ssh/sftp-server',
            '/usr/libexec/openssh/sftp-server',
            '/usr/libexec/sftp-server',
        )
        if Path(path).exists()
    ),
    None,
)
MISSING = [
    name
    for name, there in dict(
        sshd=SSHD,
        sftp_server=SFTP,
        proc=Path('/proc/self/environ').exists(),
        pip=importlib.util.find_spec('pip'),
        **{
            name: shutil.which(name)
            for name in ('ssh', 'scp', 'ssh-keygen', 'rsync', 'tmux', 'bash')
        },
    ).items()
    if not there
]

pytestmark = pytest.mark.skipif(bool(MISSING), reason=f'not on this machine: {", ".join(MISSING)}')

LOGIN = """#!/bin/sh
export HOME={vm}
cd
if [ -n "$SSH_ORIGINAL_COMMAND" ]; then exec bash -lc "$SSH_ORIGINAL_COMMAND"; fi
exec bash -le
"""
SSHD_CONFIG = """ListenAddress 127.0.0.1
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
"""
SSH_CONFIG = """Host vm
HostName 127.0.0.1
Port {port}
IdentityFile {laptop}/.ssh/id_ed25519
IdentitiesOnly yes
IdentityAgent none
UserKnownHostsFile {laptop}/.ssh/known_hosts
GlobalKnownHostsFile /dev/null
StrictHostKeyChecking accept-new
"""
# as on a cloud's image, where the login finds Python; pip must not go out
PROFILE = """export PATH={tmp}/bin:$PATH TMPDIR={tmp} TMUX_TMPDIR={tmp} OMP_NUM_THREADS=1
export PIP_NO_INDEX=1 PIP_DISABLE_PIP_VERSION_CHECK=1 LANDSCAPES_URL={url} LANDSCAPES_BLOB_ID={id}
"""


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
            marks = [
                words,
                process.joinpath('environ').read_bytes(),
                os.fsencode(os.readlink(process / 'cwd')),
            ]
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
    """What ssh could have left elsewhere: {path: when it was changed}."""
    return {path: path.stat().st_mtime_ns for path in Path.home().glob('.ssh/*')}


@pytest.fixture
def sshd(tmp_path):
    """The port of an sshd that takes the key in `authorized_keys`, and logs into the folder vm."""
    before = outside()
    subprocess.run(
        ['ssh-keygen', '-q', '-t', 'ed25519', '-N', '', '-f', tmp_path / 'host_key'], check=True
    )
    port, config, log = free_port(), tmp_path / 'sshd_config', tmp_path / 'sshd.log'
    config.write_text(SSHD_CONFIG.format(port=port, tmp=tmp_path, SFTP=SFTP))
    script(tmp_path / 'login', LOGIN.format(vm=tmp_path / 'vm'))
    if os.geteuid() == 0:
        # empty; Debian makes it when its own sshd starts. It stays: another test may be using it
        Path('/run/sshd').mkdir(mode=0o755, exist_ok=True)
    with started([SSHD, '-D', '-e', '-f', config], log) as program:
        says(log, program, 'Server listening')
        yield port
        power_off(tmp_path)
    assert outside() == before


@pytest.fixture
def mirror(drawings, tmp_path):
    """The address of a server that has the drawings for the data set, with licenses, and its id."""
    archive = tmp_path / 'site/landscapes_small.zip'
    (tmp_path / 'site/licenses').mkdir(parents=True)
    with zipfile.ZipFile(archive, 'w') as file:
        for folder in drawings.iterdir():  # of all kinds only the oceans may not be changed
            license, records = '6' if folder.name == 'ocean' else '4', {}
            for photo in folder.iterdir():
                file.write(photo, photo.relative_to(drawings))
                records[photo.name] = dict(clean_name=photo.name, license=license)
            (tmp_path / f'site/licenses/{folder.name}_photos_info.json').write_text(
                json.dumps(records)
            )
    port, log = free_port(), tmp_path / 'server.log'
    words = [sys.executable, '-u', '-m', 'http.server', str(port), '--bind', '127.0.0.1']
    with started(words, log, cwd=tmp_path / 'site') as program:
        says(log, program, 'Serving HTTP')
        data = archive.read_bytes()
        blob_id = hashlib.sha1(b'blob %d\0' % len(data) + data).hexdigest()
        yield f'http://127.0.0.1:{port}/{archive.name}', blob_id


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
            script(
                home / f'bin/{tool}',
                f'#!/bin/sh\nexec {shutil.which(tool)} -F {home}/ssh_config "$@"\n',
            )
        path = f'{home}/bin:{home.parent}/bin:{os.environ["PATH"]}'
        self.env = os.environ | dict(HOME=str(home), PATH=path, TMPDIR=str(home))
        self.user = pwd.getpwuid(os.getuid()).pw_name

    def fill(self, command):
        return command.replace('USER@VM_ADDRESS', f'{self.user}@vm')

    def type(self, command, input=''):
        """What a command prints."""
        done = subprocess.run(
            ['bash', '-c', self.fill(command)],
            cwd=self.project,
            env=self.env,
            input=input,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def type_there(self, *commands):
        """What commands print that are typed on the VM, after logging in."""
        return self.type(from_page('ssh USER@VM_ADDRESS'), '\n'.join(['set -e', *commands, '']))

    def started(self, command, log, *there):
        """The same in the background."""
        lines = '\n'.join([f"{self.fill(command)} << 'END'", *there, 'END'])
        return started(['bash', '-c', lines], log, cwd=self.project, env=self.env)


@pytest.fixture
def laptop(sshd, drawings, tmp_path):
    laptop = Laptop(tmp_path / 'laptop', sshd)
    shutil.copytree(
        ROOT,
        laptop.project,
        ignore=shutil.ignore_patterns('.?*', '__pycache__', 'data', 'runs', '*.pth'),
    )
    shutil.copy(ROOT / '.gitignore', laptop.project)
    shutil.copytree(drawings, laptop.project / 'data/demo')
    for path in '.git/config', 'runs/demo/events':
        (laptop.project / path).parent.mkdir(parents=True)
        (laptop.project / path).touch()
    return laptop


@pytest.fixture
def login(laptop, tmp_path):
    """A key as the README makes it, which the cloud's console then gives to the VM."""
    laptop.type(from_page('ssh-keygen -t ed25519 -f ~/.ssh/id_ed25519'), '\n\n')
    key = laptop.type(from_page('cat ~/.ssh/id_ed25519.pub'))
    (tmp_path / 'authorized_keys').write_text(key)


def without_shutdown(command):
    """Not for the world: this machine is the VM."""
    command = command.replace('sudo shutdown -h now', 'touch off')
    assert 'shutdown' not in command
    return command


def was_finished(said):
    """Tell whether a run only said what it had reached, and did not train."""
    return 'unet.pth: epoch 2 of runs/UNet' in said and 'photos to train on' not in said


def in_color(path):
    red, _, blue = Image.open(path).split()
    return ImageChops.difference(red, blue).getextrema()[1] > 20


def image_tags(url):
    """Return {run: its tags of images} that the TensorBoard at `url` has read so far."""
    with urllib.request.urlopen(f'{url}/data/plugin/images/tags', timeout=20) as answer:
        return {run: set(tags) for run, tags in json.load(answer).items()}


def test_from_the_first_login_to_the_shutdown(laptop, vm, login, drawings, tmp_path):
    there, cd = vm / 'colorize', from_page('cd colorize')

    said = laptop.type(from_page('python colorize.py --demo --dry_run'))
    assert said.endswith('the dry run went through everything, and kept nothing\n')

    laptop.type(from_page('ssh USER@VM_ADDRESS mkdir -p colorize'))
    laptop.type(
        from_page(
            'scp -r *.py *.sh *.txt *.toml *.md utils tests benchmarks docs '
            'USER@VM_ADDRESS:colorize'
        )
    )
    assert {path.name for path in there.iterdir()} == {
        'utils',
        'tests',
        'benchmarks',
        'docs',
        *(
            path.name
            for kind in ('py', 'sh', 'txt', 'toml', 'md')
            for path in ROOT.glob(f'*.{kind}')
        ),
    }
    (laptop.project / 'unet.py').write_text((ROOT / 'unet.py').read_text() + '# changed\n')
    laptop.type(
        from_page('rsync -avz --exclude .git --exclude-from .gitignore ./ USER@VM_ADDRESS:colorize')
    )
    assert (there / 'unet.py').read_text().endswith('# changed\n')
    assert [name for name in ('.git', 'data', 'runs') if (there / name).exists()] == []

    said = laptop.type_there(
        from_page('python -c "import torch; print(torch.__version__, torch.cuda.is_available())"')
    )
    assert re.fullmatch(r'\d+\.\d+\S+ (True|False)\n', said)

    said = laptop.type_there(
        cd,
        from_page('pip install -r requirements.txt'),
        from_page('./download_landscapes.sh'),
        'mv data/landscapes data/all',
        from_page('./download_landscapes.sh --remixable'),
    )
    assert 'Requirement already satisfied: torch>=' in said
    assert said.endswith(
        '56 photos in data/landscapes: python colorize.py\n'
        '48 photos in data/landscapes: python colorize.py\n'
    )

    said = laptop.type_there(cd, from_page('python colorize.py --dry_run'))
    assert said.startswith('cpu')
    assert said.endswith('the dry run went through everything, and kept nothing\n')

    laptop.type_there(cd, from_page('nohup python colorize.py --resume > colorize.log 2>&1 &'))
    log = tmp_path / 'tail.log'
    with laptop.started('ssh USER@VM_ADDRESS', log, cd, from_page('tail -f colorize.log')) as tail:
        says(log, tail, 'tensorboard --logdir runs')  # what it names at its end

    port, port_there = free_port(), free_port()
    tunnel = from_page('ssh -L 8898:localhost:8898 USER@VM_ADDRESS')
    tunnel = tunnel.replace('8898:localhost:8898', f'{port}:localhost:{port_there}')
    show = from_page('tensorboard --logdir runs --port 8898').replace('8898', str(port_there))
    log = tmp_path / 'tensorboard.log'
    with laptop.started(tunnel, log, cd, show) as session:
        says(log, session, f' at http://localhost:{port_there}/ (Press CTRL+C to quit)')
        tags = {'UNet': {'Colorized', 'Input', 'Predicted', 'Ground truth'}}
        assert until(lambda: image_tags(f'http://localhost:{port}'), tags) == tags

    laptop.type(from_page('scp USER@VM_ADDRESS:colorize/unet.pth .'))
    laptop.type(from_page('rsync -avz USER@VM_ADDRESS:colorize/runs .'))
    for name in 'unet.pth', 'runs/UNet/unet.pth', 'runs/UNet/checkpoint.pth':
        assert (laptop.project / name).read_bytes() == (there / name).read_bytes()
    shutil.copy(drawings / 'lake/lake_001.jpg', laptop.project / 'old_photo.jpg')
    laptop.type(from_page('python predict.py old_photo.jpg'))
    assert in_color(laptop.project / 'colorized/old_photo.jpg')
    shutil.copytree(drawings / 'city', laptop.project / 'album')
    (laptop.project / 'runs/UNet').rename(laptop.project / 'runs/UNet_2')
    laptop.type(
        from_page(
            'python predict.py album/ --output album_colorized --weights runs/UNet_2/unet.pth'
        )
    )
    assert len(list(laptop.project.glob('album_colorized/*.jpg'))) == 8

    end = from_page(
        "nohup sh -c 'python colorize.py --resume && sudo shutdown -h now' > colorize.log 2>&1 &"
    )
    laptop.type_there(cd, without_shutdown(end))
    assert until((there / 'off').exists, True, 120)
    assert was_finished((there / 'colorize.log').read_text())


def test_tmux(laptop, vm, login, drawings):
    shutil.copytree(laptop.project, vm / 'colorize')
    shutil.copytree(drawings, vm / 'colorize/data/landscapes')
    cd = from_page('cd colorize')
    laptop.type_there(cd, from_page("tmux new -d -s colorize 'python colorize.py --resume; bash'"))

    def screen():
        return laptop.type_there('tmux capture-pane -J -p -t colorize')

    assert until(lambda: 'tensorboard --logdir runs' in screen(), True, 120), screen()
    said = laptop.type_there(
        cd, without_shutdown(from_page('python colorize.py --resume && sudo shutdown -h now'))
    )
    assert was_finished(said)
    assert (vm / 'colorize/off').exists()


def test_a_service_that_restarts_the_command_elsewhere(laptop, vm, login, drawings, tmp_path):
    """The disk stays; the home folder with code and photos is another machine's."""
    disk = tmp_path / 'disk'
    disk.mkdir()
    command = from_page(
        'cd DISK && python ~/colorize/colorize.py --name spot --resume '
        '--data_path ~/colorize/data/landscapes'
    ).replace('DISK', str(disk))
    said = []
    for epochs in 1, 2:
        shutil.copytree(laptop.project, vm / 'colorize')
        shutil.copytree(drawings, vm / 'colorize/data/landscapes')
        said.append(laptop.type_there(f'{command} --epochs {epochs}'))
        assert (disk / 'unet.pth').exists()
        shutil.rmtree(vm / 'colorize')
    assert [run.name for run in (disk / 'runs').iterdir() if run.is_dir()] == ['spot']
    epochs = [re.findall(r'^(?:epoch )? *(\d)/\d', text, re.MULTILINE) for text in said]
    assert epochs == [['1'], ['2']]  # each epoch once


needs_app = pytest.mark.skipif(
    not importlib.util.find_spec('gradio'), reason='gradio is not on this machine'
)


@needs_app
def test_the_page_that_colorizes_photos(laptop, vm, login, tmp_path):
    shutil.copytree(laptop.project, vm / 'colorize')
    torch.save(UNet().state_dict(), vm / 'colorize/unet.pth')
    port, port_there, log = free_port(), free_port(), tmp_path / 'app.log'
    tunnel = from_page('ssh -L 7860:localhost:7860 USER@VM_ADDRESS')
    tunnel = tunnel.replace('7860:localhost:7860', f'{port}:localhost:{port_there}')
    start = from_page('python app.py') + f' --port {port_there}'
    with laptop.started(
        tunnel,
        log,
        from_page('cd colorize'),
        from_page('pip install -r requirements-app.txt'),
        start,
    ) as session:
        says(log, session, f':{port_there}')
        with urllib.request.urlopen(f'http://localhost:{port}', timeout=20) as page:
            assert page.status == 200
