"""Where weights come from: the hub at a revision, its cache, a folder, a file."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from latentmill.errors import ModelError
from latentmill.models.hub import Repo, one_at_a_time
from latentmill.models.registry import resolve
from latentmill.models.weights import find, find_again, parse_repo, read_state
from support.hub import serve, serving
from support.linear_cae_weights import HF_REPO, use_cache
from support.tiny_models import write_trained

PIPELINE = Path(__file__).parents[2] / "pipeline"
FILES = {"config": ["config.json"], "weights": ["model.safetensors", "pytorch_model.bin"]}
COMMIT = "ab" * 20


@pytest.fixture
def folder(tiny_repos: Path, tmp_path: Path) -> Path:
    """A copy of a repository that a test may spoil."""
    return Path(shutil.copytree(tiny_repos / "dac-44k", tmp_path / "dac"))


@pytest.fixture
def cache(tiny_repos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The snapshot of `owner/dac` in an offline cache."""
    repo = tmp_path / "home" / "hub" / "models--owner--dac"
    shutil.copytree(tiny_repos / "dac-44k", repo / "snapshots" / COMMIT)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    use_cache(monkeypatch, tmp_path / "home")
    return repo / "snapshots" / COMMIT


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dac_44khz", "is not a valid repository"),
        ("a/b/c", "is not a valid repository"),
        ("owner/", "is not a valid repository"),
        ("owner/my model", "is not a valid repository"),
        ("./nowhere", "path not found: /"),
        ("/nowhere/at/all", "path not found: /nowhere/at/all"),
        ("~/nowhere-at-all", "path not found: /"),
    ],
)
def test_what_is_no_repository_is_refused(
    text: str, message: str, one_sentence: Callable[[BaseException], str]
) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        parse_repo("dac", text)
    one_sentence(caught.value)


@pytest.mark.parametrize("name", ["dac", "trained", "hf", "lin-cae"])
def test_a_path_that_cannot_be_looked_up_is_refused(
    name: str, one_sentence: Callable[[BaseException], str]
) -> None:
    for path in ("~nobody-of-this-name/w", f"/{'x' * 300}/w"):
        with pytest.raises(ModelError, match=r"cannot be read \(.*\): make it") as caught:
            resolve(name, {"repo": path}) if name == "lin-cae" else resolve(f"{name}:{path}")
        assert path in one_sentence(caught.value)


@pytest.mark.parametrize("method", ["exists", "is_file", "open"])
@pytest.mark.parametrize("name", ["dac", "trained"])
def test_a_path_without_permission_is_refused(
    name: str,
    method: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    one_sentence: Callable[[BaseException], str],
) -> None:
    if name == "trained":
        folder = tmp_path / "run"
        write_trained(folder)
    original = getattr(Path, method)

    def denied(path: Path, *args: object, **options: object) -> object:
        if path.is_relative_to(folder):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return original(path, *args, **options)

    monkeypatch.setattr(Path, method, denied)
    if (name, method) == ("trained", "exists"):  # which is for its error only
        (folder / "model" / "trained.json").unlink()
    with pytest.raises(ModelError, match=r"cannot be read \(Permission denied\)") as caught:
        resolve(f"{name}:{folder}")
    one_sentence(caught.value)


def test_a_path_is_absolute_and_has_no_revision(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    assert parse_repo("dac", "./dac") == Repo(str(folder))
    with pytest.raises(ModelError, match="leave out the option revision"):
        parse_repo("dac", "./dac", "main")


def test_folder_file_and_cache_are_the_same_model(folder: Path, cache: Path) -> None:
    (folder / "model.safetensors").rename(folder / "mine.safetensors")
    asked = [f"dac:{folder / 'mine.safetensors'}", f"dac:{cache}", "dac:owner/dac"]
    by_file, by_folder, by_name = (resolve(name).spec for name in asked)
    assert by_file.identity == by_folder.identity == by_name.identity
    assert by_file.name == by_name.name == "dac"
    assert by_name.provenance["repo"] == "owner/dac"
    assert by_name.provenance["revision"] == COMMIT
    assert by_folder.provenance["repo"] == str(cache)
    assert by_folder.provenance["revision"] is None
    with pytest.raises(
        ModelError, match=r"does not contain model\.safetensors or pytorch_model\.bin"
    ):
        resolve(f"dac:{folder}")


def test_every_weight_and_setting_counts(folder: Path) -> None:
    handle = resolve(f"dac:{folder}")
    state = load_file(folder / "model.safetensors")
    last = sorted(state)[-1]
    state[last].flatten()[-1] += 1e-3
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    changed = resolve(f"dac:{folder}").spec.identity
    assert {k for k, v in handle.spec.identity.items() if changed[k] != v} == {"sha256_weights"}
    with pytest.raises(
        ModelError, match=r"the weights file of .* on this machine differs from the one"
    ):
        handle.load("cpu")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "codebook_dim": 8, "x": 1}))
    again = resolve(f"dac:{folder}").spec.identity
    assert {k for k, v in changed.items() if again[k] != v} == {"sha256_config"}


