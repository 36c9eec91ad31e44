"""Colorize photos in a browser, on this machine alone: http://localhost:7860

    pip install -r requirements-app.txt
    python app.py                            # with the weights in unet.pth
    python app.py --weights my.pth --port 7861

No photo is kept, or sent elsewhere.
"""

import signal

if __name__ == '__main__' and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback

import importlib.util
import os
import secrets
import shutil
import sys
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace

import torch

from demo_landscapes import draw_landscapes
from predict import (
    apply_chroma,
    choose_format,
    default_size,
    draw_result,
    encode,
    predict_chroma,
    read_exif,
    split_alpha,
)
from unet import UNet
from utils import cli
from utils.checkpoint import load_weights
from utils.cli import UsageError
from utils.device import choose_device
from utils.parallel import Stopped, stop_signals
from utils.photos import open_photo, to_rgb, turn_upright

MAX_UPLOAD = '200mb'
PREVIEW = 1600  # pixels of the longer side of what the page shows
# nothing that the page refers to is fetched from elsewhere: no fonts, no scripts, no statistics
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"


def parse_args(argv):
    parser = cli.ArgumentParser(prog='app.py', description=__doc__)
    add = parser.add_argument
    add('--weights', default='unet.pth', help='what colorize.py saved [%(default)s]')
    add(
        '--port',
        type=cli.number(int, lambda n: 0 < n < 65536, 'a port, 1 to 65535'),
        default=7860,
        help='[%(default)s]',
    )
    add('--device', choices=('auto', 'cuda', 'mps', 'cpu'), default='auto', help='[%(default)s]')
    return parser.parse_args(argv)


# ---------------------------------------------------------------------------- one visitor's photo


class Upload:
    """A photo that someone dropped on the page, and its results in a `folder` of its own.

    Raises OSError if the file at `path` is no photo.
    """

    def __init__(self, path, folder):
        with open_photo(path) as photo:
            turn_upright(photo)
            self.exif = read_exif(photo)
        self.photo, self.folder, self.chroma = photo, folder, {}
        self.format, self.name = choose_format(photo, Path(path.name))
        is_clear = photo.has_transparency_data
        self.preview = photo.convert('RGBA') if is_clear else to_rgb(photo).copy()
        self.preview.thumbnail((PREVIEW, PREVIEW))
        self.folder.mkdir(parents=True)

    def colorize(self, net, photo, size, saturation):
        """As predict.colorize, for the photo or its preview; each size is predicted once."""
        if size not in self.chroma:
            torch.set_num_threads(1)  # in this thread, as in predict.py: the same to the last bit
            whole = split_alpha(self.photo, self.format)[0]
            self.chroma[size] = predict_chroma(net, to_rgb(whole).convert('L'), size)
        return apply_chroma(to_rgb(photo).convert('L'), self.chroma[size], saturation)

    def draw(self, net, photo, size, saturation):
        return draw_result(
            photo, self.format, lambda part: self.colorize(net, part, size, saturation)
        )

    def show(self, net, size, saturation):
        """Return the paths of two pictures for the page: gray and colorized."""
        gray = to_rgb(self.preview).convert('L')
        color = to_rgb(self.draw(net, self.preview, size, saturation))
        names = self.new_path('gray.jpg'), self.new_path('color.jpg')
        for picture, name in zip((gray, color), names, strict=True):
            picture.info = {}
            picture.save(name, quality=95)
        return names

    def save(self, net, size, saturation):
        """Return the path of the result, in full resolution: the file that predict.py writes."""
        path = self.new_path(self.name)
        result = self.draw(net, self.photo, size, saturation)
        path.write_bytes(encode(result, self.photo, self.format, self.exif))
        return path

    def new_path(self, name):
        """Return a path in a new folder: browsers keep what they have seen under a name."""
        folder = self.folder / secrets.token_hex(8)
        folder.mkdir()
        return folder / name


class Visitors:
    """The photo of everyone who has the page open, by the key of the browser's window."""

    def __init__(self, net, folder):
        self.net, self.folder, self.uploads = net, folder, {}
        self.lock = threading.Lock()  # for one network, one photo at a time

    def open(self, path, key):
        """Take a photo in place of this visitor's earlier one. Raises OSError if it is none."""
        self.close(key)
        with self.lock:
            self.uploads[key] = Upload(path, self.folder / secrets.token_hex(16))

    def show(self, size, saturation, key):
        with self.lock:
            return self.uploads[key].show(self.net, size, saturation)

    def save(self, size, saturation, key):
        with self.lock:
            return self.uploads[key].save(self.net, size, saturation)

    def close(self, key):
        """Forget the visitor's photo, and remove all files that were made of it."""
        with self.lock:
            if upload := self.uploads.pop(key, None):
                shutil.rmtree(upload.folder, ignore_errors=True)


# ---------------------------------------------------------------------------- the page


def build_page(visitors, examples):
    """Return the page, as gradio.Blocks. `examples` are paths of pictures to try."""
    import gradio as gr

    with gr.Blocks(title='Colorize', analytics_enabled=False) as page:
        gr.Markdown(
            '# Colorize a photo\nDrop a photo, and drag the line between gray and color. '
            'Nothing leaves this machine, and nothing is kept when you close the page.'
        )
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                parts = add_controls(gr, default_size(visitors.net))
            with gr.Column(scale=3):
                parts.slider = gr.ImageSlider(
                    label='Gray and color',
                    interactive=False,
                    max_height=640,
                    elem_id='result',
                    buttons=['fullscreen'],
                )
        gr.Markdown('Or try a drawing:')
        parts.gallery = gr.Gallery(
            [str(path) for path in examples],
            show_label=False,
            columns=7,
            height=150,
            allow_preview=False,
            elem_id='examples',
            interactive=False,
            buttons=[],
        )
        connect(gr, visitors, examples, parts)

        def leave(request: gr.Request):
            visitors.close(request.session_hash)

        page.unload(leave)
    return page


