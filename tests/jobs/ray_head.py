"""A Ray head with the Jobs API on this machine, and `ray job` commands against it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support import runs

ROOT = Path(__file__).parents[2]
RAY = [sys.executable, "-c", "from ray.scripts.scripts import main; main()"]


@dataclass(frozen=True)
class Submitted:
    """How `ray job submit` ended: its exit code, what it printed, the job's name."""

    code: int
    text: str
    job: str


def environment(token: str) -> dict[str, str]:
    """The variables of a shell on a cluster that asks for a token; `python` is the tests' own."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env.pop("PYTHONPATH", None)
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    return env | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "NO_COLOR": "1"}


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


class Head:
    """A running head: `ray start --head --block`, which `stop` ends with all that it started."""

    def __init__(self) -> None:
        self.env = environment(secrets.token_hex(32))
        # AF_UNIX paths have 107 characters: pytest's folders are too deep.
        self.folder = Path(tempfile.mkdtemp(prefix="mill", dir="/tmp"))
        self._log = self.folder / "head.log"
        self.url = f"http://127.0.0.1:{free_port()}"
        self.env["RAY_API_SERVER_ADDRESS"] = self.url
        ports = [f"--port={free_port()}", f"--dashboard-port={self.url.rsplit(':', 1)[1]}"]
        ports.append(f"--dashboard-agent-listen-port={free_port()}")
        options = ["--num-cpus=2", "--object-store-memory=100000000", "--disable-usage-stats"]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [*RAY, "start", "--head", "--block", *ports, *options, f"--temp-dir={self.folder}"],
                env=self.env,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        with contextlib.ExitStack() as undo:
            undo.callback(self.stop)
            runs.until(self._listening, "the Jobs API listens")
            undo.pop_all()

    def _listening(self) -> bool:
        assert self._process.poll() is None, self._log.read_text()
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", int(self.url.rsplit(":", 1)[1])), 1).close()
            return True
        return False

    def stop(self) -> None:
        started = list(runs.descendants(self._process.pid))
        self._process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(20)
        for pid in [self._process.pid, *started]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def job(self, *args: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        """`ray job ...`, as typed in a shell of the submitter."""
        return subprocess.run(
            [*RAY, "job", *map(str, args)],
            check=False,
            env=self.env,
            cwd=cwd,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=150,
        )

    def submit(self, folder: Path, *entrypoint: object, wait: bool = True) -> Submitted:
        """The documented command, in `folder`; `entrypoint` is what stands after the dashes."""
        options = ["--working-dir", ".", "--runtime-env", "jobs/runtime_env.yaml"]
        options += [] if wait else ["--no-wait"]
        for _ in range(20):  # a head that has just started says so until its agent is there
            done = self.job("submit", *options, "--", *entrypoint, cwd=folder)
            if "try again later" not in done.stdout:
                break
            time.sleep(1)
        name = re.search(r"Job '(raysubmit_\w+)' submitted", done.stdout)
        assert name, done.stdout
        return Submitted(done.returncode, done.stdout, name[1])

    def info(self, job: str) -> dict[str, Any]:
        """What the Jobs API says of a job."""
        listed = subprocess.run(
            [sys.executable, "-c", _INFO, self.url, job],
            env=self.env,
            check=True,
            capture_output=True,
            text=True,
        )
        parsed: dict[str, Any] = json.loads(listed.stdout)
        return parsed

    def unpacked(self) -> list[Path]:
        """The folders that jobs' working directories were unpacked into on this node."""
        session = (self.folder / "session_latest").resolve()
        folder = session / "runtime_resources/working_dir_files"
        return [path for path in folder.glob("_ray_pkg_*") if path.is_dir()]


_INFO = """
import json, sys
from ray.job_submission import JobSubmissionClient
info = JobSubmissionClient(sys.argv[1]).get_job_info(sys.argv[2])
print(json.dumps({name: str(value) for name, value in vars(info).items()}))
"""


@contextlib.contextmanager
def started_head() -> Iterator[Head]:
    head = Head()
    try:
        yield head
    finally:
        head.stop()