def test_files_that_are_not_there_say_what_to_run(
    cache: Path, one_sentence: Callable[[BaseException], str]
) -> None:
    (cache / "model.safetensors").unlink()
    with pytest.raises(ModelError) as caught:
        resolve("dac:owner/dac")
    assert "HF_HUB_OFFLINE is set" in one_sentence(caught.value)
    command = f"`hf download owner/dac config.json model.safetensors --revision {COMMIT}`"
    assert command in str(caught.value)
    with pytest.raises(ModelError, match=r"`hf download owner/other config\.json model\.safet"):
        resolve("dac:owner/other")
    with pytest.raises(ModelError, match="--revision v1`"):
        resolve("dac:owner/dac", {"revision": "v1"})


def test_an_optional_file_that_may_exist_is_not_taken_as_absent(
    cache: Path, one_sentence: Callable[[BaseException], str]
) -> None:
    wanted, repo = {**FILES, "extra": ["extra.json"]}, Repo("owner/dac")
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE is set") as caught:
        find("dac", repo, wanted, {"extra"})
    command = f"`hf download owner/dac extra.json --revision {COMMIT}`"
    assert command in one_sentence(caught.value)
    absent = cache.parents[1] / ".no_exist" / COMMIT / "extra.json"
    absent.parent.mkdir(parents=True)
    absent.touch()  # as huggingface_hub does after a request for it
    assert set(find("dac", repo, wanted, {"extra"}).paths) == {"config", "weights"}
    absent.unlink()
    (cache / ".gitattributes").touch()  # as after `hf download owner/dac`
    assert set(find("dac", repo, wanted, {"extra"}).paths) == {"config", "weights"}
    (cache / "extra.json").touch()
    assert set(find("dac", repo, wanted, {"extra"}).paths) == {"config", "weights", "extra"}


