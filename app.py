"""Colorize photos in a browser, on this machine alone: http://localhost:7860

    pip install -r requirements-app.txt
    python app.py                            # with the weights in unet.pth
    python app.py --weights my.pth --port 7861

No photo is kept, or sent elsewhere.
"""

import os

from utils.stop import Stop, end_quietly

if __name__ == '__main__':
    end_quietly()  # Ctrl-C during the imports below needs no traceback
    os.environ.update(GRADIO_ANALYTICS_ENABLED='False', HF_HUB_OFFLINE='1')

import shutil
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path

import torch

try:
    import gradio as gr
    from starlette.middleware import Middleware
except ImportError:
    sys.exit('app.py: the page needs Gradio: pip install -r requirements-app.txt')

import predict
from demo_landscapes import draw_landscapes
from unet import UNet
from utils import cli
from utils.checkpoint import load_weights
from utils.cli import UsageError
from utils.device import choose_device
from utils.photos import open_photo, to_rgb, turn_upright

PREVIEW = 1600  # pixels of the longer side of what the page shows
# nothing that the page refers to is fetched from elsewhere: no fonts, no scripts, no statistics
POLICY = b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"


def parse_args(argv):
    parser = cli.ArgumentParser(prog='app.py', description=__doc__)
    parser.add_argument('--weights', default='unet.pth', help='what colorize.py saved')
    parser.add_argument('--port', type=cli.port, default=7860, help="the page's, on this machine")
    parser.add_device()
    return parser.parse_args(argv)


# ---------------------------------------------------------------------------- one visitor's photo


class Upload:
    """A photo that someone dropped on the page, and its results in a `folder` of its own."""

    def __init__(self, path, net, folder):
        """Read the photo in the file `path`. Raises OSError if there is none."""
        with open_photo(path) as photo:
            turn_upright(photo)
            self.exif = predict.read_exif(photo)
        self.photo, self.net, self.folder = photo, net, folder
        self.name = predict.result_path(Path(path.name))
        self.format = predict.format_of(self.name)
        self.chroma = {}  # by the size that the network saw: each is predicted once
        self.result = None

    def show(self, size, saturation):
        """Colorize the photo; return the paths of two pictures for the page: gray and color."""
        torch.set_num_threads(1)  # in this thread, as in predict.py: the same to the last bit

        def colorize(photo):
            gray = to_rgb(photo).convert('L')
            if size not in self.chroma:
                self.chroma[size] = predict.predict_chroma(self.net, gray, size)
            return predict.apply_chroma(gray, self.chroma[size], saturation)

        self.result = predict.draw_result(self.photo, self.format, colorize)
        gray = to_rgb(self.photo).convert('L')
        return self.preview(gray, 'gray.jpg'), self.preview(to_rgb(self.result), 'color.jpg')

    def preview(self, picture, name):
        """Return the path of a picture that is small enough for the page."""
        path, small = self.new_path(name), picture.copy()
        small.thumbnail((PREVIEW, PREVIEW))
        small.save(path, quality=95)
        return path

    def save(self):
        """Return the path of what show() made, in full size: the file that predict.py writes."""
        path = self.new_path(self.name)
        path.write_bytes(predict.encode(self.result, self.photo, self.format, self.exif))
        return path

    def new_path(self, name):
        """Return a path in a new folder: browsers keep what they have seen under a name."""
        folder = self.folder / uuid.uuid4().hex
        folder.mkdir(parents=True)
        return folder / name


# ---------------------------------------------------------------------------- the page


