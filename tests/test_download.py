"""download_landscapes.sh, against a server of our own on the loopback."""

import contextlib
import hashlib
import http.server
import io
import json
import os
import random
import shutil
import signal
import stat
import subprocess
import threading
import time
import zipfile
from pathlib import Path

import pytest
from damage import damaged
from PIL import Image

SCRIPT = Path(__file__).parents[1] / 'download_landscapes.sh'
KINDS = ['city', 'field', 'forest', 'lake', 'mountain', 'ocean', 'road']
ARCHIVE = '/landscapes/landscapes_small.zip'

needs_curl = pytest.mark.skipif(not shutil.which('curl'), reason='curl is not on this machine')
needs_wget = pytest.mark.skipif(not shutil.which('wget'), reason='wget is not on this machine')


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        server = self.server
        if self.path == '/hold':
            server.held.set()
            server.release.wait(60)
            return self.send_error(204)
        asked = self.headers.get('Range')
        server.requests.append((self.path, asked))
        if self.path not in server.files:
            return self.send_error(404)
        body = server.files[self.path]
        start = 0
        if asked and server.ranges:
            start = int(asked.removeprefix('bytes=').removesuffix('-'))
            if start >= len(body):
                return self.send_error(416)
            self.send_response(206)
            self.send_header('Content-Range', f'bytes {start}-{len(body) - 1}/{len(body)}')
        else:
            self.send_response(200)
        self.send_header('Content-Length', str(len(body) - start))
        self.end_headers()
        if server.cut:
            server.cut = False
            half = (start + len(body)) // 2
            self.wfile.write(body[start:half])
            if server.stall:  # the second half waits for the next request
                server.stalled.set()
                server.stall.wait(60)
                self.wfile.write(body[half:])
        else:
            if server.stall:
                server.stall.set()
                time.sleep(0.5)  # for the other connection's bytes to be written first
            self.wfile.write(body[start:])


@pytest.fixture
def server(any_server):
    """The server of the archive, for calls that download."""
    if not shutil.which('curl') and not shutil.which('wget'):
        pytest.skip('neither curl nor wget is on this machine')
    return any_server


@pytest.fixture
def any_server():
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as server:
        server.files, server.requests = {}, []
        server.ranges, server.cut, server.stall = True, False, None
        server.held, server.release = threading.Event(), threading.Event()
        server.url = f'http://127.0.0.1:{server.server_port}{ARCHIVE}'
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def project(tmp_path):
    folder = tmp_path / 'project'
    folder.mkdir()
    shutil.copy(SCRIPT, folder)
    return folder


def jpeg(color):
    file = io.BytesIO()
    Image.new('RGB', (8, 8), color).save(file, 'JPEG')
    return file.getvalue()


PHOTOS = {'city/1.jpg': jpeg('red'), 'city/2.JPG': jpeg('gray'), 'lake/1.jpeg': jpeg('blue')}