class Quiet(BaseHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Say nothing."""


@pytest.fixture
def online(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Points huggingface_hub, with an empty cache, to a hub."""

    def use(endpoint: str) -> None:
        constants = huggingface_hub.constants
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    use_cache(monkeypatch, tmp_path / "home")
    return use


@pytest.fixture
def unreachable() -> str:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{closed.getsockname()[1]}"


def test_a_hub_out_of_reach_is_one_short_sentence_at_once(
    online: Callable[[str], None],
    unreachable: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    one_sentence: Callable[[BaseException], str],
) -> None:
    """huggingface_hub itself would retry for 23 seconds, and print eleven lines."""
    online(unreachable)
    monkeypatch.setattr("latentmill.models.hub.HUB_SECONDS", 0.0)
    sleep, this = time.sleep, threading.current_thread()

    def no_pause(seconds: float) -> None:
        assert threading.current_thread() is not this, "a request is retried"
        sleep(seconds)

    monkeypatch.setattr(time, "sleep", no_pause)
    for name, command in (
        ("lin-cae", f"`hf download {HF_REPO} --include '0a3afbec_weights/*'`"),
        ("oobleck:owner/name", "`hf download owner/name --include 'vae/*'`"),
    ):
        with pytest.raises(ModelError) as caught:
            resolve(name)
        said = one_sentence(caught.value)
        assert command in said
        assert f"cannot be downloaded from {unreachable}" in said
        assert len(said) < 350
    assert capfd.readouterr().err == ""


def test_a_folder_without_a_dot_is_named(
    online: Callable[[str], None], unreachable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    online(unreachable)
    monkeypatch.setattr("latentmill.models.hub.HUB_SECONDS", 0.0)
    (tmp_path / "models/dac").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"run `hf .*; the folder here is \./models/dac\.$"):
        resolve("dac:models/dac")


def test_a_hub_that_is_gone_for_a_moment_is_asked_again(
    online: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    class Handler(Quiet):
        def do_HEAD(self) -> None:
            asked.append(self.path)
            if len(asked) > 2:  # until then it hangs up
                self.send_response(403)
                self.send_header("Content-Length", "0")
                self.end_headers()

    monkeypatch.setattr(time, "sleep", lambda _: None)
    with serving(Handler) as endpoint:
        online(endpoint)
        with pytest.raises(ModelError, match="403"):
            resolve("dac:owner/x")
    assert len(asked) == 4  # the fourth is huggingface_hub's own


@pytest.mark.parametrize(
    ("code", "header", "says"),
    [
        (401, "GatedRepo", "accept its terms at http.*/owner/x, then run `hf auth login`"),
        (
            401,
            "RepoNotFound",
            "owner/x not found at http.*: correct the name or, if .* is private, run `hf auth",
        ),
        (404, "RevisionNotFound", "has no revision v9: set the option revision to main"),
        (404, "EntryNotFound", r"has no config\.json: it is not a model of this family"),
        (
            403,
            "",
            r"cannot be downloaded from http.* \(403 .*: run `hf download owner/x config\.json",
        ),
    ],
)
def test_what_a_hub_refuses_is_said_with_the_cure(
    online: Callable[[str], None],
    code: int,
    header: str,
    says: str,
    one_sentence: Callable[[BaseException], str],
) -> None:
    class Handler(Quiet):
        def do_HEAD(self) -> None:
            self.send_response(code)
            self.send_header("X-Error-Code", header)
            self.send_header("Content-Length", "0")
            self.end_headers()

    with serving(Handler) as endpoint:
        online(endpoint)
        with pytest.raises(ModelError, match=says) as caught:
            resolve("dac:owner/x", {"revision": "v9"})
    one_sentence(caught.value)


def test_a_local_file_stands_for_the_weights_alone(folder: Path) -> None:
    file = folder / "model.safetensors"
    found = find("dac", Repo(str(file)), FILES)
    assert found.paths == {"config": folder / "config.json", "weights": file}
    assert find_again("dac", found) == found
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"does not contain config\.json"):
        find("dac", Repo(str(file)), FILES)


def test_a_pickle_of_tensors_is_read_and_one_with_code_is_not(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "executed"),)

    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # has no power over us
    x = 0.1 * torch.randn(1, 1, 5120)
    expected = resolve(f"dac:{folder}").load("cpu").encode(x)
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    assert torch.equal(resolve(f"dac:{folder}").load("cpu").encode(x), expected)
    for evil in ({**state, "x": Payload()}, Payload()):
        torch.save(evil, folder / "pytorch_model.bin")
        with pytest.raises(ModelError, match=r"contains more than tensors\); replace it"):
            resolve(f"dac:{folder}").load("cpu")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\xff" * 100])
def test_a_damaged_file_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match="does not load"):
        read_state("dac", tmp_path / name)


def test_a_file_of_other_things_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    for other in ([1, 2], {"epoch": 3}, torch.zeros(3)):
        torch.save(other, path)
        with pytest.raises(ModelError, match="more than tensors"):
            read_state("dac", path)
    torch.save({"state": {"x": torch.zeros(2)}}, path)
    assert list(read_state("dac", path, "state")) == ["x"]
    with pytest.raises(ModelError, match="does not load"):
        read_state("dac", path, "other")


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("oobleck", "diffusers"),
        ("encodec", "transformers"),
        ("dac", "transformers"),
        ("mimi", "transformers"),
    ],
)
def test_without_the_package_the_error_is_the_pip_line(
    name: str,
    package: str,
    monkeypatch: pytest.MonkeyPatch,
    one_sentence: Callable[[BaseException], str],
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModelError) as caught:
        resolve(f"{name}:owner/name")
    assert f"run `pip install 'latentmill[{package}]'`" in one_sentence(caught.value)


