#!/usr/bin/env bash
# Does scripts/slurm.sh work under a real Slurm? Starts one on two faked nodes (slurmctld, two slurmd, munge) and trains
# a tiny model on 2 nodes x 2 tasks on the CPU: undisturbed; put back in the queue by an administrator; stopped by USR1
# before its time limit; with a killed task. All must end with the same bits. Then: a finished run ends at once with 0,
# a wrong configuration is not queued again. Needs root and Debian's slurm-wlm and munge; a quarter of an hour on two
# cores.
# usage: [CHECK_PYTHON=PYTHON] scripts/checks/slurm.sh [OPTIONS OF AST-TRAIN]    default: --set training.fsdp=true
#   options       DDP keeps the bits with --set training.fsdp=false --set training.ddp_find_unused_parameters=true
#   CHECK_PYTHON  of an environment with this project; default: .venv/bin/python, made by scripts/install.sh
set -euo pipefail
for program in slurmctld slurmd munged; do
  command -v "$program" >/dev/null ||
    { echo "$program is missing: apt-get install --no-install-recommends slurm-wlm munge" >&2; exit 2; }
done
# shellcheck source=scripts/checks/nodes.sh
. "$(dirname "$0")/nodes.sh"
options=("$@")
[ $# -gt 0 ] || options=(--set training.fsdp=true)

head -c 1024 /dev/urandom >"$work/munge.key"
chmod 600 "$work/munge.key"
mkdir -p /run/munge "$work/slurm/node1" "$work/slurm/node2" "$work/slurm/state"
export SLURM_CONF=$work/slurm.conf
cat >"$SLURM_CONF" <<CONF
ClusterName=check
SlurmctldHost=head
SlurmUser=root
AuthType=auth/munge
MailProg=/bin/true
KillWait=120
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
StateSaveLocation=$work/slurm/state
SlurmdSpoolDir=$work/slurm/%n
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.%n.pid
SlurmctldLogFile=$work/slurm/slurmctld.log
SlurmdLogFile=$work/slurm/%n.log
NodeName=node[1-2] CPUs=4 RealMemory=4000
PartitionName=main Nodes=ALL Default=YES
CONF
munged --key-file "$work/munge.key" --force --log-file "$work/munged.log" --seed-file "$work/munged.seed" 2>/dev/null
slurmctld
for node in 1 2; do
  start_node "$node"
  on_node "$node" slurmd
done

fail() {
  echo "FAILED: $*" >&2
  tail -n 40 "$work"/*.out "$work"/slurm/slurmctld.log >&2
  exit 1
}

set -E
trap 'fail "line $LINENO: $BASH_COMMAND"' ERR

submit() { # NAME [OPTIONS OF SBATCH] -- [OPTIONS OF AST-TRAIN]; sets $job
  local name=$1 sbatch=()
  shift
  while [ "$1" != -- ]; do sbatch+=("$1"); shift; done
  shift
  job=$(sbatch --parsable --nodes 2 --ntasks-per-node 2 --gpus-per-node 0 --cpus-per-task 1 --mem 1000 --time 30 \
    --output "$work/$name.out" "${sbatch[@]}" "$root/scripts/slurm.sh" \
    --config "$work/run.yaml" "--output-dir=$work/$name" "${options[@]}" "$@")
}

field() { # NAME: a field of the job
  scontrol --oneliner show job "$job" | grep -oP "(?<=\b$1=)\S+" || true
}

over() { # the job has ended, and is not in the queue again
  [[ $(field JobState) =~ ^(COMPLETED|FAILED|TIMEOUT|CANCELLED|NODE_FAIL)$ ]]
}

finish() { # wait for the end of the job; in the queue it need not wait for minutes, as Slurm has it after a requeue
  until over; do
    sleep 5 # a job that starts again at once still has the revoked credentials of the last time
    [ "$(field JobState)" != PENDING ] || scontrol update "jobid=$job" starttime=now 2>/dev/null || true
  done
}

ended() { # STATE NAME: how the job ended
  echo "$2: $(field JobState), exit code $(field ExitCode), $(field Restarts) restarts, $(field RunTime)"
  [ "$(field JobState)" = "$1" ] || fail "$2 should end as $1"
}

same() { # NAME: the run must have the bits of the undisturbed one
  "$python" "$root/scripts/checks/nodes.py" compare "$work/undisturbed" "$work/$1" || fail "$1 has other bits"
}

wait_for_checkpoint() { # NAME
  until compgen -G "$work/$1/checkpoint-*/trainer_state.json" >/dev/null; do
    ! over || fail "$1 has no checkpoint"
    sleep 0.2
  done
}

started() { # NAME: its processes, as pkill finds them
  echo "bin/ast-train --resume-if-started.*$work/$1"
}

submit undisturbed --
finish
ended COMPLETED undisturbed

submit requeued --
wait_for_checkpoint requeued
scontrol requeue "$job"
finish
ended COMPLETED requeued
same requeued
[ "$(field Restarts)" -ge 1 ] || fail "requeued was never restarted"
[ "$(grep -c 'SIGTERM: saved' "$work/requeued.out")" = 1 ] || fail "requeued did not save when it was asked to leave"

# Five minutes before its time limit a job gets USR1, as scripts/slurm.sh asks. Slurm looks at limits twice a minute:
# the processes stand still until it has (it wakes them with the signal), so training does not end before.
submit limited --
wait_for_checkpoint limited
pkill -STOP --full "$(started limited)"
scontrol update "jobid=$job" "timelimit=$(($(date -d "1970-01-01 $(field RunTime)Z" +%s) / 60 + 5))" # minutes
until [ "$(field JobState)" = PENDING ]; do
  ! over || fail "limited was not put back in the queue"
  sleep 0.2
done
scontrol update "jobid=$job" timelimit=60 # once is enough
finish
ended COMPLETED limited
[ "$(grep -c 'SIGUSR1: saved' "$work/limited.out")" = 1 ] || fail "limited did not save before its time limit"
[ "$(field Restarts)" = 1 ] || fail "limited should be restarted once"
same limited

submit killed --
wait_for_checkpoint killed
pkill -KILL --newest --full "$(started killed)"
finish
ended FAILED killed
[ "$(field Restarts)" -eq 0 ] || fail "a run that was killed should not be queued again by itself"
submit killed --
finish
ended COMPLETED killed
same killed

submit killed --
finish
ended COMPLETED killed
grep -q 'finished run' "$work/killed.out" || fail "a finished run should say so"

submit wrong -- --set training.learning_rat=1
finish
ended FAILED wrong
[ "$(field ExitCode)" = 2:0 ] || fail "a wrong configuration should end with exit code 2"
[ "$(field Restarts)" -eq 0 ] || fail "a wrong configuration was queued again"
