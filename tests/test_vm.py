"""The tour of docs/gpu_vm.md, from the first login to the shutdown, on this machine.

The VM is a folder that an sshd of our own, on the loopback, makes the home of whoever logs in.
"""

import contextlib
import filecmp
import hashlib
import importlib.util
import json
import os
import pwd
import re
import shutil
import signal
import subprocess
import urllib.request
import zipfile
from pathlib import Path

import pytest
from browser import free_port, says, started, until
from pages import ROOT, copy_project, from_page, make_tools, write_script

SSHD = shutil.which('sshd', path=f'{os.environ["PATH"]}:/usr/local/sbin:/usr/sbin:/sbin')
SFTP = shutil.which(
    'sftp-server', path='/usr/lib/openssh:/usr/lib/ssh:/usr/libexec/openssh:/usr/libexec'
)
FOUND = dict(sshd=SSHD, sftp_server=SFTP, pip=importlib.util.find_spec('pip'))
FOUND |= {name: shutil.which(name) for name in 'ssh scp ssh-keygen rsync tmux bash curl'.split()}
FOUND['proc'] = Path('/proc/self/environ').exists()
MISSING = ', '.join(name for name, is_found in FOUND.items() if not is_found)

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(bool(MISSING), reason=f'not on this machine: {MISSING}'),
]

LOGIN = """export HOME={vm}
cd
if [ -n "$SSH_ORIGINAL_COMMAND" ]; then exec bash -lc "$SSH_ORIGINAL_COMMAND"; fi
exec bash -le"""
SSHD_CONFIG = """ListenAddress 127.0.0.1
Port {port}
HostKey {tmp}/host_key
AuthorizedKeysFile {tmp}/authorized_keys
ForceCommand {tmp}/login
Subsystem sftp {SFTP}
PidFile none
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


def processes_of(folder):
    """Yield the processes with the folder in their environment: those in the background, too."""
    for environ in Path('/proc').glob('[0-9]*/environ'):
        with contextlib.suppress(OSError):  # it has ended meanwhile, or is another user's
            if os.fsencode(folder) in environ.read_bytes():
                yield int(environ.parent.name)


@pytest.fixture
def sshd(tmp_path):
    """The port of an sshd that takes the key in `authorized_keys`, and logs into the folder vm."""
    keygen = ['ssh-keygen', '-q', '-t', 'ed25519', '-N', '', '-f', tmp_path / 'host_key']
    subprocess.run(keygen, check=True)
    port, config, log = free_port(), tmp_path / 'sshd_config', tmp_path / 'sshd.log'
    config.write_text(SSHD_CONFIG.format(port=port, tmp=tmp_path, SFTP=SFTP))
    write_script(tmp_path / 'login', LOGIN.format(vm=tmp_path / 'vm'))
    if os.geteuid() == 0:
        # empty; Debian makes it when its own sshd starts. It stays: another test may be using it
        Path('/run/sshd').mkdir(mode=0o755, exist_ok=True)
    with started([SSHD, '-D', '-e', '-f', config], log) as program:
        says(log, program, 'Server listening')
        yield port
        for process in processes_of(tmp_path):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


def make_mirror(drawings, site):
    """Put the drawings in place of the data set, with licenses; return its address and its id."""
    archive = site / 'landscapes_small.zip'
    (site / 'licenses').mkdir(parents=True)
    with zipfile.ZipFile(archive, 'w') as file:
        for folder in drawings.iterdir():  # of all kinds only the oceans may not be changed
            license, records = '6' if folder.name == 'ocean' else '4', {}
            for photo in folder.iterdir():
                file.write(photo, photo.relative_to(drawings))
                records[photo.name] = dict(clean_name=photo.name, license=license)
            path = site / f'licenses/{folder.name}_photos_info.json'
            path.write_text(json.dumps(records))
    data = archive.read_bytes()
    return archive.as_uri(), hashlib.sha1(b'blob %d\0' % len(data) + data).hexdigest()


@pytest.fixture
def vm(sshd, drawings, tmp_path):
    """The VM's home folder, where a login finds Python, as on a cloud's image."""
    home, (url, id) = tmp_path / 'vm', make_mirror(drawings, tmp_path / 'site')
    make_tools(tmp_path / 'bin')
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
            words = f'exec {shutil.which(tool)} -F {home}/ssh_config "$@"'
            write_script(home / f'bin/{tool}', words)
        path = f'{home}/bin:{home.parent}/bin:{os.environ["PATH"]}'
        self.env = os.environ | dict(HOME=str(home), PATH=path, TMPDIR=str(home))
        self.user = pwd.getpwuid(os.getuid()).pw_name

    def bash(self, command):
        return ['bash', '-c', command.replace('USER@VM_ADDRESS', f'{self.user}@vm')]

    def type(self, command, *lines):
        """Type a command, and lines that it then reads; return what it prints."""
        done = subprocess.run(
            self.bash(command),
            cwd=self.project,
            env=self.env,
            input=''.join(f'{line}\n' for line in lines),
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def type_there(self, *commands):
        return self.type(from_page('ssh USER@VM_ADDRESS'), 'set -e', *commands)

    def started(self, command, log, *there):
        """Type a login and commands on the VM, which stay until the end of the `with`."""
        lines = '\n'.join([f"{command} << 'END'", *there, 'END'])
        return started(self.bash(lines), log, cwd=self.project, env=self.env)


@pytest.fixture
def laptop(sshd, tmp_path):
    """A laptop with a key as the page makes it, which the cloud's console then gives to the VM."""
    laptop = Laptop(tmp_path / 'laptop', sshd)
    copy_project(laptop.project)
    shutil.copy(ROOT / '.gitignore', laptop.project)
    laptop.type(from_page('ssh-keygen -t ed25519 -f ~/.ssh/id_ed25519'), '', '')
    key = laptop.type(from_page('cat ~/.ssh/id_ed25519.pub'))
    (tmp_path / 'authorized_keys').write_text(key)
    return laptop


