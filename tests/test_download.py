"""download_landscapes.sh, against a server of our own on the loopback."""

import hashlib
import http.server
import io
import json
import os
import shutil
import signal
import subprocess
import threading
import time
import zipfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / 'download_landscapes.sh'
KINDS = 'city', 'field', 'forest', 'lake', 'mountain', 'ocean', 'road'
ARCHIVE = '/landscapes/landscapes_small.zip'
PART = 'data/landscapes_small.zip.part'
UNPACKED = 'data/.landscapes.tmp/photos/city/1.jpg'
PHOTOS = {'city/1.jpg': b'first', 'city/2.JPG': b'second', 'lake/1.jpeg': b'third'}
GOOD_END = '3 photos in data/landscapes: python colorize.py\n'
HERE_ALREADY = '3 photos already in data/landscapes: python colorize.py\n'
WAITING = 'download_landscapes.sh: another call is filling data/landscapes: waiting for its end\n'
# in front of Python's own modules: after its first photo, the unpacking waits for a file
HOOK = """
import os, time, zipfile
extract = zipfile.ZipFile.extract

def hold(*args):
    extract(*args)
    while not os.path.exists(os.environ['GO_ON']):
        time.sleep(0.02)

zipfile.ZipFile.extract = hold
"""


def make_zip(members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w') as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name), data)  # without the time of day
    return file.getvalue()


GOOD = make_zip(PHOTOS)


class Handler(http.server.BaseHTTPRequestHandler):
    """Serve `server.files`; note each request in `server.requests`, with the range it asks for."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        server, asked = self.server, self.headers.get('Range')
        server.requests.append((self.path, asked))
        if self.path not in server.files:
            return self.send_error(404)
        body = server.files[self.path]
        start = int(asked.removeprefix('bytes=').removesuffix('-')) if asked else 0
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header('Content-Range', f'bytes {start}-{len(body) - 1}/{len(body)}')
        self.send_header('Content-Length', str(len(body) - start))
        self.end_headers()
        self.wfile.write(body[start : server.cut])


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as server:
        server.files, server.requests, server.cut = {ARCHIVE: GOOD}, [], None
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


@pytest.fixture
def start(project, server, tmp_path):
    """start(flags..., **environment): a call that waits until GO_ON exists."""
    (tmp_path / 'hook').mkdir()
    (tmp_path / 'hook/sitecustomize.py').write_text(HOOK)
    calls = []

    def start(*flags, **environment):
        body = server.files.get(ARCHIVE, b'')
        env = os.environ | dict(
            no_proxy='127.0.0.1',
            LANDSCAPES_URL=server.url,
            LANDSCAPES_BLOB_ID=hashlib.sha1(b'blob %d\0' % len(body) + body).hexdigest(),
            PYTHONPATH=str(tmp_path / 'hook'),
            GO_ON=str(tmp_path / 'go_on'),
        )
        running = subprocess.Popen(
            [project / 'download_landscapes.sh', *flags],
            env=env | environment | dict(PYTHONDONTWRITEBYTECODE='1'),  # nothing in hook/
            cwd=tmp_path,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        calls.append(running)
        return running

    yield start
    (tmp_path / 'go_on').touch()
    for running in calls:
        running.communicate(timeout=60)


@pytest.fixture
def call(start, tmp_path):
    """call(flags..., **environment): the exit code of a call, and what it printed."""
    (tmp_path / 'go_on').touch()
    return lambda *flags, **environment: end(start(*flags, **environment))


def end(running):
    out, err = running.communicate(timeout=60)
    return running.returncode, out, err


def wait_for(path):
    for _ in range(3000):
        if not path.exists():
            time.sleep(0.02)
    assert path.exists()


def tree(project):
    """Return every file of the project, hidden ones too, but for the script and its lock."""
    files = {p.relative_to(project).as_posix() for p in project.rglob('*') if not p.is_dir()}
    return files - {'download_landscapes.sh', 'data/.landscapes.lock'}


def taken(photos=PHOTOS):
    return {f'data/landscapes/{name}' for name in photos}


@pytest.mark.parametrize('top', ['', 'data/landscapes/'])
def test_photos_end_up_below_their_kind(project, server, call, top):
    junk = f'{top}.DS_Store', f'{top}city/._1.jpg', f'__MACOSX/{top}city/1.jpg', f'{top}readme.txt'
    photos = {top + name: data for name, data in PHOTOS.items()}
    server.files[ARCHIVE] = make_zip(photos | dict.fromkeys(junk, b'x'))
    assert call() == (0, GOOD_END, '')
    assert tree(project) == taken()
    assert {n: (project / 'data/landscapes' / n).read_bytes() for n in PHOTOS} == PHOTOS
    assert call() == (0, HERE_ALREADY, '')
    assert server.requests == [(ARCHIVE, None)]


def test_goes_on_where_it_was_cut_off(project, server, call):
    server.cut = len(GOOD) // 2
    code, out, err = call()
    assert (code, out) == (1, '')
    assert f'cannot fetch {server.url}: call again to go on' in err
    assert tree(project) == {PART}
    assert (project / PART).read_bytes() == GOOD[: server.cut]
    server.requests, server.cut = [], None
    assert call()[:2] == (0, GOOD_END)
    assert server.requests == [(ARCHIVE, f'bytes={len(GOOD) // 2}-')]
    assert tree(project) == taken()


def test_a_corrupted_archive_is_removed(project, server, call):
    code, out, err = call(LANDSCAPES_BLOB_ID='0123456789' * 4)
    assert (code, out) == (1, '') and 'is corrupted' in err and err.count('\n') == 1
    assert tree(project) == set() and not (project / 'data/landscapes').exists()


def serve_records(server, licenses):
    """Serve the licenses, {KIND/KEY: (clean name, license)}."""
    records = {kind: {} for kind in KINDS}
    for name, (clean, number) in licenses.items():
        kind, key = name.split('/')
        records[kind][key] = {'clean_name': clean, 'license': number}
    for kind in KINDS:
        path = f'/landscapes/licenses/{kind}_photos_info.json'
        server.files[path] = json.dumps(records[kind]).encode()


def test_remixable(project, server, call):
    licenses = {
        'city/1.jpg': ('1.jpg', '1'),
        'city/2.jpg': ('2.jpg', '6'),
        'lake/1.jpg': ('1.jpg', '3'),
        'lake/a photo.jpg': ('4.jpg', '4'),
        'lake/6.jpg': ('6.jpg', '10'),
    }
    serve_records(server, licenses)
    names = 'city/1.jpg', 'city/2.jpg', 'lake/1.jpg', 'lake/4.jpg', 'lake/6.jpg'
    server.files[ARCHIVE] = make_zip(dict.fromkeys(names, b'x'))
    assert call('--remixable') == (0, GOOD_END, '')
    left = ['city/1.jpg', 'lake/4.jpg', 'lake/6.jpg', '.remixable']
    assert tree(project) == taken(left)
    assert call() == call('--remixable') == (0, HERE_ALREADY, '')


def test_remixable_stops_at_a_photo_without_a_record(project, server, call):
    serve_records(server, {'city/1.jpg': ('1.jpg', '1'), 'city/2.JPG': ('2.JPG', '1')})
    code, out, err = call('--remixable')
    assert (code, out) == (1, '') and 'lake/1.jpeg' in err and err.count('\n') == 1
    assert tree(project) == {PART}
    server.requests = []
    assert call() == (0, GOOD_END, '')  # what has arrived serves a call without the flag
    assert server.requests == []
    code, out, err = call('--remixable')
    assert (code, out) == (2, '') and 'was not fetched with --remixable' in err


@pytest.mark.parametrize(
    'mine, code, said',
    [
        ('data/landscapes/holiday/1.jpg', 0, '1 photos already in data/landscapes'),
        ('data/landscapes/holiday/1.tiff', 2, 'data/landscapes has no jpg or png photos: move it'),
    ],
)
def test_the_users_own_files_are_left_alone(project, server, call, mine, code, said):
    (project / mine).parent.mkdir(parents=True, exist_ok=True)
    (project / mine).write_bytes(b'mine')
    ended, out, err = call()
    assert ended == code and said in out + err and (out + err).count('\n') == 1
    assert tree(project) == {mine} and server.requests == []


def test_a_second_call_waits_for_the_first(project, server, start, tmp_path):
    (project / 'data/landscapes').mkdir(parents=True)  # one that is empty is filled
    first = start()
    wait_for(project / UNPACKED)
    second = start()
    assert second.stderr.readline() == WAITING
    (tmp_path / 'go_on').touch()
    assert end(first) == (0, GOOD_END, '')
    assert end(second) == (0, HERE_ALREADY, '')
    assert tree(project) == taken() and server.requests == [(ARCHIVE, None)]


@pytest.mark.parametrize('whole_group', [True, False])
def test_killed_while_it_unpacks(project, start, tmp_path, whole_group):
    """If only the shell is killed, its unpacking lives on, and the next call waits for that."""
    first = start()
    wait_for(project / UNPACKED)
    os.killpg(first.pid, signal.SIGKILL) if whole_group else first.kill()
    first.wait()
    assert not (project / 'data/landscapes').exists()
    second = start()
    if not whole_group:
        assert second.stderr.readline() == WAITING
    (tmp_path / 'go_on').touch()
    assert end(second) == (0, GOOD_END if whole_group else HERE_ALREADY, '')
    assert tree(project) == taken()


EVIL = make_zip({'../evil.jpg': b'x', 'city/../../evil.jpg': b'x', '/tmp/evil.jpg': b'x'})


@pytest.mark.parametrize(
    'archive, ended',
    [
        (EVIL, 0),
        (make_zip({'city/readme.txt': b'x'}), 1),
        (GOOD.replace(b'second', b'damage'), 1),
        (GOOD[:-50], 1),
    ],
    ids=['evil', 'empty', 'damaged', 'cut off'],
)
def test_an_archive_is_taken_or_refused_in_one_line(
    project, server, call, tmp_path, archive, ended
):
    server.files[ARCHIVE] = archive
    before = {p for p in tmp_path.rglob('*') if project not in p.parents}
    code, out, err = call()
    assert code == ended and (out + err).count('\n') == 1 and 'Traceback' not in err
    assert {p for p in tmp_path.rglob('*') if project not in p.parents} == before
    in_place = {name for name in tree(project) if not name.startswith('data/landscapes/')}
    assert in_place <= {PART} and not Path('/tmp/evil.jpg').exists()
