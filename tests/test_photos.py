"""Photo files of every kind become upright RGB, or one line that says why not."""

import os

import numpy as np
import pytest
from PIL import Image

from utils import photos
from utils.photos import list_photos, load_photo

ORIENTATION = 0x0112
# how the camera stored a photo that is to be turned by an orientation
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    6: Image.Transpose.ROTATE_90,
    8: Image.Transpose.ROTATE_270,
}


def stripes(size=(40, 24)):
    """A photo that no turn or mirroring leaves as it is."""
    photo = Image.new('RGB', size, 'blue')
    photo.paste('red', (0, 0, size[0] // 2, size[1] // 3))
    photo.paste('lime', (0, size[1] // 2, size[0] // 4, size[1]))
    return photo


@pytest.mark.parametrize('orientation', TURNS)
def test_orientation_is_applied(tmp_path, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stripes().transpose(TURNS[orientation]).save(tmp_path / 'a.png', exif=exif)
    assert load_photo(tmp_path / 'a.png').tobytes() == stripes().tobytes()


@pytest.mark.parametrize(
    'mode, value, rgb',
    [
        ('L', 77, (77, 77, 77)),
        ('LA', (0, 0), (255, 255, 255)),
        ('RGBA', (0, 0, 0, 127), (128, 128, 128)),
        ('CMYK', (255, 0, 0, 0), (0, 255, 255)),
        ('I;16', 65535, (255, 255, 255)),
        ('I;16', 32768, (128, 128, 128)),
        ('I;16', 255, (1, 1, 1)),
        ('F', 0.5, (128, 128, 128)),
        ('F', 200.0, (200, 200, 200)),
    ],
)
def test_every_mode_becomes_rgb(tmp_path, mode, value, rgb):
    Image.new(mode, (8, 8), value).save(tmp_path / 'a.tif')
    photo = load_photo(tmp_path / 'a.tif')
    assert photo.mode == 'RGB' and photo.getpixel((3, 3)) == rgb


def test_a_large_jpeg_is_decoded_at_a_fraction(tmp_path):
    stripes((1600, 1200)).save(tmp_path / 'a.jpg', quality=95)
    full, small = load_photo(tmp_path / 'a.jpg'), load_photo(tmp_path / 'a.jpg', 64)
    assert full.size == (1600, 1200) and small.size == (200, 150)
    both = [np.asarray(p.resize((64, 64), Image.Resampling.BILINEAR), int) for p in (full, small)]
    assert abs(both[0] - both[1]).mean() < 1


@pytest.mark.parametrize(
    'name, content, line',
    [
        ('a.jpg', b'', 'no photo that Pillow can read'),
        ('a.jpg', b'%!PS-Adobe-3.0 EPSF-3.0\n', 'no photo that Pillow can read'),
        ('a.ppm', b'P6 70000 48 255\n', '70000×48 pixels are too many for this machine'),
        ('a.ppm', b'P6 65000 65000 255\n', '65000×65000 pixels are too many for this machine'),
        ('cut.jpg', None, '.*truncated'),
        ('missing/a.jpg', None, 'No such file or directory'),
    ],
)
def test_what_cannot_be_read_is_an_oserror(tmp_path, monkeypatch, name, content, line):
    monkeypatch.setattr(photos, 'MOST_PIXELS', 10**9)
    stripes((400, 400)).save(tmp_path / 'cut.jpg')
    os.truncate(tmp_path / 'cut.jpg', 2000)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(OSError, match=f'^{line}'):
        load_photo(tmp_path / name)


def test_listing_passes_over_what_is_no_photo(tmp_path, capsys):
    names = 'b.JPG', 'x/a.jpg', 'x/y/deep.png', 'ä ö/ü.webp'
    hidden = '.hidden.jpg', '._b.JPG', 'notes.txt', 'x.pdf', '__MACOSX/x/a.jpg', '.git/a.jpg'
    for name in *names, *hidden, 'c.dng', 'x/d.DNG', 'e.cr2', 'f.HEIC':
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert list_photos(tmp_path) == list(names)
    rest = '1 .cr2, 2 .dng, 1 .heic, 1 .pdf, 1 .txt (to read .heic: pip install pillow-heif)'
    assert capsys.readouterr().err == f'passed over in {tmp_path}: {rest}\n'


def test_listing_follows_links_and_ends_in_a_loop(tmp_path):
    for folder in 'disk', 'data':
        (tmp_path / folder).mkdir()
    (tmp_path / 'disk/a.jpg').touch()
    (tmp_path / 'data/linked').symlink_to(tmp_path / 'disk')
    (tmp_path / 'disk/up').symlink_to(tmp_path / 'data')
    assert list_photos(tmp_path / 'data') == ['linked/a.jpg']