def make_zip(members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w') as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return file.getvalue()


GOOD = make_zip(PHOTOS)


def blob_id(data):
    return hashlib.sha1(b'blob %d\0' % len(data) + data).hexdigest()


def environment(server, path=None, expect=None):
    env = {k: v for k, v in os.environ.items() if not k.lower().endswith('_proxy')}
    env['LANDSCAPES_URL'] = server.url
    env['LANDSCAPES_BLOB_ID'] = expect or blob_id(server.files.get(ARCHIVE, b''))
    return env | ({'PATH': str(path)} if path else {})


def call(project, server, *flags, cwd=None, **kwargs):
    done = subprocess.run(
        [project / 'download_landscapes.sh', *flags],
        cwd=cwd or project,
        env=environment(server, **kwargs),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout, done.stderr


def tree(project):
    """Every file of the project, hidden ones too, but for the script."""
    files = {p.relative_to(project).as_posix() for p in project.rglob('*') if not p.is_dir()}
    return files - {'download_landscapes.sh', LOCK, 'data/landscapes/.landscapes.lock'}


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def taken(photos):
    return {f'data/landscapes/{name}' for name in photos}


def said(text):
    return f'download_landscapes.sh: {text}\n'


def tools_without(folder, *hidden):
    """A folder for PATH with every tool of this machine but the hidden ones."""
    folder.mkdir()
    for place in os.get_exec_path():
        for tool in Path(place).iterdir() if Path(place).is_dir() else ():
            if tool.name not in hidden and not (folder / tool.name).is_symlink():
                (folder / tool.name).symlink_to(tool)
    return folder


GOOD_END = '3 photos in data/landscapes: python colorize.py\n'
HERE_ALREADY = '3 photos already in data/landscapes: python colorize.py\n'
PART = 'data/landscapes_small.zip.part'
LOCK = 'data/.landscapes.lock'


def leave_part(project, data):
    (project / 'data').mkdir()
    (project / PART).write_bytes(data)


@pytest.mark.parametrize('top', ['', 'landscapes_small/', 'data/landscapes/'])
def test_photos_end_up_below_their_kind(project, server, top):
    server.files[ARCHIVE] = make_zip(
        {
            **{top + name: data for name, data in PHOTOS.items()},
            f'{top}.DS_Store': b'x',
            f'{top}city/._1.jpg': b'x',
            f'{top}.hidden/1.jpg': b'x',
            f'__MACOSX/{top}city/._1.jpg': b'x',
            f'__MACOSX/{top}city/1.jpg': b'x',
        }
    )
    assert call(project, server) == (0, GOOD_END, '')
    assert tree(project) == taken(PHOTOS)
    assert names(project / 'data') == ['.landscapes.lock', 'landscapes']
    for name, data in PHOTOS.items():
        assert (project / 'data/landscapes' / name).read_bytes() == data
    assert server.requests == [(ARCHIVE, None)]


def test_a_single_kind_keeps_its_folder(project, server):
    server.files[ARCHIVE] = make_zip({'city/1.jpg': jpeg('red'), 'city/2.jpg': jpeg('red')})
    code, out, err = call(project, server)
    assert (code, out, err) == (0, '2 photos in data/landscapes: python colorize.py\n', '')
    assert tree(project) == taken(['city/1.jpg', 'city/2.jpg'])


def test_thousands_of_photos(project, server):
    server.files[ARCHIVE] = make_zip({f'city/{i}.jpg': b'x' for i in range(1234)})
    code, out, err = call(project, server)
    assert (code, out, err) == (0, '1,234 photos in data/landscapes: python colorize.py\n', '')


def test_from_another_folder(project, server, tmp_path):
    server.files[ARCHIVE] = GOOD
    elsewhere = tmp_path / 'elsewhere'
    elsewhere.mkdir()
    assert call(project, server, cwd=elsewhere) == (0, GOOD_END, '')
    assert tree(project) == taken(PHOTOS)
    assert list(elsewhere.iterdir()) == []


def test_second_call_leaves_the_server_alone(project, server):
    server.files[ARCHIVE] = GOOD
    call(project, server)
    assert call(project, server) == (0, HERE_ALREADY, '')
    assert len(server.requests) == 1


@needs_curl
def test_goes_on_where_the_connection_was_cut(project, server):
    server.files[ARCHIVE] = GOOD
    server.cut = True
    code, out, err = call(project, server)
    assert (code, out) == (1, '')
    assert err.startswith(said(f'cannot fetch {server.url} (curl: (18) ')[:-1])
    assert err.endswith('): call again to go on\n') and err.count('\n') == 1
    assert tree(project) == {PART}
    assert (project / PART).read_bytes() == GOOD[: len(GOOD) // 2]
    assert call(project, server) == (0, GOOD_END, '')
    assert server.requests == [(ARCHIVE, None), (ARCHIVE, f'bytes={len(GOOD) // 2}-')]
    assert tree(project) == taken(PHOTOS)


@needs_curl
def test_killed_while_its_curl_lives_on(project, server):
    server.files[ARCHIVE] = GOOD
    leave_part(project, GOOD[:100])
    server.cut, server.stall, server.stalled = True, threading.Event(), threading.Event()
    running = subprocess.Popen(
        [project / 'download_landscapes.sh'],
        env=environment(server),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    assert server.stalled.wait(60)
    running.kill()
    running.wait()
    assert call(project, server) == (0, GOOD_END, '')
    assert len(server.requests) == 2
    assert tree(project) == taken(PHOTOS)
    assert names(project / 'data') == ['.landscapes.lock', 'landscapes']


@pytest.mark.parametrize(
    'tool', [pytest.param('curl', marks=needs_curl), pytest.param('wget', marks=needs_wget)]
)
@pytest.mark.parametrize('ranges', [True, False])
@pytest.mark.parametrize('size', [100, len(GOOD), len(GOOD) + 100])
def test_no_part_is_in_the_way_for_ever(project, server, tmp_path, size, ranges, tool):
    server.files[ARCHIVE] = GOOD
    server.ranges = ranges
    path = tools_without(tmp_path / 'bin', {'curl': 'wget', 'wget': 'curl'}[tool])
    leave_part(project, bytes(size))  # the good part of another archive, say
    first = call(project, server, path=path)
    refused = said(
        f'{server.url} is corrupted, its git blob id is not {blob_id(GOOD)}; removed: call again'
    )
    assert first in [(0, GOOD_END, ''), (1, '', refused)]
    if first[0]:
        assert tree(project) == set()
        assert call(project, server, path=path) == (0, GOOD_END, '')
    assert tree(project) == taken(PHOTOS)


@needs_curl
def test_server_without_ranges_sends_all_of_it_again(project, server):
    server.files[ARCHIVE] = GOOD
    server.ranges = False
    leave_part(project, GOOD[:100])
    assert call(project, server) == (0, GOOD_END, '')
    assert server.requests == [(ARCHIVE, 'bytes=100-'), (ARCHIVE, None)]
    assert tree(project) == taken(PHOTOS)


def test_part_that_is_all_there_is_not_fetched_again(project, server):
    server.files[ARCHIVE] = GOOD
    leave_part(project, GOOD)
    assert call(project, server) == (0, GOOD_END, '')
    assert server.requests == []


def test_cleans_up_after_killed_calls(project, server):
    server.files[ARCHIVE] = GOOD
    (project / 'data/.landscapes.tmp.aBcDeF/landscapes').mkdir(parents=True)
    (project / 'data/.landscapes.tmp.aBcDeF/landscapes/1.jpg').write_bytes(b'half')
    assert call(project, server) == (0, GOOD_END, '')
    assert names(project / 'data') == ['.landscapes.lock', 'landscapes']
    (project / PART).write_bytes(GOOD)  # killed between the last two steps
    assert call(project, server) == (0, HERE_ALREADY, '')
    assert tree(project) == taken(PHOTOS)


def test_corrupted(project, server):
    server.files[ARCHIVE] = GOOD[:-50] + b'!' + GOOD[-49:]
    assert call(project, server, expect=blob_id(GOOD)) == (
        1,
        '',
        said(
            f'{server.url} is corrupted, its git blob id is not {blob_id(GOOD)}; '
            'removed: call again'
        ),
    )
    assert tree(project) == set()
    assert not (project / 'data/landscapes').exists()
    server.files[ARCHIVE] = GOOD
    assert call(project, server) == (0, GOOD_END, '')


@pytest.mark.parametrize(
    'name', ['../evil.jpg', 'city/../../evil.jpg', '{tmp}/evil.jpg', '..\\evil.jpg', 'C:/evil.jpg']
)
def test_names_that_climb_out(project, server, tmp_path, name):
    name = name.format(tmp=tmp_path)
    server.files[ARCHIVE] = make_zip({**PHOTOS, name: jpeg('black')})
    before = set(tmp_path.rglob('*'))
    assert call(project, server) == (
        1,
        '',
        said(
            f'cannot unpack {PART}: {name} is a link or lies outside the folder, '
            'so take another copy'
        ),
    )
    assert set(tmp_path.rglob('*')) - before == {project / 'data', project / PART, project / LOCK}


def test_symlink(project, server):
    link = zipfile.ZipInfo('city/link.jpg')
    link.create_system = 3  # unix
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    file = io.BytesIO(GOOD)
    with zipfile.ZipFile(file, 'a') as archive:
        archive.writestr(link, '/etc/hostname')
    server.files[ARCHIVE] = file.getvalue()
    assert call(project, server) == (
        1,
        '',
        said(
            f'cannot unpack {PART}: city/link.jpg is a link or lies outside the folder, '
            'so take another copy'
        ),
    )
    assert tree(project) == {PART}


def test_not_a_zip(project, server):
    server.files[ARCHIVE] = b'hello'
    assert call(project, server) == (
        1,
        '',
        said(f'cannot unpack {PART}: BadZipFile: File is not a zip file'),
    )


def test_no_photos(project, server):
    server.files[ARCHIVE] = make_zip({'city/readme.txt': b'x', '__MACOSX/city/1.jpg': b'x'})
    assert call(project, server) == (1, '', said(f'cannot unpack {PART}: it has no photos to take'))
    assert tree(project) == {PART}


@needs_wget
def test_wget_where_there_is_no_curl(project, server, tmp_path):
    server.files[ARCHIVE] = GOOD
    leave_part(project, GOOD[:100])
    path = tools_without(tmp_path / 'bin', 'curl')
    assert call(project, server, path=path) == (0, GOOD_END, '')
    assert server.requests == [(ARCHIVE, 'bytes=100-')]
    assert tree(project) == taken(PHOTOS)


def test_without_unzip(project, server, tmp_path):
    server.files[ARCHIVE] = GOOD
    path = tools_without(tmp_path / 'bin', 'unzip', 'sha1sum', 'shasum')
    assert call(project, server, path=path) == (0, GOOD_END, '')


def test_without_curl_and_wget(project, any_server, tmp_path):
    path = tools_without(tmp_path / 'bin', 'curl', 'wget')
    assert call(project, any_server, path=path) == (
        1,
        '',
        said('curl or wget is needed: install one of them'),
    )
    assert tree(project) == set()


def test_without_python(project, server, tmp_path):
    path = tools_without(tmp_path / 'bin', 'python3')
    assert call(project, server, path=path) == (1, '', said('python3 is needed: install it'))
    assert tree(project) == set()


@pytest.mark.parametrize(
    'tool', [pytest.param('curl', marks=needs_curl), pytest.param('wget', marks=needs_wget)]
)
def test_unreachable(project, server, tmp_path, tool):
    path = tools_without(tmp_path / 'bin', {'curl': 'wget', 'wget': 'curl'}[tool])
    server.url = 'http://127.0.0.1:1/landscapes_small.zip'
    code, out, err = call(project, server, path=path)
    assert (code, out) == (1, '')
    assert err.startswith('download_landscapes.sh: cannot fetch http://127.0.0.1:1/landscapes_')
    assert err.endswith('): call again to go on\n') and err.count('\n') == 1


def test_missing_on_the_server_keeps_the_part(project, server):
    leave_part(project, GOOD[:100])
    code, out, err = call(project, server)
    assert (code, out) == (1, '')
    assert '404' in err and err.count('\n') == 1
    assert (project / PART).read_bytes() == GOOD[:100]


def test_photos_of_the_user_are_left_alone(project, server):
    mine = project / 'data/landscapes/holiday/1.jpg'
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b'mine')
    assert call(project, server) == (
        0,
        '1 photos already in data/landscapes: python colorize.py\n',
        '',
    )
    mine.rename(mine.with_suffix('.tiff'))
    assert call(project, server) == (
        2,
        '',
        said('data/landscapes has files but no jpg or png photos: move it away and call again'),
    )
    assert tree(project) == {'data/landscapes/holiday/1.tiff'}
    assert server.requests == []


def test_an_empty_folder_is_filled(project, server):
    server.files[ARCHIVE] = GOOD
    (project / 'data/landscapes').mkdir(parents=True)
    assert call(project, server) == (0, GOOD_END, '')
    assert tree(project) == taken(PHOTOS)


def serve_records(server, licenses):
    """licenses: {kind/key: (clean name, license)}"""
    for kind in KINDS:
        records = {
            name.split('/')[1]: {'clean_name': clean, 'license': number}
            for name, (clean, number) in licenses.items()
            if name.startswith(kind + '/')
        }
        path = f'/landscapes/licenses/{kind}_photos_info.json'
        server.files[path] = json.dumps(records).encode()


def test_remixable(project, server):
    names = ['city/1.jpg', 'city/2.jpg', 'city/3.jpg', 'lake/1.jpg', 'lake/4.jpg', 'lake/6.jpg']
    server.files[ARCHIVE] = make_zip({f'landscapes_small/{n}': jpeg('red') for n in names})
    serve_records(
        server,
        {
            'city/1.jpg': ('1.jpg', '1'),
            'city/2.jpg': ('2.jpg', '6'),
            'city/a photo.jpg': ('3.jpg', '3'),
            'lake/1.jpg': ('1.jpg', '3'),
            'lake/a photo.jpg': ('4.jpg', '4'),
            'lake/6.jpg': ('6.jpg', '10'),
            'road/1.jpg': ('1.jpg', '1'),
        },
    )  # in the records only
    left = ['city/1.jpg', 'lake/4.jpg', 'lake/6.jpg']
    assert call(project, server, '--remixable') == (0, GOOD_END, '')
    assert tree(project) == taken(left) | {'data/landscapes/.remixable'}
    asked = len(server.requests)
    assert asked == len(KINDS) + 1
    for flags in [(), ('--remixable',)]:
        assert call(project, server, *flags) == (0, HERE_ALREADY, '')
    assert len(server.requests) == asked


@pytest.mark.parametrize(
    'records',
    [
        {'city/1.jpg': ('1.jpg', '1'), 'city/2.JPG': ('2.JPG', '1')},
        {
            'city/1.jpg': ('1.jpg', '1'),
            'city/2.JPG': ('2.JPG', '1'),
            'road/1.jpeg': ('1.jpeg', '1'),
        },
    ],
)
def test_remixable_stops_at_a_photo_without_a_record(project, server, records):
    server.files[ARCHIVE] = GOOD
    serve_records(server, records)
    assert call(project, server, '--remixable') == (
        2,
        '',
        said(
            f'cannot unpack {PART}: lake/1.jpeg has no license record, so --remixable cannot tell'
        ),
    )
    assert tree(project) == {PART}
    # what has arrived serves a call without the flag
    asked = len(server.requests)
    assert call(project, server) == (0, GOOD_END, '')
    assert len(server.requests) == asked


def test_remixable_without_its_records(project, server):
    server.files[ARCHIVE] = GOOD
    code, out, err = call(project, server, '--remixable')
    record = server.url.replace('landscapes_small.zip', 'licenses/city_photos_info.json')
    assert (code, out) == (1, '')
    assert err.startswith(f'download_landscapes.sh: cannot fetch {record} (')
    assert err.count('\n') == 1
    assert tree(project) == set()


def test_remixable_where_all_photos_are_there_already(project, server):
    server.files[ARCHIVE] = GOOD
    call(project, server)
    assert call(project, server, '--remixable') == (
        2,
        '',
        said('data/landscapes was not fetched with --remixable: move it away and call again'),
    )
    assert tree(project) == taken(PHOTOS)
    assert len(server.requests) == 1


def test_wrong_requests(project, server):
    assert call(project, server, '--all') == (2, '', said('unknown argument --all: see --help'))
    assert call(project, server, expect='0f69e1e') == (
        2,
        '',
        said('LANDSCAPES_BLOB_ID=0f69e1e: give 40 hex digits'),
    )
    assert tree(project) == set() and server.requests == []


@pytest.mark.parametrize('flag', ['-h', '--help'])
def test_help(project, server, flag):
    code, out, err = call(project, server, flag)
    assert (code, err) == (0, '')
    assert '  ./download_landscapes.sh --remixable ' in out and 'set -e' not in out
    assert tree(project) == set() and server.requests == []


# ---------------------------------------------------------------------------- side by side

HOOK = '''
import os, shutil, urllib.request, zipfile
extract = zipfile.ZipFile.extract

def hold(archive, member, folder):
    """After the first photo: wait for the test, or lose what is there."""
    path = extract(archive, member, folder)
    if 'HOLD' in os.environ:
        urllib.request.urlopen(os.environ.pop('HOLD')).read()
    if os.environ.pop('LOSE', None):
        shutil.rmtree(folder)
    return path

zipfile.ZipFile.extract = hold
'''
WAITING = said('another call is filling data/landscapes: waiting for its end')


@pytest.fixture
def start(project, server, tmp_path):
    """start(HOLD=url): a call in the background, with these words in its environment."""
    (tmp_path / 'hook').mkdir()
    (tmp_path / 'hook/sitecustomize.py').write_text(HOOK)
    calls = []

    def start(**words):
        calls.append(
            subprocess.Popen(
                [project / 'download_landscapes.sh'],
                stdin=subprocess.DEVNULL,
                text=True,
                env=environment(server) | {'PYTHONPATH': str(tmp_path / 'hook')} | words,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        )
        return calls[-1]

    yield start
    server.release.set()
    for running in calls:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)
        running.communicate()


def hold(server):
    return server.url.replace(ARCHIVE, '/hold')


def end(running):
    out, err = running.communicate(timeout=60)
    return running.returncode, out, err


@pytest.mark.parametrize('folder', [None, 'data/landscapes'])
def test_a_second_call_waits_for_the_first(project, server, start, folder):
    server.files[ARCHIVE] = GOOD
    if folder:
        (project / folder).mkdir(parents=True)
    first = start(HOLD=hold(server))
    assert server.held.wait(60)
    second = start()
    assert second.stderr.readline() == WAITING
    server.release.set()
    assert end(first) == (0, GOOD_END, '')
    assert end(second) == (0, HERE_ALREADY, '')
    assert tree(project) == taken(PHOTOS)
    assert server.requests == [(ARCHIVE, None)]


def test_two_projects_that_share_a_folder(project, server, start, tmp_path):
    server.files[ARCHIVE] = GOOD
    disk, other = tmp_path / 'disk', tmp_path / 'other'
    for folder in project / 'data', other / 'data', disk:
        folder.mkdir(parents=True)
    for folder in project, other:
        (folder / 'data/landscapes').symlink_to(disk)
    shutil.copy(SCRIPT, other)
    first = start(HOLD=hold(server))
    assert server.held.wait(60)
    second = subprocess.Popen(
        [other / 'download_landscapes.sh'],
        env=environment(server),
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert second.stderr.readline() == WAITING
    server.release.set()
    assert end(first) == (0, GOOD_END, '')
    assert end(second) == (0, HERE_ALREADY, '')
    assert names(disk) == ['.landscapes.lock', 'city', 'lake']


def test_photos_that_vanish_while_they_are_unpacked_are_missed(project, server, start):
    server.files[ARCHIVE] = GOOD
    assert end(start(LOSE='1')) == (
        1,
        '',
        said(f'cannot unpack {PART}: 2 of 3 photos have arrived in the folder: call again'),
    )
    assert tree(project) == {PART}
    assert call(project, server) == (0, GOOD_END, '')
    assert tree(project) == taken(PHOTOS)


@pytest.mark.parametrize('folder', [None, 'data/landscapes'])
def test_the_lock_is_gone_with_a_killed_call(project, server, start, folder):
    server.files[ARCHIVE] = GOOD
    if folder:
        (project / folder).mkdir(parents=True)
    first = start(HOLD=hold(server))
    assert server.held.wait(60)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert call(project, server) == (0, GOOD_END, '')
    assert tree(project) == taken(PHOTOS)


def test_killed_while_its_unpacking_lives_on(project, server, start):
    server.files[ARCHIVE] = GOOD
    first = start(HOLD=hold(server))
    assert server.held.wait(60)
    first.kill()
    first.wait()
    second = start()
    assert second.stderr.readline() == WAITING
    server.release.set()
    assert end(second) == (0, GOOD_END, '')
    assert tree(project) == taken(PHOTOS)
    assert names(project / 'data') == ['.landscapes.lock', 'landscapes']


# ---------------------------------------------------------------------------- links


def link(project, target):
    (project / 'data').mkdir()
    (project / 'data/landscapes').symlink_to(target)


@pytest.mark.parametrize('there', [[], ['lost+found'], ['.DS_Store']])
def test_a_link_to_an_empty_folder_is_filled(project, server, tmp_path, there):
    server.files[ARCHIVE] = GOOD
    disk = tmp_path / 'disk/landscapes'
    disk.mkdir(parents=True, mode=0o750)
    for name in there:
        (disk / name).mkdir()
    link(project, disk)
    number = disk.stat().st_ino
    assert call(project, server) == (0, GOOD_END, '')
    assert (project / 'data/landscapes').readlink() == disk
    assert (disk.stat().st_ino, disk.stat().st_mode & 0o777) == (number, 0o750)
    assert names(disk) == sorted(['.landscapes.lock', 'city', 'lake', *there])
    assert {name: (disk / name).read_bytes() for name in PHOTOS} == PHOTOS
    assert names(project / 'data') == ['landscapes'] and names(disk.parent) == ['landscapes']
    assert call(project, server) == (0, HERE_ALREADY, '')


@needs_curl
def test_behind_a_link_a_download_goes_on_too(project, server, tmp_path):
    server.files[ARCHIVE] = GOOD
    server.cut = True
    (tmp_path / 'disk').mkdir()
    link(project, tmp_path / 'disk')
    assert call(project, server)[0] == 1
    assert names(tmp_path / 'disk') == ['.landscapes.lock', '.landscapes.zip.part']
    assert call(project, server) == (0, GOOD_END, '')
    assert server.requests[1] == (ARCHIVE, f'bytes={len(GOOD) // 2}-')
    assert names(tmp_path / 'disk') == ['.landscapes.lock', 'city', 'lake']


def test_a_dangling_link_gets_its_folder(project, server, tmp_path):
    server.files[ARCHIVE] = GOOD
    link(project, '../../disk')
    assert call(project, server) == (0, GOOD_END, '')
    assert names(tmp_path / 'disk') == ['.landscapes.lock', 'city', 'lake']


@pytest.mark.parametrize('target', ['disk/landscapes', 'project/data/landscapes'])
def test_a_link_that_leads_nowhere(project, server, tmp_path, target):
    """Its disk is not mounted, or it is a link to itself."""
    target = tmp_path / target
    link(project, target)
    assert call(project, server) == (
        1,
        '',
        said(
            f'data/landscapes is a link to {target}, which cannot be made: make it, or remove '
            'the link'
        ),
    )
    assert server.requests == []


def test_killed_between_two_kinds(project, server, tmp_path):
    """A folder that is filled where it is has one kind already, and the mark of that."""
    server.files[ARCHIVE] = GOOD
    (tmp_path / 'disk/city').mkdir(parents=True)
    link(project, tmp_path / 'disk')
    for name in 'city/1.jpg', 'city/2.JPG':
        (tmp_path / 'disk' / name).write_bytes(PHOTOS[name])
    (tmp_path / 'disk/.landscapes.unfinished').write_text('\n')
    assert call(project, server, '--remixable') == (
        2,
        '',
        said('data/landscapes was begun by a call with other arguments: call again with those'),
    )
    assert call(project, server) == (0, GOOD_END, '')
    assert names(tmp_path / 'disk') == ['.landscapes.lock', 'city', 'lake']


def test_remixable_behind_a_link(project, server, tmp_path):
    server.files[ARCHIVE] = GOOD
    serve_records(
        server,
        {
            'city/1.jpg': ('1.jpg', '1'),
            'city/2.JPG': ('2.JPG', '6'),
            'lake/1.jpeg': ('1.jpeg', '4'),
        },
    )
    (tmp_path / 'disk').mkdir()
    link(project, tmp_path / 'disk')
    end = (0, '2 photos in data/landscapes: python colorize.py\n', '')
    assert call(project, server, '--remixable') == end
    assert names(tmp_path / 'disk') == ['.landscapes.lock', '.remixable', 'city', 'lake']
    assert call(project, server, '--remixable')[0] == 0


def test_a_lock_that_cannot_be_opened(project, server):
    (project / LOCK).mkdir(parents=True)
    assert call(project, server) == (
        1,
        '',
        said(f'{LOCK} cannot be written: remove it and call again'),
    )
    assert server.requests == []


def test_a_file_in_the_way(project, server):
    (project / 'data').mkdir()
    (project / 'data/landscapes').write_text('mine')
    assert call(project, server) == (
        2,
        '',
        said('data/landscapes is a file: move it away and call again'),
    )
    (project / 'data/landscapes').unlink()
    (project / 'data').rmdir()
    (project / 'data').write_text('mine')
    assert call(project, server) == (1, '', said('the folder data cannot be made here'))
    assert server.requests == []


# ---------------------------------------------------------------------------- hostile archives


def refused(project, server, archive):
    """What is said of an archive that cannot be unpacked, in one line and with nothing left."""
    server.files[ARCHIVE] = archive
    code, out, err = call(project, server)
    start = f'download_landscapes.sh: cannot unpack {PART}: '
    assert (code, out) == (1, '') and err.startswith(start) and err.count('\n') == 1
    assert tree(project) == {PART} and names(project / 'data') == [
        '.landscapes.lock',
        'landscapes_small.zip.part',
    ]
    return err.removeprefix(start).rstrip('\n')


def test_a_bomb(project, server):
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('city/1.jpg', bytes(2**24))
    assert refused(project, server, file.getvalue()) == (
        'it would grow to 16,777,216 bytes, so these are no photos: take another copy'
    )


def test_a_bomb_that_lies_about_its_size(project, server):
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('city/1.jpg', bytes(2**24 + 12345))
    size = (2**24 + 12345).to_bytes(4, 'little')
    assert file.getvalue().count(size) == 2
    small = file.getvalue().replace(size, (100).to_bytes(4, 'little'))
    assert refused(project, server, small) == "BadZipFile: Bad CRC-32 for file 'city/1.jpg'"


@pytest.mark.filterwarnings('ignore:Duplicate name')
def test_a_name_that_comes_twice(project, server):
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w') as archive:
        for data in b'one', b'two':
            archive.writestr('city/1.jpg', data)
    assert refused(project, server, file.getvalue()) == (
        '1 of 2 photos have arrived in the folder: take another copy'
    )


@pytest.mark.parametrize(
    'members, reason',
    [
        ({'a/b.jpg': b'x', 'a/b.jpg/c.jpg': b'x'}, 'NotADirectoryError: '),
        ({'city/' + 'a' * 300 + '.jpg': b'x'}, 'OSError: '),
        ({'../\x1b[31m\nred.jpg': b'x'}, '../?[31m red.jpg is a link or lies outside'),
    ],
)
def test_names_that_no_file_can_have(project, server, members, reason):
    assert refused(project, server, make_zip(members)).startswith(reason)


@pytest.mark.parametrize('seed', range(15))
def test_damaged_archives(project, server, tmp_path, seed):
    archive = damaged(GOOD, random.Random(seed))
    server.files[ARCHIVE] = archive
    before = {p for p in tmp_path.rglob('*') if project not in p.parents}
    code, out, err = call(project, server)
    assert {p for p in tmp_path.rglob('*') if project not in p.parents} == before
    left = tree(project)
    if code == 0:  # a byte that does not matter, a time say
        assert err == '' and out.endswith(' in data/landscapes: python colorize.py\n')
        assert left and PART not in left
    else:
        assert (code, out) == (1, '') and err.count('\n') == 1 and 'Traceback' not in err
        assert err.startswith('download_landscapes.sh: cannot ')
        assert left <= {PART}


def test_damage_is_damage_and_comes_from_its_seed():
    kinds = set()
    for seed in range(100):
        copy = damaged(GOOD, random.Random(seed))
        assert copy != GOOD and copy == damaged(GOOD, random.Random(seed))
        kinds.add(len(copy) == len(GOOD))
    assert kinds == {True, False}
    for seed in range(20):
        assert damaged(b'x', random.Random(seed)) != b'x'