CD = from_page('cd colorize')


def bring_the_code(laptop, there):
    laptop.type(from_page('ssh USER@VM_ADDRESS mkdir -p colorize'))
    laptop.type(
        from_page(
            'scp -r *.py *.sh *.txt *.toml *.md utils tests benchmarks docs '
            'USER@VM_ADDRESS:colorize'
        )
    )
    assert filecmp.dircmp(laptop.project, there, ignore=[]).left_only == ['.gitignore']
    (laptop.project / 'changed.py').touch()
    laptop.type(
        from_page('rsync -avz --exclude .git --exclude-from .gitignore ./ USER@VM_ADDRESS:colorize')
    )
    assert (there / 'changed.py').exists()


def prepare(laptop):
    said = laptop.type_there(
        from_page('python -c "import torch; print(torch.__version__, torch.cuda.is_available())"'),
        CD,
        from_page('pip install -r requirements.txt'),
        from_page('./download_landscapes.sh'),
        'mv data/landscapes data/all',
        from_page('./download_landscapes.sh --remixable'),
    )
    assert 'Requirement already satisfied: torch>=' in said
    counts = re.findall(r'^(\d+) photos in data/landscapes: python colorize.py$', said, re.M)
    assert counts == ['56', '48']
    said = laptop.type_there(CD, from_page('python colorize.py --dry_run'))
    assert said.endswith('the dry run went through everything, and kept nothing\n')


def train(laptop, tmp_path):
    laptop.type_there(CD, from_page('nohup python colorize.py --resume > colorize.log 2>&1 &'))
    log = tmp_path / 'tail.log'
    with laptop.started('ssh USER@VM_ADDRESS', log, CD, from_page('tail -f colorize.log')) as tail:
        says(log, tail, 'tensorboard --logdir runs')  # what it names at its end


def watch(laptop, tmp_path):
    port, port_there = free_port(), free_port()
    show = from_page('tensorboard --logdir runs --port 8898').replace('8898', str(port_there))
    tunnel = from_page('ssh -L 8898:localhost:8898 USER@VM_ADDRESS').replace('8898', str(port), 1)
    tunnel = tunnel.replace('8898', str(port_there))

    def runs():
        with urllib.request.urlopen(f'http://localhost:{port}/data/runs', timeout=20) as answer:
            return json.load(answer)

    log = tmp_path / 'tensorboard.log'
    with laptop.started(tunnel, log, CD, show) as session:
        says(log, session, f' at http://localhost:{port_there}/ (Press CTRL+C to quit)')
        assert until(runs, ['UNet']) == ['UNet']


def take_home(laptop, there, photo):
    laptop.type(from_page('scp USER@VM_ADDRESS:colorize/unet.pth .'))
    laptop.type(from_page('rsync -avz USER@VM_ADDRESS:colorize/runs .'))
    for name in 'unet.pth', 'runs/UNet/checkpoint.pth':
        assert (laptop.project / name).read_bytes() == (there / name).read_bytes()
    shutil.copy(photo, laptop.project / 'old_photo.jpg')
    laptop.type(from_page('python predict.py old_photo.jpg'))
    assert (laptop.project / 'colorized/old_photo.jpg').exists()


def go_on_in_tmux(laptop):
    said = laptop.type_there(
        CD,
        from_page("tmux new -d -s colorize 'python colorize.py --resume; bash'"),
        'for _ in {1..200}; do sleep 0.5',
        "tmux capture-pane -J -p -t colorize | grep 'runs/UNet is' && break; done",
    )
    assert 'runs/UNet is finished at epoch 2; more --epochs make it go on' in said


def switch_off(laptop, there):
    end = from_page(
        "nohup sh -c 'python colorize.py --resume && sudo shutdown -h now' > colorize.log 2>&1 &"
    ).replace('sudo shutdown -h now', 'touch off')
    assert 'shutdown' not in end  # not for the world: this machine is the VM
    laptop.type_there(CD, end)
    assert until((there / 'off').exists, True, 120)
    assert 'runs/UNet is finished at epoch 2' in (there / 'colorize.log').read_text()


def test_from_the_first_login_to_the_shutdown(laptop, vm, drawings, tmp_path):
    there = vm / 'colorize'
    bring_the_code(laptop, there)
    prepare(laptop)
    train(laptop, tmp_path)
    watch(laptop, tmp_path)
    take_home(laptop, there, drawings / 'lake/lake_001.jpg')
    go_on_in_tmux(laptop)
    switch_off(laptop, there)
