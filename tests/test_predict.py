"""Colorizing photos: nothing of the user's is changed, and what is the photo's own is kept."""

import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageCms
from torch.nn import ModuleList

import predict
from predict import colorize, predict_chroma
from unet import UNet
from utils.photos import to_rgb

ROOT = Path(__file__).parent.parent
Tag = ExifTags.Base
MODES = '1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'CMYK', 'I;16', 'I', 'F'


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
        flags = '--device', 'cpu', '--size', 32
        assert helpers.call(None, *words, *flags, program=predict) == code
        return capsys.readouterr()

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
    if mode in ('LA', 'RGBA'):
        photo = photo.convert(mode)
        photo.putalpha(gray.point(lambda v: min(255, 2 * v - 100)))
    if mode in ('I;16', 'I', 'F'):
        kind, white = {'I;16': ('u2', 65535), 'I': ('i4', 65535), 'F': ('f4', 1)}[mode]
        return Image.fromarray((np.asarray(gray) / 255 * white).astype(kind))
    return photo.convert(mode)


def save(name, photo=None, **options):
    """Write a photo, with its folder."""
    os.makedirs(os.path.dirname(name) or '.', exist_ok=True)
    (photo or scene()).save(name, **options)


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
    return sorted(str(p.relative_to(folder)) for p in Path(folder).rglob('*') if p.is_file())


def test_a_result_that_exists_is_kept_unless_overwrite(call):
    save('a.png')
    save('b.png')
    call(0, 'a.png')
    first = Path('colorized/a.png').read_bytes()
    printed = call(0, 'a.png', 'b.png', '--saturation', 2)
    line = 'skipped, because the result exists: 1 of 2; --overwrite replaces results'
    assert printed.out.splitlines()[0] == line
    assert Path('colorized/a.png').read_bytes() == first
    assert files('colorized') == ['a.png', 'b.png']
    call(0, 'a.png', '--saturation', 2, '--overwrite')
    assert Path('colorized/a.png').read_bytes() != first


def test_inputs_are_never_overwritten(call):
    save('in/a.png')
    save('in/b.png')
    os.symlink('in', 'linked')
    os.makedirs('out')
    os.symlink('../in/a.png', 'out/a.png')
    before = Path('in/a.png').read_bytes()
    for flags in [], ['--overwrite']:
        for output in 'in', 'linked':
            assert 'no photos but those' in call(2, 'in', '--output', output, *flags).err
        for output in 'in', 'in/a.png', 'out':
            assert 'is one of the photos' in call(1, 'in/a.png', '--output', output, *flags).err
    assert all(Path(f'in/{name}').read_bytes() == before for name in files('in'))


def test_two_photos_never_share_a_result(call):
    for name, size in {'x/a.png': (30, 20), 'y/a.png': (20, 30), 'z/a.gif': (9, 9)}.items():
        save(name, scene(size))
    for flags in [], ['--overwrite']:
        lines = call(1, 'x/a.png', 'y/a.png', 'z/a.gif', *flags).err.splitlines()
        line = "predict.py: '{}': colorized/a.png is the result of 'x/a.png'"
        assert lines == [line.format(name) for name in ('y/a.png', 'z/a.gif')]
        assert Image.open('colorized/a.png').size == (30, 20)
    call(0, 'x/a.png', 'x/a.png', '--overwrite')


def test_a_full_disk_leaves_nothing_half_written(call):
    save('a.png')
    save('b.png', Image.effect_noise((800, 800), 90))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, before[1]))
    try:
        printed = call(1, 'a.png', 'b.png')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    reason = '[Errno 27] colorized/b.png was not saved: File too large'
    assert printed.err == f"predict.py: 'b.png': {reason}\n"
    assert files('colorized') == ['a.png']


def test_a_signal_finishes_the_photos_in_work(home):
    for number in range(200):
        save(f'in/{number}.jpg', scene((400, 300)))
    words = [sys.executable, ROOT / 'predict.py', 'in', '--size', '128']
    child = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while len(files('colorized')) < 5 and child.poll() is None:
        time.sleep(0.02)
    child.send_signal(signal.SIGTERM)
    out, error = child.communicate(timeout=60)
    line = r'predict.py: stopped; (\d+) of 200 photos are done, in colorized'
    done = int(re.fullmatch(line, error.splitlines()[-1])[1])
    assert child.returncode == 143 and not out and 'Traceback' not in error
    assert 5 <= done < 200 and len(files('colorized')) == done
    for name in files('colorized'):
        assert Image.open(f'colorized/{name}').convert('L').size == (400, 300)


