import errno
import json
import os
import pickle
import re
import resource
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageCms, ImageOps

import predict
from data_utils import list_photos
from predict import colorize
from unet import UNet
from utils.device import Precision
from utils.parallel import Memory, run_in_threads
from utils.photos import to_rgb
from utils.results import Results

ROOT = Path(__file__).parent.parent
Tag = ExifTags.Base
MODES = '1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'CMYK', 'I;16', 'I', 'F'
# which modes a format holds as they are
FORMATS = {
    'jpg': ('L', 'RGB', 'CMYK'),
    'png': ('1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'I;16'),
    'webp': ('RGB', 'RGBA'),
    'tif': ('1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'CMYK', 'I;16', 'I', 'F'),
    'bmp': ('1', 'L', 'P', 'RGB'),
}


@pytest.fixture(scope='module')
def net():
    """Untrained, but with colors."""
    torch.manual_seed(0)
    net = UNet()
    with torch.no_grad():
        net.last_conv.weight *= 0.5
        net.last_conv.bias.copy_(torch.tensor([0.8, 0.5, 0.2]))
    return net


@pytest.fixture
def home(tmp_path, monkeypatch, net):
    """A folder of the test's own, to work in, with weights."""
    monkeypatch.chdir(tmp_path)
    torch.save(net.state_dict(), 'unet.pth')
    return tmp_path


@pytest.fixture
def call(home, capsys):
    """call(code, words...): what predict.py prints (stdout, stderr)."""

    def call(code, *words):
        assert predict.main([*map(str, words), '--device', 'cpu', '--size', '32']) == code
        printed = capsys.readouterr()
        assert 'Traceback' not in printed.err
        return printed

    return call


def scene(size=(60, 40), mode='RGB'):
    """A smooth picture that no turn or mirroring leaves as it is, of any mode."""
    x = np.linspace(0, 1, min(size[0], 500))[None, :, None]
    y = np.linspace(0, 1, min(size[1], 500))[:, None, None]
    gray = 60 + 130 * (x * (0.3 + 0.7 * y) + 0.2 * (x > 0.6) * (y < 0.5)) / 1.2
    photo = Image.fromarray(np.uint8(gray + [20, 0, -30] * (1 - y))).resize(size)
    gray = photo.convert('L')
    if mode == 'P':
        return photo.quantize(32)
    if mode == 'LA':
        return Image.merge('LA', (gray, gray.point(lambda v: 255 * (v > 100))))
    if mode == 'RGBA':
        photo.putalpha(gray.point(lambda v: min(255, 2 * v - 100)))
        return photo
    if mode == 'I;16':
        return Image.fromarray(np.asarray(gray).astype(np.uint16) * 257)
    if mode == 'I':
        return Image.fromarray(np.asarray(gray).astype(np.int32) * 257)
    if mode == 'F':
        return Image.fromarray(np.asarray(gray).astype(np.float32) / 255)
    return photo.convert(mode)


def luminance_error(result, gray):
    """Mean absolute difference in gray levels, away from clipped colors."""
    pixels = np.asarray(result.convert('RGB')).astype(int)
    inside = ((pixels > 1) & (pixels < 254)).all(axis=2)
    error = np.abs(np.asarray(result.convert('L')).astype(int) - np.asarray(gray))
    return error[inside].mean() if inside.any() else 0


def spread(result):
    """How far from gray, on average."""
    return np.ptp(np.asarray(result.convert('RGB')).astype(int), axis=2).mean()


def files(folder):
    return sorted(
        str(p.relative_to(folder))
        for p in Path(folder).rglob('*')
        if p.is_file() and p.name != '.colorized'
    )


# ---------------------------------------------------------------------------- colorize


@pytest.mark.parametrize('size', [(60, 40), (7, 5), (1, 1), (300, 4)])
@pytest.mark.parametrize('mode', MODES)
def test_any_mode_and_size(net, mode, size):
    photo = scene(size, mode)
    before = photo.tobytes()
    result = colorize(net, photo, 32)
    assert result.mode == 'RGB' and result.size == size and photo.tobytes() == before
    # a single pixel may be one off, by rounding, or white, which has no color
    assert luminance_error(result, predict.to_rgb(photo).convert('L')) < 1 + (size == (1, 1))
    assert spread(result) > 15 or mode == '1' or size == (1, 1)


class Watcher(torch.nn.Module):
    """In the network's place: remembers what it saw, says one color, or what it is told."""

    def __init__(self, color=(0.5, 0.5, 0.5)):
        super().__init__()
        self.color = torch.nn.Parameter(torch.tensor(color).view(1, 3, 1, 1))

    def forward(self, x):
        self.x = x
        return self.color + torch.zeros_like(x)


@pytest.mark.parametrize(
    'photo, size, expected',
    [
        ((640, 480), 224, (296, 224)),
        ((480, 640), 224, (224, 296)),
        ((224, 224), 224, (224, 224)),
        ((6000, 4000), 224, (336, 224)),
        ((1, 1), 224, (224, 224)),
        ((7, 5), 32, (48, 32)),
        ((3000, 40), 224, (896, 8)),
        ((40, 30000), 224, (8, 896)),
        ((500, 300), 8, (16, 8)),
    ],
)
def test_what_the_network_sees(photo, size, expected):
    net = Watcher()
    colorize(net, scene(photo, 'L'), size)
    assert net.x.shape == (1, 1, *expected[::-1])
    gray = (net.x[0, 0].numpy() + 1) * 127.5
    assert abs(gray.mean() - np.asarray(scene(photo, 'L')).mean()) < 4
    assert net.x.min() >= -1 and net.x.max() <= 1


def test_black_and_white_are_minus_one_and_one():
    net = Watcher()
    for value, x in (0, -1), (255, 1):
        colorize(net, Image.new('L', (9, 9), value))
        assert torch.all(net.x == x)


@pytest.mark.parametrize('color', [(200, 120, 60), (30, 90, 140), (128, 128, 128), (90, 140, 40)])
def test_the_true_color_comes_back(color):
    net = Watcher(tuple(c / 255 for c in color))
    result = np.asarray(colorize(net, Image.new('RGB', (50, 30), color))).astype(int)
    assert np.abs(result - color).max() <= 2
    # also from a prediction that is nothing but too bright
    net = Watcher(tuple(c / 255 + 0.1 for c in color))
    result = np.asarray(colorize(net, Image.new('RGB', (50, 30), color))).astype(int)
    assert np.abs(result - color).max() <= 2


@pytest.mark.parametrize('size', [(500, 333), (101, 640)])
def test_color_is_not_shifted(size):
    # the network tells left from right and top from bottom; so must the enlarged result
    class Sides(Watcher):
        def forward(self, x):
            y = torch.full((1, 3, *x.shape[-2:]), 0.5)
            y[:, 0, :, x.shape[-1] // 2 :] = 0.8
            y[:, 2, x.shape[-2] // 2 :] = 0.8
            return y

    result = colorize(Sides(), Image.new('L', size, 128), 64)
    _, blue, red = (np.asarray(c).astype(int) for c in result.convert('YCbCr').split())
    for plane, axis in (red, 1), (blue, 0):
        mid = np.asarray(plane).mean(axis=1 - axis)
        edge = np.argmax(mid > (mid.min() + mid.max()) / 2)
        assert abs(edge - len(mid) / 2) <= 1


def test_saturation_scales_the_color(net):
    photo = scene((120, 90), 'L')
    dull, normal, bright = (spread(colorize(net, photo, 32, s)) for s in (0.5, 1, 1.5))
    assert dull == pytest.approx(normal / 2, rel=0.1)
    assert bright > normal * 1.2
    gray = colorize(net, photo, saturation=0)
    assert gray.tobytes() == photo.convert('RGB').tobytes()


def test_a_color_photo_is_turned_gray_first(net):
    photo = scene((90, 60))
    assert colorize(net, photo, 32).tobytes() == colorize(net, photo.convert('L'), 32).tobytes()


# ---------------------------------------------------------------------------- files


def test_formats_and_modes(call, home):
    expected = {}
    for suffix, modes in FORMATS.items():
        for mode in modes:
            name = f'in/{suffix}/{mode.replace(";", "")}.{suffix}'
            os.makedirs(os.path.dirname(name), exist_ok=True)
            transparent = {'transparency': 0} if mode == 'P' and suffix == 'png' else {}
            lossless = {'lossless': True} if suffix == 'webp' else {}
            scene(mode=mode).save(name, **transparent, **lossless)
            expected[name[3:]] = name
    out = call(0, 'in')
    assert out.out.startswith(f'{len(expected)} photos in colorized (') and out.err == ''
    assert files('colorized') == sorted(expected)
    for name, source in expected.items():
        with Image.open(source) as photo, Image.open(f'colorized/{name}') as result:
            assert result.format == photo.format and result.size == photo.size, name
            transparent = photo.has_transparency_data
            assert result.mode == ('RGBA' if transparent else 'RGB'), name
            assert spread(result) > 15 or '/1.' in name, name
            if transparent:
                alpha = np.asarray(photo.convert('RGBA').getchannel('A')).astype(int)
                assert np.abs(alpha - result.getchannel('A')).max() <= (name[-4:] == 'webp'), name
                photo = photo.convert('RGBA').convert('RGB')
            assert luminance_error(result, predict.to_rgb(photo).convert('L')) < 1, name


@pytest.mark.parametrize('mode, transparency', [('1', 0), ('L', 90), ('RGB', (80, 60, 30))])
def test_a_transparent_color_stays_transparent(call, mode, transparency):
    photo = scene(mode=mode)
    photo.putpixel((3, 3), transparency)
    photo.save('a.png', transparency=transparency)
    call(0, 'a.png')
    with Image.open('colorized/a.png') as result, Image.open('a.png') as photo:
        expected = photo.convert('RGBA').getchannel('A')
        assert expected.getpixel((3, 3)) == 0
        assert result.getchannel('A').tobytes() == expected.tobytes()


def test_transparent_bmp_is_laid_on_white(call):
    # of what reads such a file, nothing would read our own: Pillow writes no such header
    masks = 0xFF0000, 0xFF00, 0xFF, 0xFF000000
    header = struct.pack('<IiiHHIIiiII4I52x', 108, 9, 9, 1, 32, 3, 324, 0, 0, 0, 0, *masks)
    Path('a.bmp').write_bytes(struct.pack('<2sIII', b'BM', 446, 0, 122) + header + bytes(324))
    assert Image.open('a.bmp').mode == 'RGBA'
    call(0, 'a.bmp', '--saturation', 0)
    assert Image.open('colorized/a.bmp').getextrema() == ((255, 255),) * 3


def test_what_cannot_be_kept_becomes_png(call):
    frames = [scene((20, 10)), scene((20, 10)).rotate(180)]
    frames[0].save('moving.gif', save_all=True, append_images=frames[1:])
    scene((20, 10)).save('old.tga')
    scene((20, 10)).save('two.jpg', format='MPO', save_all=True, append_images=frames[1:])
    call(0, 'moving.gif', 'old.tga', 'two.jpg')
    assert files('colorized') == ['moving.png', 'old.png', 'two.jpg']
    formats = [Image.open(f'colorized/{name}').format for name in files('colorized')]
    assert formats == ['PNG', 'PNG', 'JPEG']
    with Image.open('moving.gif') as first, Image.open('colorized/moving.png') as result:
        assert luminance_error(result, first.convert('L')) < 1


TURNS = [
    None,
    Image.Transpose.FLIP_LEFT_RIGHT,
    Image.Transpose.ROTATE_180,
    Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.TRANSPOSE,
    Image.Transpose.ROTATE_90,
    Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_270,
]


@pytest.mark.parametrize('suffix', ['png', 'jpg', 'tif', 'webp'])
def test_orientation_is_applied_and_cleared(call, net, suffix):
    upright = scene().convert('L').convert('RGB')
    for orientation, turn in enumerate(TURNS, 1):
        exif = Image.Exif()
        exif[Tag.Orientation], exif[Tag.Artist] = orientation, 'Ada'
        stored = upright if turn is None else upright.transpose(turn)
        exact = {'jpg': dict(quality=100), 'webp': dict(lossless=True)}.get(suffix, {})
        stored.save(f'{orientation}.{suffix}', exif=exif, **exact)
    call(0, *(f'{n}.{suffix}' for n in range(1, 9)))
    expected = np.asarray(colorize(net, upright, 32)).astype(int)
    for n in range(1, 9):
        with Image.open(f'colorized/{n}.{suffix}') as result:
            exif = result.getexif()
            assert exif.get(Tag.Orientation, 1) == 1 and exif[Tag.Artist] == 'Ada'
            assert result.size == upright.size == ImageOps.exif_transpose(result).size
            error = np.abs(np.asarray(result.convert('RGB')) - expected)
            assert error.mean() < (0.01 if suffix in ('png', 'tif') else 2), n


@pytest.mark.parametrize('suffix', ['jpg', 'png', 'webp', 'tif'])
def test_exif_and_profile_where_they_apply(call, suffix):
    exif = Image.Exif()
    exif[Tag.Make], exif[Tag.DateTime] = 'Kodak', '1961:05:04 12:00:00'
    exif[ExifTags.IFD.Exif] = {Tag.ExposureTime: 0.25}
    exif[ExifTags.IFD.GPSInfo] = {ExifTags.GPS.GPSLatitudeRef: 'N'}
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()
    gray = srgb[:16] + b'GRAY' + srgb[20:]
    scene().save(f'color.{suffix}', exif=exif.tobytes(), icc_profile=srgb)
    scene(mode='RGB' if suffix == 'webp' else 'L').save(f'gray.{suffix}', icc_profile=gray)
    call(0, f'color.{suffix}', f'gray.{suffix}')
    with Image.open(f'colorized/color.{suffix}') as result:
        assert result.info['icc_profile'] == srgb
        exif = result.getexif()
        assert exif[Tag.Make] == 'Kodak' and exif[Tag.DateTime].startswith('1961')
        assert exif.get_ifd(ExifTags.IFD.Exif)[Tag.ExposureTime] == 0.25
        assert exif.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitudeRef] == 'N'
    with Image.open(f'colorized/gray.{suffix}') as result:
        assert 'icc_profile' not in result.info


@pytest.mark.parametrize(
    'mode, compression',
    [
        ('1', 'group4'),
        ('L', 'raw'),
        ('CMYK', 'tiff_lzw'),
        ('F', 'tiff_adobe_deflate'),
        ('RGBA', 'packbits'),
        ('RGB', 'jpeg'),
    ],
)
def test_a_tiff_tells_of_its_own_pixels(call, mode, compression):
    # not one of the tags on how the photo's pixels were stored may come along
    scene(mode=mode).save(
        'a.tif', compression=compression, resolution=300, artist='Ada', tiffinfo={65000: 'private'}
    )
    call(0, 'a.tif')
    with Image.open('colorized/a.tif') as result, Image.open('a.tif') as photo:
        assert result.tag_v2[258] == (8,) * len(result.getbands())
        assert result.tag_v2[262] == 2 and result.tag_v2[315] == 'Ada' and result.tag_v2[282] == 300
        photo = photo.convert('RGBA').convert('RGB') if mode == 'RGBA' else photo
        assert luminance_error(result, predict.to_rgb(photo).convert('L')) < 1


def test_damaged_exif_costs_only_itself(call):
    scene().save('a.jpg', exif=b'Exif\0\0nonsense')
    scene().save('b.png', exif=b'Exif\0\0II*\0\xff\xff\xff\x7f')
    call(0, 'a.jpg', 'b.png')
    assert files('colorized') == ['a.jpg', 'b.png']


def test_compare_shows_gray_color_and_original(call, net):
    photo = scene((200, 20), 'RGBA')
    photo.save('a.png')
    call(0, 'a.png', '--compare')
    result, color = Image.open('colorized/a.png'), photo.convert('RGB')
    assert result.size == (3 * 200 + 2 * 4, 20)
    panels = [result.crop((x, 0, x + 200, 20)) for x in (0, 204, 408)]
    gray = color.convert('L')
    expected = gray.convert('RGB'), colorize(net, gray, 32), color
    for panel, image in zip(panels, expected, strict=True):
        assert panel.convert('RGB').tobytes() == image.tobytes()
        assert panel.getchannel('A').tobytes() == photo.getchannel('A').tobytes()
    for x in 200, 404:
        gap = result.crop((x, 0, x + 4, 20))
        assert gap.getcolors() == [(80, (255, 255, 255, 255))]


def test_compare_of_a_gray_photo_has_no_original(call):
    scene((60, 40), 'L').convert('RGB').save('a.jpg', quality=60)
    call(0, 'a.jpg', '--compare')
    assert Image.open('colorized/a.jpg').size == (2 * 60 + 2, 40)


def test_sizes_from_one_pixel_to_24_million(call):
    for size in (1, 1), (7, 5), (3000, 40), (4000, 6000):
        scene(size).save(f'{size[0]}.jpg')
    call(0, '1.jpg', '7.jpg', '3000.jpg', '4000.jpg')
    for name in files('colorized'):
        with Image.open(name) as photo, Image.open(f'colorized/{name}') as result:
            assert result.size == photo.size
            assert luminance_error(result, photo.convert('L')) < 1 + (photo.size == (1, 1))


# ---------------------------------------------------------------------------- bad photos


def test_one_bad_photo_does_not_stop_the_others(call, home):
    os.makedirs('in')
    scene((300, 200)).save('whole.jpg')
    Path('in/a truncated.jpg').write_bytes(Path('whole.jpg').read_bytes()[:2500])
    Path('in/text.jpg').write_text('Not a photo.')
    Path('in/empty.png').touch()
    os.symlink('nowhere.jpg', 'in/link.jpg')
    os.mkfifo('in/pipe.jpg')
    scene().save('in/ä good öne.jpg')
    scene().save('in/zebra.png')
    printed = call(1, 'in', 'missing.jpg')
    assert files('colorized') == ['in/zebra.png', 'in/ä good öne.jpg']
    assert printed.out.startswith('2 photos in colorized (')
    lines = printed.err.splitlines()
    for name in 'a truncated', 'text', 'empty', 'link', 'pipe', 'missing':
        (line,) = (line for line in lines if f'{name}.' in line.split(':')[1])
        assert line.startswith('predict.py: ') and len(line.split(': ')[2]) > 5
    assert len(lines) == 6


def test_a_name_that_is_no_text(call, home):
    name = os.fsdecode(b'in/caf\xe9 \n.jpg')
    os.makedirs('in')
    try:
        scene().save(name)
    except (OSError, UnicodeError):
        pytest.skip('this file system takes UTF-8 only')
    Path(name.replace('.jpg', ' bad.jpg')).touch()
    printed = call(1, 'in', '--output', os.fsdecode(b'\xe9'))
    assert os.path.exists(os.fsdecode(b'\xe9/caf\xe9 \n.jpg'))
    assert len(printed.err.splitlines()) == 1 and printed.out.startswith('1 photo in ')


def test_a_full_disk_leaves_nothing_half_written(home, run):
    scene((40, 30)).save('a.png')
    Image.effect_noise((800, 800), 90).save('b.png')
    done = run(
        'predict.py',
        'a.png',
        'b.png',
        '--size',
        32,
        code=1,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000)),
    )
    assert done.stdout.startswith('1 photo in colorized')
    assert "'b.png': colorized/b.png was not written: " in done.stderr
    assert sorted(os.listdir('colorized')) == ['.colorized', 'a.png']


# ---------------------------------------------------------------------------- where results go


def test_folders_are_mirrored(call):
    for name in 'album/a.jpg', 'album/deep/er/b.png', 'other/a.jpg', 'a.jpg':
        os.makedirs(os.path.dirname(name) or '.', exist_ok=True)
        scene().save(name)
    call(0, 'album/', '--output', 'one')
    assert files('one') == ['a.jpg', 'deep/er/b.png']
    call(0, 'album', 'a.jpg', '--output', 'many', 'other/')
    assert files('many') == ['a.jpg', 'album/a.jpg', 'album/deep/er/b.png', 'other/a.jpg']


def test_two_photos_never_share_a_result(call):
    for name, size in ('x/a.jpg', (30, 20)), ('y/a.jpg', (20, 30)):
        os.makedirs(os.path.dirname(name))
        scene(size).save(name)
    for _ in range(2):  # the same photo wins the second time
        printed = call(1, 'x/a.jpg', 'y/a.jpg')
        assert printed.err.startswith("predict.py: 'y/a.jpg': colorized/a.jpg exists and is no ")
        assert Image.open('colorized/a.jpg').size == (30, 20)
    call(1, 'y/a.jpg')
    call(0, 'x/a.jpg', 'x/a.jpg')


def test_an_earlier_result_is_replaced_another_file_is_not(call):
    scene().save('a.png')
    call(0, 'a.png')
    first = Path('colorized/a.png').read_bytes()
    call(0, 'a.png', '--saturation', 2)
    second = Path('colorized/a.png').read_bytes()
    assert second != first
    scene().save('colorized/a.png')  # painted over by hand
    mine = Path('colorized/a.png').read_bytes()
    assert 'move it away' in call(1, 'a.png').err
    assert Path('colorized/a.png').read_bytes() == mine
    os.remove('colorized/a.png')
    os.mkdir('colorized/a.png')
    call(1, 'a.png')
    os.rmdir('colorized/a.png')
    os.symlink('elsewhere', 'colorized/a.png')
    call(1, 'a.png')
    os.remove('colorized/a.png')
    with open('colorized/.colorized', 'ab') as log:  # a run that was killed while it wrote
        log.write(b'\n12\xff')
    call(0, 'a.png')
    call(0, 'a.png')


def test_inputs_are_never_overwritten(call):
    os.makedirs('in')
    for name in 'a.png', 'b.png', 'c.png':
        scene().save(f'in/{name}')
    before = Path('in/a.png').read_bytes()
    assert call(2, 'in', '--output', 'in').err.count('\n') == 1
    os.symlink('in', 'linked')
    call(2, 'in', '--output', 'linked')
    call(1, 'in/a.png', 'in/b.png', '--output', 'in')
    os.makedirs('out')
    os.link('in/a.png', 'out/a.png')
    os.symlink('../in/b.png', 'out/b.png')
    assert 'is one of the photos' in call(1, 'in', '--output', 'out').err
    assert files('out') == ['a.png', 'b.png', 'c.png'] and os.path.islink('out/b.png')
    # an earlier result that is also an input
    os.symlink('../out/c.png', 'in/z.png')
    result = Path('out/c.png').read_bytes()
    call(1, 'in', '--output', 'out', '--saturation', 2)
    assert Path('out/c.png').read_bytes() == result
    assert all(Path(f'in/{name}').read_bytes() == before for name in ('a.png', 'b.png', 'c.png'))


def test_results_inside_the_folder_of_photos_are_not_photos(call):
    os.makedirs('album/sub')
    scene().save('album/a.jpg')
    scene().save('album/sub/b.jpg')
    for _ in range(2):
        assert call(0, 'album', '--output', 'album/colorized').out.startswith('2 photos')
        assert files('album/colorized') == ['a.jpg', 'sub/b.jpg']
    os.remove('album/a.jpg')
    shutil.rmtree('album/sub')
    assert 'no photos' in call(2, 'album', '--output', 'album/colorized').err


# ---------------------------------------------------------------------------- requests


@pytest.mark.parametrize(
    'words, says',
    [
        (['missing.jpg'], 'missing.jpg'),
        (['missing', 'gone'], 'gone'),
        (['nothing'], 'nothing'),
        ([''], 'no such file'),
        (['a.jpg', '--weights', 'gone.pth'], 'gone.pth'),
        (['a.jpg', '--weights', 'nothing'], 'nothing'),
        (['a.jpg', '--output', 'a.jpg'], 'a.jpg'),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(call, words, says):
    scene().save('a.jpg')
    os.mkdir('nothing')
    error = call(2, *words).err
    assert error.startswith('predict.py: ') and says in error and error.count('\n') == 1
    assert not os.path.exists('colorized')


@pytest.mark.parametrize(
    'words',
    [
        [],
        ['a', '--size', '12'],
        ['a', '--size', '0'],
        ['a', '--size', 'x'],
        ['a', '--device', 'tpu'],
        ['a', '--saturation', '-1'],
        ['a', '--saturation', 'nan'],
        ['a', '--saturation', 'inf'],
        ['a', '--saturation', '1001'],
        ['a', '--size', '4104'],
        ['--'],
        ['a', '--sat', '1'],
    ],
)
def test_wrong_flags(words, capsys):
    with pytest.raises(SystemExit) as stop:
        predict.main(words)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith('predict.py: ') and error.count('\n') == 1


class Trap:
    def __reduce__(self):
        return os.mkdir, ('trapped',)


def foreign_weights(net):
    """Files that are no weights of this network, and a word that must tell what they are."""
    torch.save(torch.nn.Conv2d(3, 3, 1).state_dict(), 'other.pth')
    torch.save(net, 'module.pth')
    torch.save({'net': net.state_dict(), 'optimizer': {}, 'progress': {}}, 'checkpoint.pth')
    torch.save({'last_conv.weight': Trap()}, 'trap.pth')
    torch.save([1, 2], 'list.pth')
    Path('raw_trap.pth').write_bytes(pickle.dumps(Trap()))
    Path('page.pth').write_text('<!DOCTYPE html><title>404</title>')
    Path('half.pth').write_bytes(Path('unet.pth').read_bytes()[:100_000])
    Path('empty.pth').touch()
    Path('settings.pth').write_text(json.dumps({'lr': 1}))
    wide = dict(net.state_dict(), **{'last_conv.bias': torch.zeros(4)})
    torch.save(wide, 'wide.pth')
    return dict(
        other='other weights',
        module='',
        checkpoint='checkpoint',
        trap='',
        list='a list',
        raw_trap='code',
        page='web page',
        half='truncated',
        empty='empty',
        settings='',
        wide='last_conv.bias is (4,)',
    )


def test_foreign_weights_are_refused_and_not_run(call, net):
    scene().save('a.jpg')
    for name, word in foreign_weights(net).items():
        error = call(2, 'a.jpg', '--weights', f'{name}.pth').err
        assert error.startswith('predict.py: ') and error.count('\n') == 1
        assert f'{name}.pth' in error and word in error and 'expected' in error, error
    assert not os.path.exists('trapped') and not os.path.exists('colorized')


# ---------------------------------------------------------------------------- the program


def test_two_hundred_photos_in_one_call(home, run):
    os.makedirs('in')
    for number in range(200):
        scene((40 + number % 9, 30)).save(f'in/{number}.{("jpg", "png")[number % 2]}')
    (home / 'tensorboard.py').write_text('raise ImportError("that is for training")')
    done = run(
        'predict.py',
        'in',
        '--size',
        32,
        '--device',
        'cpu',
        env={**os.environ, 'PYTHONPATH': str(home)},
    )
    assert files('colorized') == files('in')
    (first,) = done.stdout.splitlines()
    assert first.startswith('200 photos in colorized (') and first.endswith(' photos/s)')
    assert done.stderr == ''  # the progress bar is for terminals


@pytest.mark.parametrize('signum', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_in_a_line(home, signum):
    os.makedirs('in')
    for number in range(200):
        scene((400, 300)).save(f'in/{number}.jpg')
    child = subprocess.Popen(
        [sys.executable, ROOT / 'predict.py', 'in', '--size', '128', '--num_workers', '4'],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while len(files('colorized')) < 5 and time.monotonic() < deadline:
        time.sleep(0.02)
    child.send_signal(signum)
    out, error = child.communicate(timeout=60)
    assert child.returncode == 128 + signum and error.count('\n') == 1 and not out
    done = int(
        re.fullmatch(r'predict.py: stopped; (\d+) of 200 photos are done, in colorized\n', error)[1]
    )
    assert 5 <= done < 200 and len(files('colorized')) == done
    for name in files('colorized'):
        with Image.open(f'colorized/{name}') as result:
            result.load()
            assert result.size == (400, 300)


def test_control_c_during_the_imports_has_no_traceback(home):
    Path('PIL.py').write_text('import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n')
    done = subprocess.run(
        [sys.executable, ROOT / 'predict.py', 'a.jpg'],
        capture_output=True,
        env={**os.environ, 'PYTHONPATH': str(home)},
        timeout=60,
    )
    assert done.returncode == -signal.SIGINT and done.stderr == b''


def test_it_starts_without_what_only_training_needs():
    """The import of torchvision takes as long as that of torch: twice the wait for one photo."""
    slow = 'torchvision', 'tensorboard', 'torch._dynamo'
    code = f'import sys, predict; print([name for name in {slow} if name in sys.modules])'
    assert subprocess.check_output([sys.executable, '-c', code], cwd=ROOT, text=True) == '[]\n'


@pytest.mark.parametrize('closed, code', [('>&-', 0), ('2>&-', 0), ('>&- 2>&-', 0)])
def test_closed_streams(home, closed, code):
    scene().save('a.png')
    done = subprocess.run(
        f'{shlex.join([sys.executable, str(ROOT / "predict.py")])} a.png --size 32 {closed}',
        shell=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == code and done.stderr == ''
    with Image.open('colorized/a.png') as result:
        result.load()


# ---------------------------------------------------------------------------- many at once


def test_the_number_of_workers_changes_no_byte(call, drawings):
    for workers in 1, 2, 4:
        call(0, drawings, '--output', f'out{workers}', '--num_workers', workers)
    names = files('out1')
    assert len(names) == 56 and files('out2') == files('out4') == names
    for name in names:
        one, two, four = (Path(f'out{workers}/{name}').read_bytes() for workers in (1, 2, 4))
        assert one == two == four


def test_two_programs_never_write_into_one_result(call, monkeypatch):
    for folder, value in ('x', 60), ('y', 200):
        os.makedirs(folder)
        Image.new('L', (30, 20), value).save(f'{folder}/a.png')
    write, inner = Results.write, []

    def write_later(results, path, target, content):
        # the check is done, the photo colorized: now the other program writes its result
        if not inner:
            inner.append(
                subprocess.run(
                    [sys.executable, ROOT / 'predict.py', 'y/a.png', '--size', '32'],
                    check=True,
                    capture_output=True,
                    timeout=120,
                )
            )
        write(results, path, target, content)

    monkeypatch.setattr(Results, 'write', write_later)
    printed = call(1, 'x/a.png')
    assert 'exists and is no earlier result of this photo' in printed.err
    assert Image.open('colorized/a.png').getpixel((3, 3))[1] > 100
    assert sorted(os.listdir('colorized')) == ['.colorized', 'a.png']


def test_without_hard_links(call, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, 'Operation not permitted')

    monkeypatch.setattr(os, 'link', refuse)
    for folder, size in ('x', (30, 20)), ('y', (20, 30)):
        os.makedirs(folder)
        scene(size).save(f'{folder}/a.png')
    call(0, 'x/a.png')
    call(0, 'x/a.png', '--saturation', 2)
    call(1, 'y/a.png')
    assert Image.open('colorized/a.png').size == (30, 20)
    Path('colorized/a.png').write_bytes(b'')  # what a program leaves that is killed in between
    call(0, 'x/a.png')
    assert Image.open('colorized/a.png').size == (30, 20)


def test_memory_is_shared():
    memory, inside = Memory(100), []

    def job(size):
        with memory.reserve(size):
            inside.append(min(size, 100))
            assert sum(inside) <= 100
            inside.remove(min(size, 100))

    run_in_threads(job, [[size] for size in (60, 50, 300, 10, 100, 40) * 20], 4, 'test')
    assert memory.free == 100


def test_what_the_device_has_no_memory_for_is_done_on_the_cpu(net, monkeypatch):
    class Full(UNet):
        def forward(self, x):
            raise torch.cuda.OutOfMemoryError('CUDA out of memory. Tried to allocate 9 GiB')

        def parameters(self, recurse=True):
            return iter([torch.empty(1, device='meta')])

    # torch has no autocast for the device that stands for a GPU here
    monkeypatch.setattr(predict, 'Precision', lambda *_: Precision('fp32'))
    full = Full()
    full.load_state_dict(net.state_dict())
    result = predict.colorize_anyway(full, scene(), 32, 1.0)
    assert result.tobytes() == colorize(net, scene(), 32).tobytes()


def test_the_size_comes_from_the_weights():
    net = Watcher()
    for image_size, size, expected in (None, None, 224), (64, None, 64), (64, 96, 96):
        net.image_size = image_size
        colorize(net, Image.new('L', (300, 300)), size)
        assert net.x.shape[2:] == (expected, expected)


# ---------------------------------------------------------------------------- what is spoken of


def test_one_photo_may_have_a_name_for_its_result(call):
    scene().save('a.jpg')
    scene((9, 9)).save('b.jpg')
    assert call(0, 'a.jpg', '--output', 'new/color.png').out == '1 photo in new/color.png\n'
    assert Image.open('new/color.png').format == 'PNG'
    call(0, 'a.jpg', '--output', 'new/color.png', '--saturation', 2)
    assert 'no earlier result' in call(1, 'b.jpg', '--output', 'new/color.png').err
    assert 'name a folder' in call(2, 'a.jpg', 'b.jpg', '--output', 'c.png').err
    assert 'name a folder' in call(2, 'new', '--output', 'c.png').err
    assert '.gif is not written' in call(2, 'a.jpg', '--output', 'c.gif').err
    assert not os.path.exists('c.png')


def test_the_first_of_many_frames_is_told(call):
    frames = [scene((20, 10)), scene((20, 10)).rotate(180), scene((20, 10), 'L').convert('RGB')]
    for name in 'moving.gif', 'pages.tif', 'moving.webp', 'moving.png':
        frames[0].save(name, save_all=True, append_images=frames[1:])
        printed = call(0, name, '--output', name[-4:])
        assert printed.err == f"predict.py: '{name}': the result is the first of 3 frames\n"


@pytest.mark.parametrize('pages, told', [(100, '100'), (101, 'more than 100')])
def test_thousands_of_pages_are_not_counted(call, pages, told):
    page = scene((8, 8))
    page.save('pages.tif', save_all=True, append_images=[page] * (pages - 1))
    said = f"predict.py: 'pages.tif': the result is the first of {told} frames\n"
    assert call(0, 'pages.tif').err == said


def test_what_follows_two_dashes_are_photos(call):
    for name in 'a.png', '-b.png', '--compare':
        scene().save(name, format='PNG')
    call(0, 'a.png', '--output', 'out')
    assert predict.main(['--size', '32', '--output', 'out', '--', '-b.png', '--compare']) == 0
    assert sorted(os.listdir('out')) == ['--compare', '-b.png', '.colorized', 'a.png']


def test_a_pipe_in_the_place_of_the_marks(call):
    os.mkdir('out')
    os.mkfifo('out/.colorized')
    scene().save('a.png')
    line = 'predict.py: out/.colorized is no regular file; move it away\n'
    assert call(2, 'a.png', '--output', 'out').err == line


def test_what_is_passed_over_is_counted(call):
    os.makedirs('in/deeper')
    for name in 'a.dng', 'b.DNG', 'deeper/c.cr2', 'd.jxl', 'notes.txt', 'x.pdf':
        Path(f'in/{name}').touch()
    assert 'no photos in in, but 1 .cr2 (raw: save as JPEG' in call(2, 'in').err
    scene().save('in/a.jpe', format='JPEG')
    printed = call(0, 'in')
    assert printed.out == '1 photo in colorized\n' and printed.err == (
        'passed over in in: 1 .cr2 (raw: save as JPEG, PNG or TIFF), 2 .dng (raw: save as JPEG, '
        'PNG or TIFF), 1 .jxl (save as JPEG, PNG or TIFF)\n'
    )


def test_nothing_done_names_no_folder(call):
    Path('a.jpg').touch()
    assert call(1, 'a.jpg').out == 'no photo was colorized\n'
    assert not os.path.exists('colorized')


def test_a_tree_of_1200_folders(call, home):
    deep = home
    os.makedirs('in')
    os.chdir('in')
    for _ in range(1200):
        os.mkdir('d')
        os.chdir('d')
    scene((8, 8)).save('a.png')
    os.chdir(deep)
    assert list_photos('in') == ['d/' * 1200 + 'a.png']
    call(0, 'in')
    assert os.path.exists('colorized/' + 'd/' * 1200 + 'a.png')
    subprocess.run(['rm', '-r', 'in', 'colorized'], check=True)  # too deep for shutil


@pytest.mark.parametrize(
    'special, white', [(1.02, 255), (float('inf'), 255), (float('nan'), 0), (float('-inf'), 0)]
)
def test_a_floating_point_photo_stays_bright(special, white):
    values = np.full((4, 4), 0.5, np.float32)
    values[0, 0], values[0, 1] = special, 1
    pixels = np.asarray(to_rgb(Image.fromarray(values)))[..., 0]
    assert pixels[0, 0] == white and pixels[0, 1] == 255 and pixels[2, 2] == 128


def test_more_pixels_than_memory_allows(call, monkeypatch):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1_000_000)
    scene((2000, 1200)).save('a.jpg')
    assert call(1, 'a.jpg').err == (
        "predict.py: 'a.jpg': larger than the 2 megapixels that memory allows\n"
    )


def test_postscript_is_not_run(call):
    scene().save('a.jpg', format='EPS')
    assert 'no photo that Pillow can read' in call(1, 'a.jpg').err