def add_controls(gr, size):
    """Add what a visitor sets, in the column that is open: return a namespace of its parts."""
    return SimpleNamespace(
        file=gr.File(label='Photo', height=140, elem_id='photo'),
        message=gr.Markdown(elem_id='message'),
        saturation=gr.Slider(
            0,
            2,
            1,
            step=0.05,
            label='Saturation',
            elem_id='saturation',
            info='0 is gray, 1 as predicted',
        ),
        size=gr.Slider(
            min(32, size),
            max(512, size),
            size,
            step=8,
            label='Size',
            elem_id='size',
            info='pixels that the network sees: the shorter side',
        ),
        download=gr.DownloadButton('Download the result', interactive=False, elem_id='download'),
    )


def connect(gr, visitors, examples, parts):
    """Tell the `parts` of the page what to do."""
    settings = [parts.size, parts.saturation]
    shown = [parts.slider, parts.download]
    told = [*shown, parts.message]
    wait = gr.update(interactive=False)  # until the file is there

    def take(path, size, saturation, key):
        try:
            visitors.open(path, key)
        except OSError as error:
            return None, wait, f'**{path.name}: {error}.** Drop a photo, such as a JPEG or PNG.'
        return visitors.show(size, saturation, key), wait, path.name

    def drop(path, size, saturation, request: gr.Request):
        try:
            # the empty field takes the next photo
            return *take(Path(path), size, saturation, request.session_hash), None
        finally:
            os.unlink(path)  # the page has all that it needs

    def try_example(size, saturation, request: gr.Request, event: gr.SelectData):
        return take(examples[event.index], size, saturation, request.session_hash)

    def show(size, saturation, request: gr.Request):
        if request.session_hash not in visitors.uploads:
            return None, wait
        return visitors.show(size, saturation, request.session_hash), wait

    def save(size, saturation, request: gr.Request):
        if request.session_hash not in visitors.uploads:
            return wait
        path = visitors.save(size, saturation, request.session_hash)
        return gr.update(value=path, interactive=True)

    quick = dict(api_visibility='private', trigger_mode='always_last', show_progress='hidden')
    for event in (
        parts.file.upload(drop, [parts.file, *settings], [*told, parts.file], **quick),
        parts.gallery.select(try_example, settings, told, **quick),
        *(part.change(show, settings, shown, **quick) for part in settings),
    ):
        event.then(save, settings, parts.download, api_visibility='private', show_progress='hidden')


class OnlyFromHere:
    """ASGI middleware: tell the browser to fetch nothing from elsewhere."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        async def send_with_policy(message):
            if message['type'] == 'http.response.start':
                message['headers'] = [
                    *message.get('headers', []),
                    (b'content-security-policy', POLICY.encode()),
                ]
            await send(message)

        await self.app(scope, receive, send_with_policy)


# ---------------------------------------------------------------------------- the server


def serve(net, port, folder):
    """Serve the page on localhost, with its files in `folder`, until a signal raises Stopped.

    Raises UsageError if the port is taken.
    """
    os.environ.update(
        GRADIO_TEMP_DIR=str(folder),
        GRADIO_ANALYTICS_ENABLED='False',
        HF_HUB_DISABLE_TELEMETRY='1',
        HF_HUB_OFFLINE='1',
    )
    import gradio as gr
    from starlette.middleware import Middleware

    draw_landscapes(folder / 'drawings', per_kind=1)
    page = build_page(
        Visitors(net, folder / 'visitors'), sorted((folder / 'drawings').rglob('*.jpg'))
    )
    try:
        page.launch(
            server_name='127.0.0.1',
            server_port=port,
            share=False,
            quiet=True,
            ssr_mode=False,
            prevent_thread_lock=True,
            inbrowser=False,
            max_file_size=MAX_UPLOAD,
            footer_links=[],
            theme=gr.themes.Default(font=['system-ui', 'sans-serif'], font_mono=['monospace']),
            app_kwargs=dict(middleware=[Middleware(OnlyFromHere)]),
        )
    except OSError as error:
        raise UsageError(f'--port {port} is taken or not allowed; give another') from error
    print(f'Open http://localhost:{port} in a browser; Ctrl-C ends it.', flush=True)
    try:
        threading.Event().wait()
    finally:
        page.close(verbose=False)


def run(args):
    """Load the weights and serve the page. Raises UsageError, Stopped."""
    net = load_weights(UNet(), args.weights)
    if not importlib.util.find_spec('gradio'):
        raise UsageError('the page needs Gradio: pip install -r requirements-app.txt')
    net.to(choose_device(args.device), memory_format=torch.channels_last)
    torch.backends.cudnn.benchmark = False  # hardly two photos have the same shape
    with tempfile.TemporaryDirectory(prefix='colorize_', ignore_cleanup_errors=True) as folder:
        serve(net, args.port, Path(folder).resolve())


def main(argv=None):
    args = parse_args(argv)
    try:
        with stop_signals():
            run(args)
    except UsageError as error:
        print(f'app.py: {error}', file=sys.stderr)
        return 2
    except OSError as error:
        print(f'app.py: {error}', file=sys.stderr)
        return 1
    except Stopped as stop:
        return 128 + stop.signum


if __name__ == '__main__':
    sys.exit(main())
