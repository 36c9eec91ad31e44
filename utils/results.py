"""The folder of results, where nothing is lost: neither a photo, nor another's result."""

import contextlib
import hashlib
import os
import secrets
import threading

from utils.cli import UsageError


class Results:
    """A folder in which nothing is overwritten but an earlier result of the same photo.

    A hidden file in it has a mark of each result; one that was changed since is the user's own.
    `photos` are the paths of all photos. Several threads and processes may write at once. Raises
    UsageError if the folder is a file, or if anything but a file has the hidden file's name.
    """

    def __init__(self, folder, photos):
        if os.path.lexists(folder) and not folder.is_dir():
            raise UsageError(f'--output {folder} is a file; name a folder')
        self.log, self.lock = folder / '.colorized', threading.Lock()
        if os.path.lexists(self.log) and not self.log.is_file():  # a pipe would be waited for
            raise UsageError(f'{self.log} is no regular file; move it away')
        self.marks = self.read_marks()
        self.photos = {identity(path) for path in photos if os.path.exists(path)}

    def read_marks(self):
        return set(self.log.read_bytes().split()) if self.log.is_file() else set()

    def has_mark(self, mark):
        """Tell whether this or another process wrote the mark."""
        if mark not in self.marks:
            self.marks |= self.read_marks()
        return mark in self.marks

    def add_marks(self, *marks):
        with self.lock:
            if new := set(marks) - self.marks:
                with open(self.log, 'ab') as log:
                    log.write(b'\n' + b'\n'.join(sorted(new)))
                self.marks |= new

    def check(self, path, target):
        """Raise FileExistsError where `target` must not become the result of the photo `path`."""
        if target.exists() and identity(target) in self.photos:
            raise FileExistsError(f'{target} is one of the photos; give another --output')
        if os.path.lexists(target) and not (
            target.is_file() and self.has_mark(mark(path, target.read_bytes()))
        ):
            raise FileExistsError(
                f'{target} exists and is no earlier result of this photo; move '
                'it away or give another --output'
            )

    def write(self, path, target, content):
        """Write the result of the photo `path` whole or not at all.

        Raises FileExistsError as check does, whoever made the file since, else OSError.
        """
        temporary = target.with_name(f'.colorized.{secrets.token_hex(8)}.tmp')
        try:
            make_folders(target.parent)
            temporary.write_bytes(content)
            # First the marks: one without its result does no harm. That of an empty file is for
            # what create() leaves when it is killed.
            self.add_marks(mark(path, content), mark(path, b''))
            try:
                create(temporary, target)
            except FileExistsError:
                self.check(path, target)
                os.replace(temporary, target)
        except OSError as error:
            if not error.strerror:  # from check, and complete
                raise
            raise OSError(f'{target} was not written: {error.strerror}') from error
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()


def make_folders(folder):
    """Make a folder and those that it lies in. (os.makedirs cannot make a thousand at once.)"""
    missing = []
    while not folder.is_dir() and folder != folder.parent:
        missing.append(folder)
        folder = folder.parent
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)


def create(temporary, target):
    """Move a file to the name `target`. Raises FileExistsError if that is taken.

    Making the name is the check: of two processes, only one succeeds.
    """
    try:
        os.link(temporary, target)
    except FileExistsError:
        raise
    except (OSError, AttributeError):  # no hard links here: an empty file takes the name
        with open(target, 'xb'):
            pass
        os.replace(temporary, target)


def identity(path):
    """Return what is the same for all names that a file has."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


def mark(path, content):
    """Return what tells that `content` was made from the photo at `path`."""
    digest = hashlib.sha256(os.fsencode(os.path.realpath(path)) + b'\0')
    digest.update(content)
    return digest.hexdigest().encode()
