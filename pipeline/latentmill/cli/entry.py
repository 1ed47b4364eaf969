"""Entry point of the `latentmill` command: sets signal handlers before importing the rest.

Only the standard library is imported at the top, so that Ctrl-C works during slow imports.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from typing import NoReturn

INTERRUPTED_EXIT_CODE = 130
RESUMED = ("encode", "add", "export", "pull", "push", "sync")
"""The commands that continue where an interrupted one has ended."""
RESUMING_OPTIONS = {"decode": "--skip-existing", "select": "--copy", "merge": "--copy"}
"""The commands that do so only with an option."""
_interrupted = False


def main() -> NoReturn:
    """Run the command line; print a LatentmillError as one line and exit with its code."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # ignored under `nohup ... &`
        signal.signal(signal.SIGINT, _stop_at_once)
    signal.signal(signal.SIGTERM, _stop_at_once)
    from latentmill.cli.app import app
    from latentmill.cli.usage import explain
    from latentmill.errors import HeadGoneError, LatentmillError
    from latentmill.text.printing import printable
    from latentmill.text.redact import redact_text

    try:
        code = app(prog_name="latentmill", standalone_mode=False)
        if code == INTERRUPTED_EXIT_CODE:  # click's result after a KeyboardInterrupt
            _exit_interrupted()
    except LatentmillError as error:
        if _interrupted:
            _exit_interrupted()
        print(f"latentmill: {printable(str(error))}", file=sys.stderr, flush=True)  # noqa: T201
        if isinstance(error, HeadGoneError):  # Ray's shutdown would hang, then exit with 1
            os._exit(error.exit_code)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, Exception) as error:  # noqa: BLE001  a bug's traceback is redacted
        # A KeyboardInterrupt in an import or a C extension may be raised as another exception.
        if _interrupted or isinstance(error, KeyboardInterrupt) or type(error).__name__ == "Abort":
            _exit_interrupted()
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # wrong usage
            if text := explain(error):
                print(f"latentmill: {text}", file=sys.stderr)  # noqa: T201
            sys.exit(error.exit_code)
        print(redact_text(traceback.format_exc()), file=sys.stderr, end="")  # noqa: T201
        sys.exit(1)
    sys.exit(code if isinstance(code, int) else 0)


def interrupts_raise() -> None:
    """Make signals raise KeyboardInterrupt from now on, so that a command can clean up."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _raise_interrupt)


def interrupted() -> bool:
    """Whether a signal has come, also if its KeyboardInterrupt was raised as another exception."""
    return _interrupted


def interrupts_stop() -> None:
    """Make signals end the process at once: for a server, which has nothing to clean up."""
    if _interrupted:  # an import or a C extension suppressed the KeyboardInterrupt
        _exit_interrupted()
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop_server)


def _stop_server(signum: int, frame: object) -> NoReturn:
    os.write(2, b"latentmill: stopped\n")
    os._exit(INTERRUPTED_EXIT_CODE)


def _raise_interrupt(signum: int, frame: object) -> NoReturn:
    global _interrupted  # noqa: PLW0603  a signal handler can only set a global
    _interrupted = True
    raise KeyboardInterrupt


def _stop_at_once(signum: int, frame: object) -> NoReturn:
    """Exit immediately: nothing has been written yet, and an exception could be swallowed."""
    os.write(2, f"{_interruption()}\n".encode())
    os._exit(INTERRUPTED_EXIT_CODE)


def _exit_interrupted() -> NoReturn:
    print(_interruption(), file=sys.stderr)  # noqa: T201
    sys.exit(INTERRUPTED_EXIT_CODE)


def _interruption() -> str:
    command = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    if command in RESUMED or RESUMING_OPTIONS.get(command) in sys.argv:
        return "latentmill: interrupted; run the same command again to resume"
    if command == "decode" and "--overwrite" not in sys.argv:
        return "latentmill: interrupted; add --skip-existing to decode only the rest"
    return "latentmill: interrupted"
