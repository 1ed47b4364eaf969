"""What the tests share: small real recordings, the real recordings beside the repo, an S3."""

from __future__ import annotations

import functools
import gc
import itertools
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

from support.browser import chromium
from support.in_process import in_process
from support.recordings import write_corpus
from support.s3_server import s3_server

SHARED_AUDIO = Path(__file__).parents[2] / "shared" / "audio"

# Ray runs its workers at low priority. On a busy machine they would hardly run at all.
os.environ.setdefault("RAY_worker_niceness", "0")

# The fast tests try the same examples each time: nobody's change fails for another one's fault.
settings.register_profile("fast", deadline=None, max_examples=30, derandomize=True)
settings.register_profile("thorough", deadline=None, max_examples=150)


def pytest_configure(config: pytest.Config) -> None:
    """Properties are tried with more examples where the slow tests run."""
    slow = "slow" in config.option.markexpr.replace("not slow", "")
    if not config.getoption("--hypothesis-profile", default=None):
        settings.load_profile("thorough" if slow else "fast")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file stays in one process, and all files that use `ray_session` are in the same one."""
    from xdist.scheduler import LoadFileScheduling

    @functools.cache
    def uses_ray(path: str) -> bool:
        return "ray_session" in (config.rootpath / path).read_text()

    class OneRay(LoadFileScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            path = super()._split_scope(nodeid)
            return "ray" if uses_ray(path) else path

    return OneRay(config, log) if config.getoption("dist") == "loadfile" else None


def pytest_collection_finish() -> None:
    """What the imported modules hold stays, so later collections need not look at it."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.fixture(autouse=True, scope="session")
def _one_torch_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _no_disk_is_waited_for() -> Iterator[None]:
    """A file that was written is there for every process, and no power is cut in a test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


@pytest.fixture(autouse=True, scope="session")
def _interrupts_reach_children() -> None:
    """What a shell starts in the background ignores SIGINT, and its children inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared_audio() -> Path:
    """The folder of real recordings; a test that asks for it is skipped without them."""
    if not SHARED_AUDIO.is_dir():
        pytest.skip(f"needs the real recordings in {SHARED_AUDIO}")
    return SHARED_AUDIO


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small corpus of real files with two sidecars and a picture. Leave it unchanged."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def one_sentence() -> Callable[[BaseException], str]:
    """Checks that an error is one sentence, and returns its text."""

    def check(error: BaseException) -> str:
        text = str(error)
        assert text.endswith((".", "?")), text
        assert "\n" not in text
        assert ". " not in text
        return text

    return check


@pytest.fixture(scope="session")
def _s3_server() -> Iterator[str]:
    s3fs = pytest.importorskip("s3fs")
    pytest.importorskip("moto.server")
    with s3_server() as url, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", url)
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        s3fs.S3FileSystem.clear_instance_cache()
        yield url
        s3fs.S3FileSystem.clear_instance_cache()


_buckets = itertools.count()


@pytest.fixture
def s3_bucket(_s3_server: str) -> str:
    """The URL of a fresh bucket on an S3 of our own."""
    import fsspec

    name = f"mill-{next(_buckets)}"
    fsspec.filesystem("s3").mkdir(name)
    return f"s3://{name}"


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A headless Chromium for all tests of pages."""
    with chromium() as started:
        yield started


@pytest.fixture
def inline() -> Iterator[None]:
    """Runs of this test encode their units in this process, without Ray."""
    with in_process():
        yield


@pytest.fixture(scope="session")
def ray_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A Ray in this process, which runs use as it is and leave running.

    Gives the HF_HOME of its workers, which is empty and offline.
    """
    import ray

    from latentmill.engine.cluster import connect

    tests = Path(__file__).parent
    paths = [tests, tests / "support" / "deadly", tests.parent / "pipeline"]
    paths.append(os.environ.get("PYTHONPATH", ""))
    hf_home = tmp_path_factory.mktemp("hf_home")
    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:  # the workers inherit it, this process does not
            patch.setenv("PYTHONPATH", os.pathsep.join(str(path) for path in paths if str(path)))
            patch.setenv("HF_HOME", str(hf_home))
            patch.setenv("HF_HUB_OFFLINE", "1")
            patch.setenv("FULL_DISK", str(hf_home / "full"))  # see support/deadly
            patch.delenv("RAY_ADDRESS", raising=False)
            stack.enter_context(connect(None))
        yield hf_home
        assert ray.is_initialized(), "no run shuts down a Ray that it did not start"
