"""A run on a bucket that is paused right before a write, and wakes when another run has ended."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from latentmill.engine import lease as lease_module
from latentmill.engine.lease import LEASE_PATH, Timing
from latentmill.errors import LatentmillError
from latentmill.storage.guard import GuardedStorage
from latentmill.storage.storage import Storage
from latentmill.store.store import open_store
from latentmill.store.verify import verify
from support.in_process import encode, tone

QUICK = Timing(period=60.0, settle=0.0)

WRITES = {
    "items": ("plan/items", {}),
    "units": ("plan/units", {}),
    "plan": ("plan/plan.json", {}),
    "longer plan": ("plan/plan.json", {"extend": True}),
    "shard": ("shards/", {}),
    "commit": ("commits/", {}),
    "index": ("index.", {}),
    "card": ("README.md", {}),
    "first seal": ("dataset.json", {}),
    "next seal": ("dataset.json", {"extend": True}),
}


@pytest.fixture(autouse=True)
def quick(inline: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "Timing", lambda: QUICK)


class Pause:
    """Calls `meanwhile` once, before or after the check of a guarded write to `path`."""

    def __init__(self, path: str, when: str, meanwhile: Callable[[], None]) -> None:
        self.path, self.when, self.meanwhile = path, when, meanwhile
        self.happened = False

    def install(self, patch: pytest.MonkeyPatch) -> None:
        for name in ("write", "create", "publish"):
            patch.setattr(GuardedStorage, name, self._paused(getattr(GuardedStorage, name), name))

    def _paused(self, method: Callable[..., object], name: str) -> Callable[..., object]:
        def call(storage: GuardedStorage, *args: object) -> object:
            path = str(args[1] if name == "publish" else args[0])
            if self.happened or not path.startswith(self.path):
                return method(storage, *args)
            self.happened = True
            if self.when == BEFORE:
                self.meanwhile()
                return method(storage, *args)
            check = storage._check

            def check_then_pause() -> None:
                storage._check = check
                check()
                self.meanwhile()

            storage._check = check_then_pause
            return method(storage, *args)

        return call


BEFORE, AFTER = "before the check", "after the check"
QUICK_ONES = {("commit", AFTER), ("next seal", BEFORE)}


@pytest.mark.parametrize(
    ("path", "options", "when"),
    [
        pytest.param(
            *write,
            when,
            id=f"{name}, {when}",
            marks=() if (name, when) in QUICK_ONES else pytest.mark.slow,
        )
        for name, write in WRITES.items()
        for when in (BEFORE, AFTER)
    ],
)
def test_it_changes_nothing_of_the_other_run(
    tmp_path: Path,
    s3_bucket: str,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    options: dict[str, bool],
    when: str,
) -> None:
    """The other run has found one more file, so that plan, index and seal are not the same."""
    songs, store = tmp_path / "songs", f"{s3_bucket}/latents"
    tone(songs / "0.wav", 3000)
    if options:
        encode(songs, store)
        tone(songs / "1.wav", 3000)
    storage = Storage(store)

    def other_run() -> None:
        storage.delete(LEASE_PATH)  # as if it had been dead for a minute
        tone(songs / "2.wav", 3000)
        encode(songs, store, extend=True)

    pause = Pause(path, when, other_run)
    with monkeypatch.context() as patch, pytest.raises(LatentmillError):
        pause.install(patch)
        encode(songs, store, **options)
    assert pause.happened
    wanted = ["0", "1", "2"] if options else ["0", "2"]
    opened = open_store(store)
    assert list(opened.keys()) == wanted
    assert opened.complete
    encode(songs, store, extend=True)  # whatever the paused run left in nobody's way
    opened = open_store(store)
    assert verify(opened).faults == []
    assert [record.key for record in opened] == wanted
