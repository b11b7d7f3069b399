#!/usr/bin/env bash
# Does a run over two nodes under torchrun outlive a node? Trains a tiny model on 2 faked nodes x 2 processes on the
# CPU: undisturbed; with one process killed, which torchrun restarts; with one node that loses its power and is started
# again with the same command. All must end with the same bits. Needs root; about ten minutes on two cores.
# usage: [CHECK_PYTHON=PYTHON] scripts/checks/torchrun_nodes.sh [OPTIONS OF AST-TRAIN]
#   CHECK_PYTHON  of an environment with this project; default: .venv/bin/python, made by scripts/install.sh
#   options       default: --set training.fsdp=true; DDP keeps the bits with
#                 --set training.fsdp=false --set training.ddp_find_unused_parameters=true
set -euo pipefail
# shellcheck source=scripts/checks/nodes.sh
. "$(dirname "$0")/nodes.sh"
options=("$@")
[ $# -gt 0 ] || options=(--set training.fsdp=true)
declare -A launcher

# otherwise torchrun gives restarted processes the addresses of those that ended: pytorch issue 135712
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
launch() { # NODE NAME: the same command on both nodes, for the first start and for every other
  on_node "$1" "$python" -m torch.distributed.run --nnodes 2 --nproc-per-node 2 --max-restarts 3 \
    --rdzv-backend c10d --rdzv-endpoint node1:29400 --rdzv-id "$2" "${python%/*}/ast-train" \
    --config "$work/run.yaml" "--output-dir=$work/$2" "${options[@]}" --resume-if-started >>"$work/$2.$1.out" 2>&1 &
  launcher[$1]=$!
}

fail() {
  echo "FAILED: $*" >&2
  tail -n 60 "$work"/*.out >&2
  exit 1
}

finish() { # NAME STARTS: wait for both nodes; the run must have been started as often, and end as the undisturbed one
  for node in 1 2; do wait "${launcher[$node]}" || fail "torchrun of $1 ended with $? on node $node"; done
  local starts
  starts=$(cat "$work/$1".?.out | grep -c '^tokens:')
  echo "$1: torchrun ended with 0 on both nodes, after $starts starts of the run"
  [ "$starts" -ge "$2" ] || fail "$1 was not started again"
  [ "$1" = undisturbed ] || "$python" "$root/scripts/checks/nodes.py" compare "$work/undisturbed" "$work/$1" ||
    fail "$1 has other bits"
}

wait_for_checkpoint() { # NAME
  until compgen -G "$work/$1/checkpoint-*/trainer_state.json" >/dev/null; do
    kill -0 "${launcher[1]}" || fail "$1 ended without a checkpoint"
    sleep 0.2
  done
}

for node in 1 2; do start_node "$node"; done

for node in 1 2; do launch "$node" undisturbed; done
finish undisturbed 1

for node in 1 2; do launch "$node" process; done
wait_for_checkpoint process
pkill -KILL --newest --full -- " -u .*bin/ast-train.*$work/process"
finish process 2

for node in 1 2; do launch "$node" node; done
wait_for_checkpoint node
kill_node 2
wait "${launcher[2]}" || true
start_node 2
launch 2 node
finish node 2
