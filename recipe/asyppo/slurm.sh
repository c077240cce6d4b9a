#!/usr/bin/env bash
# Run a training script on several nodes under Slurm: a Ray cluster over the job's nodes, then the script on the first.
#
#   sbatch --nodes=2 recipe/asyppo/slurm.sh scripts/run_asyppo_qwen3_14b.sh [any verl override]
#
# Submit from the root of the repository, on storage that all nodes see, in the environment that asyppo_verl is installed
# in. Set ALGO, RUN_DIR and so on before sbatch. When the script ends, the cluster ends with it.
#   HEAD_ADDRESS     address of the first node that the others reach, where the one found is not the right one
#   RAY_AUTH_MODE    token (the default), or disabled on a network that nobody else can reach
#SBATCH --job-name=asyppo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --output=%x-%j.log
set -euo pipefail
[ -f "${1:-}" ] || {
    echo "usage: sbatch --nodes=N recipe/asyppo/slurm.sh SCRIPT [any verl override]${1:+ (there is no file $1)}" >&2
    exit 2
}
export NNODES=${SLURM_JOB_NUM_NODES:?start this with sbatch}
export N_GPUS=${N_GPUS:-${SLURM_GPUS_ON_NODE:-8}}
PORT=${RAY_PORT:-6379}
source recipe/asyppo/python.sh
RAY=("$PYTHON" -m ray.scripts.scripts)
# Without a token, a Ray cluster runs any code that anybody on its network sends.
export RAY_AUTH_MODE=${RAY_AUTH_MODE:-token}
if [ "$RAY_AUTH_MODE" = token ] && ! "$PYTHON" -c 'from ray.exceptions import AuthenticationError' 2>/dev/null; then
    echo "slurm.sh: the Ray of $PYTHON has no token authentication; update it, or set RAY_AUTH_MODE=disabled" >&2
    exit 2
fi
RAY_AUTH_TOKEN=$("$PYTHON" -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_TOKEN
mapfile -t NODES < <(scontrol show hostnames "$SLURM_JOB_NODELIST")

ON_NODE=(srun --nodes=1 --ntasks=1 --overlap)
# A task gets one CPU, and is bound to it, unless it asks for more; Ray's workers need them all.
ALL_CPUS=(--cpu-bind=none ${SLURM_CPUS_ON_NODE:+--cpus-per-task="$SLURM_CPUS_ON_NODE"})
start_ray() { # node, then arguments of ray start
    "${ON_NODE[@]}" "${ALL_CPUS[@]}" --nodelist="$1" "${RAY[@]}" start --block --disable-usage-stats \
        --num-gpus="$N_GPUS" ${SLURM_CPUS_ON_NODE:+--num-cpus="$SLURM_CPUS_ON_NODE"} "${@:2}" &
    RAY_PIDS+=($!)
}
RAY_PIDS=()
trap '[ ${#RAY_PIDS[@]} = 0 ] || kill "${RAY_PIDS[@]}" 2>/dev/null || true; wait' EXIT

# The addresses of the node's name, then those of all its interfaces. Other nodes cannot reach loopback or link-local ones.
ADDRESSES=$("${ON_NODE[@]}" --nodelist="${NODES[0]}" bash -c 'hostname --ip-address; hostname --all-ip-addresses' || true)
ROUTABLE=$(tr -s '[:space:]' '\n' <<< "$ADDRESSES" | grep -Eiv '^(127\.|169\.254\.|0\.|::1$|::$|fe[89ab].:|$)' || true)
HEAD=${HEAD_ADDRESS:-$(grep -m 1 -v : <<< "$ROUTABLE" || head -n 1 <<< "$ROUTABLE")} # IPv4 first
[ -n "$HEAD" ] || { echo "slurm.sh: no address of ${NODES[0]} can be reached from others; set HEAD_ADDRESS" >&2; exit 1; }
case $HEAD in *:*) ADDRESS=[$HEAD]:$PORT ;; *) ADDRESS=$HEAD:$PORT ;; esac
start_ray "${NODES[0]}" --head --node-ip-address="$HEAD" --port="$PORT" --include-dashboard=false
for attempt in $(seq 60); do
    "${RAY[@]}" health-check --address "$ADDRESS" 2>/dev/null && break
    [ "$attempt" -lt 60 ] || { echo "slurm.sh: the head of the Ray cluster does not answer at $ADDRESS" >&2; exit 1; }
    sleep 2
done
for node in "${NODES[@]:1}"; do
    start_ray "$node" --address="$ADDRESS"
done

# verl gives up at once when GPUs are missing, so wait until every node has joined.
"$PYTHON" - "$ADDRESS" $((NNODES * N_GPUS)) <<'WAIT'
import sys, time
import ray

address, wanted = sys.argv[1], int(sys.argv[2])
ray.init(address=address, logging_level="ERROR", log_to_driver=False)
deadline = time.monotonic() + 300
while (found := int(ray.cluster_resources().get("GPU", 0))) < wanted:
    if time.monotonic() > deadline:
        sys.exit(f"slurm.sh: only {found} of {wanted} GPUs joined the Ray cluster {address} within five minutes")
    time.sleep(1)
print(f"Ray cluster {address}: {found} GPUs on {len(ray.nodes())} nodes")
WAIT
export RAY_ADDRESS=$ADDRESS
# In the background, so that a signal to this script ends the training before the cluster.
bash "$@" &
trap 'kill -TERM '$!' 2>/dev/null || true' TERM INT
wait $! || wait $! # a signal ends the first wait only
