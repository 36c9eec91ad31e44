"""The short form of fuzz.py: a few damaged files of each kind."""

import re
import subprocess
import sys
from pathlib import Path


def test_damaged_files_are_taken_or_refused_in_words(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            Path(__file__).with_name('fuzz.py'),
            '--photos',
            '40',
            '--weights',
            '10',
            '--archives',
            '2',
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=280,
    )
    counts = re.findall(
        r'^ *(\d+) damaged (\w+): (\d+) taken, (\d+) refused, 0 faults$', done.stdout, re.MULTILINE
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert [(int(number), kind) for number, kind, _, _ in counts] == [
        (40, 'photos'),
        (10, 'weights'),
        (2, 'archives'),
    ]
    assert all(int(number) == int(taken) + int(refused) for number, _, taken, refused in counts)
