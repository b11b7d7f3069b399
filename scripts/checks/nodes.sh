# shellcheck shell=bash
# Two nodes faked on this machine, for checks that source this file first: each has its own network address, host name
# and processes, and a kill of it takes all of them. Needs root (`unshare`, `ip`); outside the check nothing changes,
# and all that it started ends with it.
#   $root, $python   the checkout and the environment (CHECK_PYTHON; default: .venv, made by scripts/install.sh)
#   $work            a temporary folder that both nodes see, with a tiny model, text and run.yaml
#   start_node N     boots node1 or node2
#   on_node N CMD    runs a command there
#   kill_node N      the power fails: SIGKILL to everything on it

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=${CHECK_PYTHON:-$root/.venv/bin/python}
if [ -z "${NODES_WORK:-}" ]; then # the whole check runs in namespaces of its own
  [ "$(id -u)" -eq 0 ] || { echo "$0 needs root: it makes network namespaces." >&2; exit 2; }
  [ -n "${CHECK_PYTHON:-}" ] || bash "$root/scripts/install.sh"
  NODES_WORK=$(mktemp -d)
  export NODES_WORK
  unshare --mount --net --uts --ipc --pid --fork --mount-proc --kill-child bash "$0" "$@" &
  NODES_CHILD=$!
  trap 'kill -KILL "$NODES_CHILD" 2>/dev/null || true; wait 2>/dev/null || true; rm -rf "$NODES_WORK"' EXIT
  code=0
  wait "$NODES_CHILD" || code=$?
  exit "$code"
fi
work=$NODES_WORK
declare -A node_init
export PATH="${python%/*}:$PATH" PYTHONPATH=$root HF_HUB_OFFLINE=1 HF_DATASETS_CACHE=$work/cache OMP_NUM_THREADS=1

printf '127.0.0.1 localhost\n10.77.0.254 head\n10.77.0.1 node1\n10.77.0.2 node2\n' >"$work/hosts"
mount --bind "$work/hosts" /etc/hosts
mount -t tmpfs tmpfs /run
hostname head
ip link set lo up
ip link add nodes type bridge
ip addr add 10.77.0.254/24 dev nodes
ip link set nodes up

start_node() {
  unshare --net --uts --pid --fork --mount --mount-proc --kill-child sleep infinity 2>/dev/null &
  local init=
  until init=$(pgrep --parent "$!" --exact sleep); do sleep 0.1; done
  node_init[$1]=$init
  ip link del "node$1" 2>/dev/null || true # of a killed node: the kernel may not have removed it yet
  ip link add "node$1" type veth peer name eth0 netns "$init"
  ip link set "node$1" master nodes up
  on_node "$1" sh -c "hostname node$1; ip addr add 10.77.0.$1/24 dev eth0; ip link set lo up; ip link set eth0 up"
}

on_node() {
  local init=${node_init[$1]}
  shift
  nsenter --target "$init" --net --uts --pid --mount -- "$@"
}

kill_node() {
  kill -KILL "${node_init[$1]}"
}

TQDM_DISABLE=1 "$python" "$root/scripts/checks/nodes.py" prepare "$work"