class Page:
    """What visitors see, and their uploads, by the keys of the browsers' windows.

    All files are in `folder`: drawings to try, and what is made of the uploads.
    """

    def __init__(self, net, folder):
        self.net, self.folder, self.uploads = net, folder, {}
        draw_landscapes(folder / 'drawings', per_kind=1)
        self.examples = sorted(map(str, (folder / 'drawings').rglob('*.jpg')))
        self.lock = threading.Lock()  # one photo at a time, and none after its page was closed

    def build(self):
        """Return the page, as gradio.Blocks."""
        with gr.Blocks(title='Colorize', analytics_enabled=False) as blocks:
            gr.Markdown(
                '# Colorize a photo\nDrop a photo, and drag the line between gray and color. '
                'Nothing leaves this machine, and nothing is kept when you close the page.'
            )
            with gr.Row():
                with gr.Column(scale=1, min_width=280):
                    file = gr.File(label='Photo', height=140, elem_id='photo')
                    message = gr.Markdown(elem_id='message')
                    sliders = add_sliders(predict.default_size(self.net))
                    button = gr.DownloadButton('Download', interactive=False, elem_id='download')
                with gr.Column(scale=3):
                    still = dict(interactive=False, buttons=['fullscreen'], max_height=640)
                    pictures = gr.ImageSlider(label='Gray and color', elem_id='result', **still)
            gr.Markdown('Or try a drawing:')
            still = dict(interactive=False, buttons=[], allow_preview=False, show_label=False)
            gallery = gr.Gallery(self.examples, columns=7, height=150, elem_id='examples', **still)
            blocks.unload(self.leave)
            shown = [pictures, button]
            quiet = dict(show_progress='hidden', api_visibility='private')
            quick = quiet | dict(trigger_mode='always_last')
            for event in (
                file.upload(self.drop, [file, *sliders], [*shown, message, file], **quick),
                gallery.select(self.try_example, sliders, [*shown, message], **quick),
                *(slider.change(self.show, sliders, shown, **quick) for slider in sliders),
            ):
                event.then(self.save, None, button, **quiet)
        return blocks

    def drop(self, path, size, saturation, request: gr.Request):
        """Take a visitor's photo: return what the page shows of it, and an empty field."""
        try:
            return *self.take(Path(path), request, size, saturation), None
        finally:
            os.unlink(path)  # the page has all that it needs

    def try_example(self, size, saturation, request: gr.Request, event: gr.SelectData):
        """Take the drawing that was clicked: return what the page shows of it."""
        return self.take(Path(self.examples[event.index]), request, size, saturation)

    def take(self, path, request, size, saturation):
        """Put a photo in place of the visitor's earlier one."""
        self.leave(request)
        try:
            with self.lock:
                upload = Upload(path, self.net, self.folder / uuid.uuid4().hex)
                self.uploads[request.session_hash] = upload
        except OSError as error:
            line = f'**{path.name}: {error}.** Drop a photo, such as a JPEG or PNG.'
            return None, gr.update(interactive=False), line
        return *self.show(size, saturation, request), path.name

    def show(self, size, saturation, request: gr.Request):
        """Return gray and color, and that their file is not there yet."""
        with self.lock:
            upload = self.uploads.get(request.session_hash)
            return upload and upload.show(size, saturation), gr.update(interactive=False)

    def save(self, request: gr.Request):
        """Return the file of the result for the button."""
        with self.lock:
            upload = self.uploads.get(request.session_hash)
            if not upload or not upload.result:
                return gr.update(interactive=False)
            return gr.update(value=upload.save(), interactive=True)

    def leave(self, request: gr.Request):
        """Forget the visitor's photo, and remove all files that were made of it."""
        with self.lock:
            if upload := self.uploads.pop(request.session_hash, None):
                shutil.rmtree(upload.folder, ignore_errors=True)


def add_sliders(size):
    """Return the sliders for the size of what the network sees, at first `size`, and saturation."""
    info = 'pixels that the network sees: the shorter side'
    low, high = min(32, size), max(512, size)
    return [
        gr.Slider(low, high, size, step=8, label='Size', elem_id='size', info=info),
        gr.Slider(0, 2, 1, step=0.05, label='Saturation', elem_id='saturation', info='0 is gray'),
    ]


class OnlyFromHere:
    """ASGI middleware: tell the browser to fetch nothing from elsewhere."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        async def send_with_policy(message):
            if message['type'] == 'http.response.start':
                message['headers'] = [*message['headers'], (b'content-security-policy', POLICY)]
            await send(message)

        await self.app(scope, receive, send_with_policy)


# ---------------------------------------------------------------------------- the server


def serve(net, port, folder):
    """Serve the page on localhost, with its files in `folder`, until a signal ends the program.

    Raises UsageError if the port is taken.
    """
    os.environ['GRADIO_TEMP_DIR'] = str(folder)
    blocks = Page(net, folder).build()
    try:
        blocks.launch(
            server_name='127.0.0.1',
            server_port=port,
            quiet=True,
            prevent_thread_lock=True,
            max_file_size='200mb',
            footer_links=[],
            theme=gr.themes.Default(font=['system-ui', 'sans-serif'], font_mono=['monospace']),
            app_kwargs=dict(middleware=[Middleware(OnlyFromHere)]),
        )
    except OSError as error:
        raise UsageError(f'--port {port} is taken or not allowed; give another') from error
    print(f'Open http://localhost:{port} in a browser; Ctrl-C ends it.', flush=True)
    try:
        while True:
            time.sleep(1)
    finally:
        blocks.close(verbose=False)


def main(argv=None):
    args = parse_args(argv)
    Stop()  # a signal ends the program in order, without a traceback
    try:
        net = load_weights(UNet(), args.weights)
        net.to(choose_device(args.device), memory_format=torch.channels_last)
        torch.backends.cudnn.benchmark = False  # hardly two photos have the same shape
        with tempfile.TemporaryDirectory(prefix='colorize_', ignore_cleanup_errors=True) as folder:
            serve(net, args.port, Path(folder).resolve())
    except Exception as error:
        return cli.exit_code(error, 'app.py')


if __name__ == '__main__':
    sys.exit(main())