def test_one_bad_photo_does_not_stop_the_others(call):
    save('whole.jpg', scene((300, 200)))
    save('in/ä good öne.jpg')
    save('in/zebra.png')
    save('in/script.jpg', format='EPS')  # Ghostscript would run it
    Path('in/a truncated.jpg').write_bytes(Path('whole.jpg').read_bytes()[:2500])
    Path('in/text.jpg').write_text('Not a photo.')
    printed = call(1, 'in', 'missing.jpg')
    assert files('colorized') == ['in/zebra.png', 'in/ä good öne.jpg']
    assert printed.out.startswith('2 photos in colorized (')
    lines = printed.err.splitlines()
    assert len(lines) == 4 and all(line.startswith('predict.py: ') for line in lines)
    for name in 'a truncated', 'text', 'script', 'missing':
        assert sum(f'{name}.' in line.split(':')[1] for line in lines) == 1


def test_folders_are_mirrored(call):
    for name in 'album/a.jpg', 'album/deep/er/b.png', 'other/a.jpg', 'a.jpg':
        save(name)
    for flags in [], ['--overwrite']:  # results in the folder of photos are no photos
        assert call(0, 'album/', '--output', 'album/one', *flags).out.startswith('2 photos')
        assert files('album/one') == ['a.jpg', 'deep/er/b.png']
    call(0, 'album/deep', 'a.jpg', '--output', 'many', 'other/')
    assert files('many') == ['a.jpg', 'deep/er/b.png', 'other/a.jpg']


def test_one_photo_may_have_a_name_for_its_result(call):
    save('a.jpg')
    save('album/b.jpg')
    assert call(0, 'a.jpg', '--output', 'new/color.png').out.startswith('1 photo in new/color.png')
    save('clear.png', Image.new('RGBA', (9, 9)))
    call(0, 'clear.png', '--output', 'new/clear.bmp', '--saturation', 0)  # holds no transparency
    assert Image.open('new/clear.bmp').getextrema() == ((255, 255),) * 3
    for words in 'a.jpg b.jpg --output c.png', 'album --output c.png', 'a.jpg --output c.gif':
        assert 'name a folder, or for one photo' in call(2, *words.split()).err
    assert not list(Path().glob('c.*'))


@pytest.mark.parametrize('size', [(60, 40), (7, 5), (1, 1), (300, 4)])
@pytest.mark.parametrize('mode', MODES)
def test_any_mode_and_size(net, mode, size):
    photo = scene(size, mode)
    result = colorize(net, photo, 32)
    assert result.mode == 'RGB' and result.size == size
    # a single pixel may be one off, by rounding, or white, which has no color
    assert luminance_error(result, to_rgb(photo).convert('L')) < 1 + (size == (1, 1))
    assert spread(result) > 15 or mode == '1' or size == (1, 1)


def test_every_format_and_mode(call):
    held = dict(jpg='L RGB CMYK', png='1 L LA P RGB RGBA I;16', webp='RGB RGBA', bmp='1 L P RGB')
    for suffix, modes in {**held, 'tif': ' '.join(MODES)}.items():
        for mode in modes.split():
            save(f'in/{suffix}-{mode[:4]}.{suffix}', scene(mode=mode), lossless=True)
    save('in/clear.png', scene(mode='L'), transparency=90)  # of one color
    assert call(0, 'in').err == '' and files('colorized') == files('in')
    for name in files('in'):
        with Image.open(f'in/{name}') as photo, Image.open(f'colorized/{name}') as result:
            is_clear = photo.has_transparency_data
            assert (result.format, result.size) == (photo.format, photo.size), name
            assert result.mode == ('RGBA' if is_clear else 'RGB'), name
            if is_clear:
                alpha = np.asarray(photo.convert('RGBA').getchannel('A')).astype(int)
                assert np.abs(alpha - result.getchannel('A')).max() <= ('webp' in name), name
                photo = photo.convert('RGBA').convert('RGB')
            assert luminance_error(result, to_rgb(photo).convert('L')) < 1, name
            assert spread(result) > 15 or '-1.' in name, name


