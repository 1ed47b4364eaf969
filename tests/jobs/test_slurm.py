"""jobs/slurm.sh on stand-ins of srun and scontrol that run everything on this machine."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from ray_head import ROOT, environment

from support import runs

SCRIPT = ROOT / "jobs" / "slurm.sh"

# Runs a step's command here, once per task that is asked for, and notes how it was called.
SRUN = """#!/usr/bin/env bash
echo "$@" >> "$SRUN_LOG"
tasks=1
while [[ $1 == --* ]]; do
    case "$1" in --ntasks=*) tasks=${1#--ntasks=} ;; esac
    shift
done
[ "$1" = hostname ] && { echo "127.0.0.1 172.17.0.1"; exit; }
for ((task = 0; task < tasks; task++)); do "$@" & done
trap 'kill $(jobs -p)' TERM
wait
wait
"""

RAY = """#!/usr/bin/env bash
exec python -c 'from ray.scripts.scripts import main; main()' "$@"
"""


def allocation(folder: Path, nodes: int) -> dict[str, str]:
    """The variables of a batch script in an allocation."""
    names = " ".join(f"node{number}" for number in range(nodes))
    scripts = {"srun": SRUN, "ray": RAY, "scontrol": f"#!/bin/sh\nprintf '%s\\n' {names}\n"}
    (folder / "bin").mkdir()
    for name, text in scripts.items():
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    env = environment("the script makes its own")
    tests = str(ROOT / "tests")
    return env | {
        "PATH": f"{folder / 'bin'}{os.pathsep}{env['PATH']}",
        "PYTHONPATH": tests,
        "SRUN_LOG": str(folder / "srun.log"),
        "SLURM_JOB_ID": str(os.getpid() % 9000 + 100 * nodes),
        "SLURM_JOB_NODELIST": f"node[0-{nodes - 1}]",
        "SLURM_CPUS_ON_NODE": "1",
        "SLURM_SUBMIT_DIR": str(ROOT),
    }


def start(folder: Path, env: dict[str, str], *options: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["bash", str(SCRIPT), *map(str, options)],
        env=env,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def ray_processes(env: dict[str, str]) -> list[str]:
    """What still runs of the job's Ray."""
    temp = f"/tmp/latentmill-{env['SLURM_JOB_ID']}"
    return [name for name in runs.descendants(1).values() if temp in name]


def finish(process: subprocess.Popen[str], env: dict[str, str]) -> str:
    try:
        text, _ = process.communicate(timeout=200)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    runs.until(lambda: not ray_processes(env), "Ray has ended on every node")
    shutil.rmtree(f"/tmp/latentmill-{env['SLURM_JOB_ID']}", ignore_errors=True)
    return text


def test_the_script_is_one_that_bash_and_sbatch_understand() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    lines = SCRIPT.read_text().splitlines()
    commands = [number for number, line in enumerate(lines) if line and not line.startswith("#")]
    directives = [number for number, line in enumerate(lines) if line.startswith("#SBATCH")]
    assert max(directives) < commands[0], "sbatch stops reading at the first command"
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", SCRIPT.read_text(), re.M))
    assert options["ntasks-per-node"] == "1"
    grace = re.fullmatch(r"B:TERM@(\d+)", options["signal"])
    assert grace
    assert int(grace[1]) >= 60
    assert os.access(SCRIPT, os.X_OK)


@pytest.mark.slow
def test_a_run_on_an_allocation_of_one_node(tmp_path: Path) -> None:
    songs = runs.write_songs(tmp_path / "songs", 4)
    (songs / "empty.wav").write_bytes(b"")
    env = allocation(tmp_path, nodes=1)
    process = start(tmp_path, env, songs, tmp_path / "store", "--unit-seconds", 2, "--threads", 1)
    text = finish(process, env)
    assert process.returncode == 3, text  # the exit code of the run: an item failed
    assert "5/5 items" in text
    runs.assert_whole(tmp_path / "store")
    [_, head] = Path(env["SRUN_LOG"]).read_text().splitlines()
    assert "--nodelist=node0" in head
    assert "--cpus-per-task=1" in head


@pytest.mark.slow
def test_two_nodes_and_a_signal(tmp_path: Path) -> None:
    songs = runs.write_songs(tmp_path / "songs", 12, seconds=2.4)
    store = tmp_path / "store"
    options = [songs, store, "--model", runs.SLOW_MODEL, "--model-option", "seconds=0.7"]
    options += ["--batch-size", 1, "--unit-seconds", 8, "--threads", 1, "--device", "cpu"]
    env = allocation(tmp_path, nodes=2)
    process = start(tmp_path, env, *options)
    runs.until(lambda: bool(runs.commits(store)), "the first unit is committed")
    [_, _, workers] = Path(env["SRUN_LOG"]).read_text().splitlines()
    assert "--nodes=1 --ntasks=1 --exclude=node0" in workers
    process.send_signal(signal.SIGTERM)  # scancel --batch --signal=TERM
    text = finish(process, env)
    assert process.returncode == 130, text
    assert "interrupted; run the same command again to resume" in text
    assert not (store / "tmp").exists()
    kept = runs.commits(store)
    Path(env["SRUN_LOG"]).unlink()
    process = start(tmp_path, env, *options)
    text = finish(process, env)
    assert process.returncode == 0, text
    runs.assert_whole(store)
    assert kept.items() <= runs.commits(store).items()


def test_a_head_that_cannot_start_is_said_and_ends_the_job(tmp_path: Path) -> None:
    env = allocation(tmp_path, nodes=1)
    (tmp_path / "bin" / "ray").write_text("#!/bin/sh\necho no Ray here >&2\nexit 1\n")
    process = start(tmp_path, env, tmp_path, tmp_path / "store")
    text = finish(process, env)
    assert process.returncode == 1
    assert "no Ray here" in text
    assert "slurm.sh: Ray's head has ended" in text
