#!/usr/bin/env bash
# A run on Slurm. Starts Ray on every node of the allocation, encodes, and stops Ray.
#
#   sbatch --nodes=4 --gpus-per-node=8 jobs/slurm.sh --config jobs/encode.yaml
#
# Arguments after the script's name are passed to `latentmill encode`. Submit it in the clone, with
# the environment activated (`source .venv/bin/activate`), both on a shared file system.
# The same command again resumes the run. For a run longer than the time limit, use
# `sbatch --array=1-10%1 ...`: the jobs run one after the other, and those after the last unit end
# at once. `scancel --batch --signal=TERM JOBID` stops the run cleanly. The exit code is the run's.
#SBATCH --job-name=latentmill
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --no-kill
#SBATCH --signal=B:TERM@120
set -euo pipefail

NODE_WAIT_SECONDS=${NODE_WAIT_SECONDS:-300}

cd "${SLURM_SUBMIT_DIR:-.}"
export PYTHONPATH="$PWD/pipeline${PYTHONPATH:+:$PYTHONPATH}"
# The token prevents other users of these machines from connecting to this job's Ray.
export RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_TOKEN

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
others=$((${#nodes[@]} - 1))
cpus=${SLURM_CPUS_ON_NODE:?}
# Each task gets all CPUs of its node. A node that fails does not end the tasks on other nodes.
step=(srun --ntasks-per-node=1 --cpus-per-task="$cpus" --cpu-bind=none --no-kill
    --kill-on-bad-exit=0)

ip=$(srun --nodes=1 --ntasks=1 --nodelist="${nodes[0]}" hostname --ip-address)
ip=${ip%% *}
port=$((20000 + SLURM_JOB_ID % 20000)) # by job, because two jobs may share a node
export RAY_ADDRESS="$ip:$port"

stop_ray() {
    local running
    running=$(jobs -p)
    # shellcheck disable=SC2086  # several process ids
    [ -z "$running" ] || kill -TERM $running 2> /dev/null || true
    wait
}
trap stop_ray EXIT
trap 'exit 143' TERM INT

"${step[@]}" --nodes=1 --ntasks=1 --nodelist="${nodes[0]}" \
    ray start --head --block --disable-usage-stats --include-dashboard=false \
    --node-ip-address="$ip" --port="$port" --num-cpus="$cpus" \
    --temp-dir="/tmp/latentmill-$SLURM_JOB_ID" &
head=$!

# Wait until Ray has $1 nodes. Fails if the head ends or the time is up.
wait_for_nodes() {
    python - "$1" "$head" "$NODE_WAIT_SECONDS" << 'PYTHON'
import os, socket, sys, time

import ray

wanted, head, seconds = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
host, port = os.environ["RAY_ADDRESS"].rsplit(":", 1)
end, there = time.monotonic() + seconds, 0
while there < wanted:
    if time.monotonic() > end:
        sys.exit(f"slurm.sh: {there} of {wanted} Ray nodes have started after {seconds:g} s.")
    time.sleep(0.5)
    try:
        os.kill(head, 0)
    except ProcessLookupError:
        sys.exit("slurm.sh: Ray's head has ended: see its messages above.")
    if not ray.is_initialized():
        try:
            socket.create_connection((host, int(port)), 1).close()
            ray.init(os.environ["RAY_ADDRESS"], logging_level="ERROR", log_to_driver=False)
        except (OSError, ConnectionError, RuntimeError):
            continue
    there = sum(node["Alive"] for node in ray.nodes())
PYTHON
}

wait_for_nodes 1
if ((others > 0)); then
    "${step[@]}" --nodes="$others" --ntasks="$others" --exclude="${nodes[0]}" \
        ray start --block --disable-usage-stats --address="$RAY_ADDRESS" --num-cpus="$cpus" &
    wait_for_nodes "${#nodes[@]}"
fi

python jobs/encode.py "$@" &
driver=$!
trap 'kill -TERM "$driver" 2> /dev/null || true' TERM INT
# A signal ends `wait` before the driver has ended. Then wait again for the driver's exit code.
while
    code=0
    wait "$driver" || code=$?
    kill -0 "$driver" 2> /dev/null
do :; done
exit "$code"