def test_what_cannot_be_kept_becomes_png_and_the_first_frame(call):
    frames = dict(save_all=True, append_images=[scene().rotate(180)])
    save('moving.gif', **frames)
    save('old.tga')
    save('two.jpg', format='MPO', **frames)
    call(0, 'moving.gif', 'old.tga', 'two.jpg')
    for name, format in {'moving.png': 'PNG', 'old.png': 'PNG', 'two.jpg': 'JPEG'}.items():
        with Image.open(f'colorized/{name}') as result:
            assert result.format == format and luminance_error(result, scene().convert('L')) < 2


@pytest.mark.parametrize('suffix', ['jpg', 'png', 'webp', 'tif'])
def test_exif_and_profile_where_they_apply(call, suffix):
    exif = Image.Exif()
    exif[Tag.Make], exif[Tag.DateTime], exif[Tag.Orientation] = 'Kodak', '1961:05:04 12:00:00', 6
    exif[ExifTags.IFD.Exif] = {Tag.ExposureTime: 0.25}
    exif[ExifTags.IFD.GPSInfo] = {ExifTags.GPS.GPSLatitudeRef: 'N'}
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()
    gray = srgb[:16] + b'GRAY' + srgb[20:]
    save(f'color.{suffix}', exif=exif.tobytes(), icc_profile=srgb)
    save(f'gray.{suffix}', scene(mode='RGB' if suffix == 'webp' else 'L'), icc_profile=gray)
    call(0, f'color.{suffix}', f'gray.{suffix}')
    with Image.open(f'colorized/color.{suffix}') as result:
        assert result.info['icc_profile'] == srgb and result.size == (40, 60)
        exif = result.getexif()
        assert exif[Tag.Make] == 'Kodak' and exif[Tag.DateTime].startswith('1961')
        assert exif.get(Tag.Orientation, 1) == 1
        assert exif.get_ifd(ExifTags.IFD.Exif)[Tag.ExposureTime] == 0.25
        assert exif.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitudeRef] == 'N'
    with Image.open(f'colorized/gray.{suffix}') as result:
        assert 'icc_profile' not in result.info


def test_compare_shows_gray_color_and_original(call, net):
    photo = scene((200, 20), 'RGBA')
    save('a.png', photo)
    save('gray.jpg', scene((60, 40), 'L').convert('RGB'), quality=60)
    call(0, 'a.png', 'gray.jpg', '--compare')
    assert Image.open('colorized/gray.jpg').size == (2 * 60 + 2, 40)
    result, color = Image.open('colorized/a.png'), photo.convert('RGB')
    assert result.size == (3 * 200 + 2 * 4, 20)
    gray = color.convert('L')
    expected = {0: gray.convert('RGB'), 204: colorize(net, gray, 32), 408: color}
    for x, image in expected.items():
        panel = result.crop((x, 0, x + 200, 20))
        assert panel.convert('RGB').tobytes() == image.tobytes()
        assert panel.getchannel('A').tobytes() == photo.getchannel('A').tobytes()


class Watcher(torch.nn.Module):
    """In the network's place: remembers what it saw, and says one color."""

    def __init__(self, color=(0.5, 0.5, 0.5)):
        super().__init__()
        self.color = torch.nn.Parameter(torch.tensor(color).view(1, 3, 1, 1))
        self.image_size, self.looks = 224, ((1, False),)

    def forward(self, x):
        self.x = x
        return self.color + torch.zeros_like(x)


@pytest.mark.parametrize(
    'photo, size, expected',
    [
        ((640, 480), 224, (296, 224)),
        ((7, 5), 32, (48, 32)),
        ((40, 30000), 224, (8, 896)),
        ((300, 300), None, (64, 64)),  # from the weights
    ],
)
def test_what_the_network_sees(photo, size, expected):
    net, gray = Watcher(), scene(photo, 'L')
    net.image_size = 64
    colorize(net, gray, size)
    assert net.x.shape == (1, 1, *expected[::-1])
    assert net.x.min() >= -1 and net.x.max() <= 1
    assert abs((net.x.mean() + 1) * 127.5 - np.asarray(gray).mean()) < 4


