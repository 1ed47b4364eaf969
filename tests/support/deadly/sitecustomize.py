"""On PYTHONPATH: makes a decoder of this process crash, hang, exit or be slow at certain files.

Python imports a module of this name when it starts, so that it reaches workers and their children.
The sample rate of a file, which no other test uses, selects what happens. While the file FULL_DISK
exists, this process has no space for recordings that are not opened in place.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import time

import numpy as np
import soundfile

SEGFAULT, OUT_OF_MEMORY, HANG, EXIT, LONG = 22051, 22052, 22053, 22054, 22055

_open = soundfile.SoundFile.__init__


def _deadly(self: soundfile.SoundFile, *args: object, **kwargs: object) -> None:
    _open(self, *args, **kwargs)
    if self.samplerate == SEGFAULT:
        ctypes.string_at(0)
    if self.samplerate == OUT_OF_MEMORY:
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(10)
    if self.samplerate == HANG:
        time.sleep(3600)
    if self.samplerate == EXIT:
        os._exit(3)
    if self.samplerate == LONG:  # 40 ms for each 5,000 samples
        read = self.read

        def slowly(out: np.ndarray) -> np.ndarray:
            time.sleep(0.04)
            return read(out=out[:5000])

        self.read = slowly


soundfile.SoundFile.__init__ = _deadly

if "FULL_DISK" in os.environ and hasattr(os, "memfd_create"):
    _memfd_create = os.memfd_create

    def _full(*args: object) -> int:
        if os.path.exists(os.environ["FULL_DISK"]):  # noqa: PTH110  imported by every process
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return _memfd_create(*args)

    os.memfd_create = _full
