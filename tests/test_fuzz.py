"""The short form of fuzz.py: a few damaged files of each kind."""

import re
import subprocess
import sys
from pathlib import Path


def test_damaged_files_are_taken_or_refused_in_words(tmp_path):
    words = [Path(__file__).with_name('fuzz.py'), '--photos', '20', '--weights', '6']
    options = dict(cwd=tmp_path, capture_output=True, text=True, timeout=280)
    done = subprocess.run([sys.executable, *words], **options)
    assert done.returncode == 0, done.stdout + done.stderr
    row = r'^ *(\d+) damaged (\w+): (\d+) taken, (\d+) refused, 0 faults$'
    rows = re.findall(row, done.stdout, re.MULTILINE)
    assert [(number, kind) for number, kind, *_ in rows] == [('20', 'photos'), ('6', 'weights')]
    assert all(int(number) == int(taken) + int(refused) for number, _, taken, refused in rows)
