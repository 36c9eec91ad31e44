"""Ctrl-C, SIGTERM and hang-ups: one class for every program."""

import contextlib
import os
import signal


def end_quietly():
    """Let Ctrl-C end the program at once, without a traceback: for the seconds of its imports."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


class Stopped(Exception):
    """A run was asked to stop, and every finished step is accounted for."""


class Stop:
    """What a program does when Ctrl-C, SIGTERM or SIGHUP asks it to stop.

    Inside `with stop:`, the first signal is only noted as `stop.signum`, for a loop to see when its
    step is done. Outside, it ends the program by SystemExit, which removes temporary files. A
    second one ends it at once. The exit code is 128 + signum: 130, 143 or 129.
    """

    def __init__(self):
        self.signum = 0  # of the signal that asked to stop; 0: go on
        self.is_noted_only = False
        for name in 'SIGINT', 'SIGTERM', 'SIGHUP':
            signum = getattr(signal, name, None)
            # a signal that nohup or a shell's '&' made the program ignore stays ignored
            if signum and signal.getsignal(signum) is not signal.SIG_IGN:
                signal.signal(signum, self.receive)

    def __enter__(self):
        self.is_noted_only = True
        return self

    def __exit__(self, *_):
        self.is_noted_only = False

    def receive(self, signum, _):
        """Handle a signal."""
        if self.signum:
            os._exit(128 + signum)
        self.signum = signum
        if not self.is_noted_only:
            raise SystemExit(128 + signum)
        # not print, which the signal may have interrupted; it fails if the terminal is gone
        with contextlib.suppress(OSError):
            os.write(2, b'\nstopping after this step; once more to stop at once\n')
