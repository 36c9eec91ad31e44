import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from data_utils import (
    ImageFolderGrayColor,
    RequestError,
    get_colorized_dataset_loader,
    list_photos,
    load_photo,
)

ORIENTATION = 0x0112


def stripes(size=(40, 24)):
    """A photo that no turn or mirroring leaves as it is."""
    photo = Image.new('RGB', size, 'blue')
    photo.paste('red', (0, 0, size[0] // 2, size[1] // 3))
    photo.paste('lime', (0, size[1] // 2, size[0] // 4, size[1]))
    return photo


# ---------------------------------------------------------------------------- load_photo

TURNS = [None, Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180,
         Image.Transpose.FLIP_TOP_BOTTOM, Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_90,
         Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_270]


@pytest.mark.parametrize('orientation', range(1, 9))
def test_orientation_is_applied(tmp_path, orientation):
    # the camera stored the photo turned the other way round
    turn = TURNS[orientation - 1]
    stored = stripes() if turn is None else stripes().transpose(turn)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stored.save(tmp_path / 'a.png', exif=exif)
    assert load_photo(tmp_path / 'a.png').tobytes() == stripes().tobytes()


@pytest.mark.parametrize('mode, value, rgb', [
    ('1', 1, (255, 255, 255)), ('L', 77, (77, 77, 77)), ('RGB', (1, 2, 3), (1, 2, 3)),
    ('LA', (0, 0), (255, 255, 255)), ('LA', (100, 255), (100, 100, 100)),
    ('RGBA', (255, 0, 0, 255), (255, 0, 0)), ('RGBA', (9, 9, 9, 0), (255, 255, 255)),
    ('RGBA', (0, 0, 0, 127), (128, 128, 128)),
    ('CMYK', (0, 0, 0, 0), (255, 255, 255)), ('CMYK', (255, 0, 0, 0), (0, 255, 255)),
    ('I;16', 65535, (255, 255, 255)), ('I;16', 32768, (128, 128, 128)), ('I;16', 255, (1, 1, 1)),
    ('I', 65535, (255, 255, 255)), ('I', 2 ** 31 - 1, (255, 255, 255)),
    ('F', 1.0, (255, 255, 255)), ('F', 0.5, (128, 128, 128)), ('F', 200.0, (200, 200, 200)),
    ('F', -1.0, (0, 0, 0)),
])
def test_every_mode_becomes_rgb(tmp_path, mode, value, rgb):
    Image.new(mode, (8, 8), value).save(tmp_path / 'a.tif')
    photo = load_photo(tmp_path / 'a.tif')
    assert photo.mode == 'RGB' and photo.getpixel((3, 3)) == rgb


def test_palette_with_transparency_is_laid_on_white(tmp_path):
    photo = Image.new('P', (2, 1))
    photo.putpalette([10, 20, 30, 40, 50, 60])
    photo.putpixel((1, 0), 1)
    photo.save(tmp_path / 'a.png', transparency=0)
    loaded = load_photo(tmp_path / 'a.png')
    assert [loaded.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (40, 50, 60)]


def test_a_large_jpeg_is_decoded_at_a_fraction(tmp_path):
    stripes((1600, 1200)).save(tmp_path / 'a.jpg', quality=95)
    full, small = load_photo(tmp_path / 'a.jpg'), load_photo(tmp_path / 'a.jpg', 64)
    assert full.size == (1600, 1200) and small.size == (200, 150)
    both = [np.asarray(p.resize((64, 64), Image.Resampling.BILINEAR), int) for p in (full, small)]
    assert abs(both[0] - both[1]).mean() < 1


@pytest.mark.parametrize('content', [b'', b'no photo', b'\xff\xd8\xff\xe0 cut', b'GIF89a'])
def test_what_is_no_photo_is_an_oserror(tmp_path, content):
    (tmp_path / 'a.jpg').write_bytes(content)
    with pytest.raises(OSError):
        load_photo(tmp_path / 'a.jpg')


def test_a_truncated_photo_and_a_bomb_are_oserrors(tmp_path, monkeypatch):
    stripes((400, 400)).save(tmp_path / 'a.jpg')
    data = (tmp_path / 'a.jpg').read_bytes()
    (tmp_path / 'half.jpg').write_bytes(data[:len(data) // 2])
    with pytest.raises(OSError, match='truncated'):
        load_photo(tmp_path / 'half.jpg')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1000)
    with pytest.raises(OSError, match='decompression bomb'):
        load_photo(tmp_path / 'a.jpg')


# ---------------------------------------------------------------------------- list_photos

def test_listing_passes_over_what_is_no_photo(tmp_path):
    for name in ('b.JPG', 'x/a.jpg', 'x/y/deep.png', '.hidden.jpg', '._b.JPG', 'notes.txt',
                 '__MACOSX/x/a.jpg', '.git/a.jpg', 'ä ö/ü.webp'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert list_photos(tmp_path) == ['b.JPG', 'x/a.jpg', 'x/y/deep.png', 'ä ö/ü.webp']


def test_listing_follows_links_and_ends_in_a_loop(tmp_path):
    (tmp_path / 'disk').mkdir()
    (tmp_path / 'disk/a.jpg').touch()
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data/linked').symlink_to(tmp_path / 'disk')
    (tmp_path / 'disk/up').symlink_to(tmp_path / 'data')
    assert list_photos(tmp_path / 'data') == ['linked/a.jpg']


def test_refusals_name_the_folder_and_the_remedy(tmp_path):
    with pytest.raises(RequestError, match='nowhere.*download_landscapes.sh.*--demo'):
        list_photos(tmp_path / 'nowhere')
    with pytest.raises(RequestError, match='no photos in'):
        list_photos(tmp_path)
    (tmp_path / 'a.jpg').touch()
    with pytest.raises(RequestError, match='a.jpg is a file'):
        list_photos(tmp_path / 'a.jpg')


# ---------------------------------------------------------------------------- the course's loader

def course_transforms(size):
    color = transforms.Compose([transforms.Resize((size, size)), transforms.ToTensor()])
    gray = transforms.Compose([transforms.Resize((size, size)), transforms.Grayscale(),
                               transforms.ToTensor(), transforms.Normalize([0.5], [0.5])])
    return gray, color


def test_the_course_s_loader(drawings):
    loader = get_colorized_dataset_loader(drawings, batch_size=4)
    x, y = next(iter(loader))
    assert x.shape == (4, 1, 224, 224) and y.shape == (4, 3, 224, 224)
    assert x.dtype == y.dtype == torch.float32
    gray, color = course_transforms(224)
    photo = Image.open(drawings / list_photos(drawings)[2]).convert('RGB')
    assert torch.equal(x[2], gray(photo)) and torch.equal(y[2], color(photo))


def test_image_folder_without_class_folders(tmp_path):
    stripes().save(tmp_path / 'a.png')
    dataset = ImageFolderGrayColor(tmp_path, target_transform=transforms.ToTensor())
    photo, target = dataset[0]
    assert len(dataset) == 1 and photo.size == (40, 24) and target.shape == (3, 24, 40)