@pytest.mark.parametrize('brighter', [0, 0.1])
def test_the_true_color_comes_back(brighter):
    for color in (200, 120, 60), (30, 90, 140), (128, 128, 128):
        net = Watcher(tuple(c / 255 + brighter for c in color))
        result = np.asarray(colorize(net, Image.new('RGB', (50, 30), color))).astype(int)
        assert np.abs(result - color).max() <= 2


class Sides(Watcher):
    """Tells left from right and top from bottom."""

    def forward(self, x):
        y = torch.full((1, 3, *x.shape[-2:]), 0.5)
        y[:, 0, :, x.shape[-1] // 2 :] = 0.8
        y[:, 2, x.shape[-2] // 2 :] = 0.8
        return y


def test_colors_are_the_mean_of_all_looks():
    net, gray, seen = Sides(), Image.new('L', (96, 64), 128), []
    net.register_forward_hook(lambda net, inputs, y: seen.append(*inputs))
    once = predict_chroma(net, gray, 64)
    net.looks = (1, True), (1, False)
    torch.testing.assert_close(predict_chroma(net, gray, 64), (once + once.flip(2)) / 2)
    predict_chroma(net, scene((96, 64), 'L'), 64)
    assert torch.equal(seen[-2].flip(3), seen[-1])
    net.looks = (3 / 4, False), (5 / 4, False)
    assert predict_chroma(net, gray, 64).shape[1:] == seen[-1].shape[2:] == (80, 120)
    assert seen[-2].shape[2:] == (48, 72)


def test_colors_are_the_mean_of_all_networks(home, call, net):
    save('a.png')
    other = UNet()
    torch.save(other.state_dict(), 'b.pth')
    gray, both = Image.open('a.png').convert('L'), ModuleList([net, other])
    mean = (predict_chroma(net, gray, 32) + predict_chroma(other, gray, 32)) / 2
    torch.testing.assert_close(predict_chroma(both, gray, 32), mean)
    call(0, 'a.png', '--weights', 'unet.pth', '--weights', 'b.pth', '--output', 'both.png')
    assert Image.open('both.png').tobytes() == colorize(both, gray, 32).tobytes()


@pytest.mark.parametrize('size', [(500, 333), (101, 640)])
def test_color_is_not_shifted(size):
    result = colorize(Sides(), Image.new('L', size, 128), 64)
    _, blue, red = (np.asarray(plane, float) for plane in result.convert('YCbCr').split())
    for middle in red.mean(axis=0), blue.mean(axis=1):
        edge = np.argmax(middle > (middle.min() + middle.max()) / 2)
        assert abs(edge - len(middle) / 2) <= 1


def test_saturation_scales_the_color(net):
    photo = scene((120, 90), 'L')
    dull, normal, bright = (spread(colorize(net, photo, 32, s)) for s in (0.5, 1, 1.5))
    assert dull == pytest.approx(normal / 2, rel=0.1) and bright > normal * 1.2
    assert colorize(net, photo, saturation=0).tobytes() == photo.convert('RGB').tobytes()


@pytest.mark.parametrize(
    'words, says',
    [
        (['a.jpg', '--weights', 'a.jpg'], 'a.jpg'),
        (['nothing'], 'no photos (.jpg, .png, .tif, …) in nothing, only nothing'),
        (['a.jpg', '--size', '12'], '12'),
        (['a.jpg', '--saturation', 'nan'], 'nan'),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(home, capsys, words, says):
    save('a.jpg')
    os.mkdir('nothing')
    assert helpers.call(None, *words, program=predict) == 2
    error = capsys.readouterr().err
    assert error.startswith('predict.py: ') and says in error and error.count('\n') == 1
    assert not os.path.exists('colorized')


def test_it_starts_without_torchvision():
    """Torchvision imports torch's compiler, which would nearly double the time of one photo."""
    code = "import sys, predict; sys.exit('torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, '-c', code], cwd=ROOT).returncode == 0