@pytest.mark.parametrize(
    ("name", "repo", "files"),
    [
        ("oobleck", "oobleck", ["config.json", "diffusion_pytorch_model.safetensors"]),
        ("mimi", "mimi", ["config.json", "model.safetensors"]),
    ],
)
@pytest.mark.slow  # test_linear_cae.py has one that is not
def test_downloads_once_from_the_hub_then_works_offline(
    tiny_repos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    repo: str,
    files: list[str],
) -> None:
    """The download is in a process of its own: huggingface_hub reads its variables at import."""
    script = (
        "import json, sys, torch\n"
        "from latentmill.models.registry import resolve\n"
        "torch.set_num_threads(1)\n"
        "handle = resolve(sys.argv[1])\n"
        "handle.load('cpu')\n"
        "print(json.dumps([handle.spec.identity, handle.spec.provenance]))\n"
    )
    with serve(tiny_repos / repo, "owner/model", COMMIT) as hub:
        env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        env |= {"HF_HOME": str(tmp_path), "HF_ENDPOINT": hub.endpoint, "PYTHONPATH": str(PIPELINE)}
        done = subprocess.run(
            [sys.executable, "-c", script, f"{name}:owner/model"],
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )
        downloads = [r.rpartition("/")[2] for r in hub.requests if r.startswith("GET /owner/")]
        others = [r for r in hub.requests if "/owner/model/resolve/" not in r]
    assert done.returncode == 0, done.stderr
    identity, provenance = json.loads(done.stdout.splitlines()[-1])
    assert provenance["revision"] == COMMIT
    assert sorted(downloads) == files
    assert not any("owner/model" in request for request in others)  # such as its listing

    use_cache(monkeypatch, tmp_path)
    offline = resolve(f"{name}:owner/model")
    assert offline.spec.identity == identity
    offline.load("cpu")


def test_only_the_same_repository_waits(
    cache: Path, online: Callable[[str], None], unreachable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nobody waits for files of a known commit that are in the cache."""
    lock = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", lambda file, how: lock(file, how | fcntl.LOCK_NB))
    monkeypatch.setattr("latentmill.models.hub.HUB_SECONDS", 0.0)
    online(unreachable)
    with one_at_a_time("dac", "owner/dac"):
        with one_at_a_time("dac", "owner/other"):
            pass
        repo = Repo("owner/dac", COMMIT)
        names = {"config": ["config.json"], "weights": ["model.safetensors"]}
        assert find("dac", repo, names).paths["weights"] == cache / "model.safetensors"


def test_an_unusable_lock_is_the_reason(
    cache: Path,
    online: Callable[[str], None],
    unreachable: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    one_sentence: Callable[[BaseException], str],
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    resolve("dac:owner/dac")  # HF_HUB_OFFLINE is set
    online(unreachable)
    with pytest.raises(ModelError, match=r"cannot lock .*/gone/latentmill-.*\(No such") as caught:
        resolve("dac:owner/dac")
    assert "TMPDIR" in one_sentence(caught.value)


def test_the_actors_of_a_node_ask_the_hub_once(tiny_repos: Path, tmp_path: Path) -> None:
    """As when four actors load a model whose commit the driver knows."""
    script = (
        "import os\n"
        "import huggingface_hub\n"
        "from latentmill.models.hub import Repo\n"
        "from latentmill.models.weights import find\n"
        f"repo = Repo('owner/model', '{COMMIT}')\n"
        "names = {'config': ['config.json'], 'weights': ['model.safetensors']}\n"
        "children = []\n"
        "for _ in range(4):\n"
        "    children.append(os.fork())\n"
        "    if not children[-1]:\n"
        "        find('dac', repo, names)\n"
        "        os._exit(0)\n"
        "os._exit(any(os.waitpid(child, 0)[1] for child in children))\n"
    )
    with serve(tiny_repos / "dac-44k", "owner/model", COMMIT) as hub:
        env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        env |= {"HF_HOME": str(tmp_path), "HF_ENDPOINT": hub.endpoint, "PYTHONPATH": str(PIPELINE)}
        done = subprocess.run(
            [sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        asked = [request for request in hub.requests if "/resolve/" in request]
    # Before a file is downloaded: whether the hub answers, then what the file is.
    methods = sorted(request.partition(" ")[0] for request in asked)
    assert methods == ["GET"] * 2 + ["HEAD"] * 4
