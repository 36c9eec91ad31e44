"""Many photos at once: threads, the memory that they share, and the signals that stop them."""

import contextlib
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from tqdm import tqdm


def run_in_threads(function, groups, num_workers, description):
    """Call `function` for each item of the lists `groups`: of one list, one after the other.

    Pillow and torch release the interpreter's lock, so threads are enough. In each of them torch
    has one thread: results are the same, to the last bit, for any number of workers. If Stopped is
    raised meanwhile, what is being done is finished, and nothing more is begun.
    """
    stopped = threading.Event()

    def run_group(group):
        for item in group:
            if not stopped.is_set():
                function(item)

    pool = ThreadPoolExecutor(max(1, num_workers), initializer=torch.set_num_threads, initargs=(1,))
    try:
        futures = [pool.submit(run_group, group) for group in groups]
        with tqdm(
            desc=description, total=sum(map(len, groups)), unit=' photos', leave=False, disable=None
        ) as bar:
            for future, group in zip(futures, groups, strict=True):
                future.result()
                bar.update(len(group))
    finally:
        stopped.set()
        pool.shutdown(cancel_futures=True)


class Memory:
    """Memory that threads share, in bytes: each reserves what it needs."""

    def __init__(self, size):
        self.size = self.free = size
        self.changed = threading.Condition()

    @contextlib.contextmanager
    def reserve(self, size):
        """Wait until so much is free, and take it; where `size` is more than there is, take all."""
        size = min(size, self.size)
        with self.changed:
            self.changed.wait_for(lambda: size <= self.free)
            self.free -= size
        try:
            yield
        finally:
            with self.changed:
                self.free += size
                self.changed.notify_all()


class Stopped(BaseException):
    """The program was asked to stop, by the signal `signum`."""

    def __init__(self, signum):
        self.signum = signum


@contextlib.contextmanager
def stop_signals():
    """Raise Stopped in the main thread at Ctrl-C, SIGTERM or a hang-up; the second time, end."""

    def stop(signum, _):
        for number in before:
            signal.signal(number, signal.SIG_DFL)
        raise Stopped(signum)

    signums = [
        getattr(signal, name) for name in ('SIGINT', 'SIGTERM', 'SIGHUP') if hasattr(signal, name)
    ]
    # a signal that nohup or a shell's '&' made the program ignore stays ignored
    before = {
        signum: signal.getsignal(signum)
        for signum in signums
        if signal.getsignal(signum) is not signal.SIG_IGN
    }
    for signum in before:
        signal.signal(signum, stop)
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
