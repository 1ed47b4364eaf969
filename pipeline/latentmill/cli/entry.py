"""Entry point of the `latentmill` command: signals first, then everything else.

Only the standard library is imported at the top: Ctrl-C must work while the rest is imported.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from typing import NoReturn

INTERRUPTED_EXIT_CODE = 130
_interrupted = False


def main() -> NoReturn:
    """Run the command line; an error of ours becomes one sentence and its exit code."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # ignored: started by `nohup ... &`
        signal.signal(signal.SIGINT, _stop_at_once)
    signal.signal(signal.SIGTERM, _stop_at_once)
    from latentmill.cli.app import app
    from latentmill.errors import HeadGoneError, LatentmillError
    from latentmill.text.printing import printable, printable_lines
    from latentmill.text.redact import redact_text

    try:
        code = app(prog_name="latentmill", standalone_mode=False)
        if code == INTERRUPTED_EXIT_CODE:  # click's result after a KeyboardInterrupt
            _exit_interrupted()
    except LatentmillError as error:
        if _interrupted:
            _exit_interrupted()
        print(f"latentmill: {printable(str(error))}", file=sys.stderr, flush=True)  # noqa: T201
        if isinstance(error, HeadGoneError):  # Ray would wait for it, and end the process with 1
            os._exit(error.exit_code)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, Exception) as error:  # noqa: BLE001  a bug's traceback is redacted
        # A KeyboardInterrupt inside an import or a C extension may come out as another exception.
        if _interrupted or isinstance(error, KeyboardInterrupt) or type(error).__name__ == "Abort":
            _exit_interrupted()
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # wrong usage
            if message := error.format_message():
                text = printable_lines(redact_text(message))
                print(f"latentmill: {text}", file=sys.stderr)  # noqa: T201
            sys.exit(error.exit_code)
        print(redact_text(traceback.format_exc()), file=sys.stderr, end="")  # noqa: T201
        sys.exit(1)
    sys.exit(code if isinstance(code, int) else 0)


def interrupts_raise() -> None:
    """From now on a signal raises KeyboardInterrupt: there is something to clean up."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _raise_interrupt)


def _raise_interrupt(signum: int, frame: object) -> NoReturn:
    global _interrupted  # noqa: PLW0603  a signal handler has no other place
    _interrupted = True
    raise KeyboardInterrupt


def _stop_at_once(signum: int, frame: object) -> NoReturn:
    """End the process where nothing has been written yet: no exception can get lost."""
    os.write(2, b"latentmill: interrupted; the same command resumes\n")
    os._exit(INTERRUPTED_EXIT_CODE)


def _exit_interrupted() -> NoReturn:
    print("latentmill: interrupted; the same command resumes", file=sys.stderr)  # noqa: T201
    sys.exit(INTERRUPTED_EXIT_CODE)
