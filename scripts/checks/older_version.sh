#!/usr/bin/env bash
# Does this code read what an older commit wrote? The code at COMMIT trains, exports, measures and prepares shards with
# tiny models; this code loads, measures, exports, resumes and trains on all of it. Every weight must be the same, bit
# for bit.
# usage: scripts/checks/older_version.sh [COMMIT]
set -euo pipefail
cd "$(dirname "$0")/../.."
commit=${1:-7f60e2b}
export PATH="$PWD/.venv/bin:$PATH" HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
export TQDM_DISABLE=1 # no progress bars
work=$(mktemp -d)
trap 'git worktree remove --force "$work/code" 2>/dev/null || true; rm -rf "$work"' EXIT
git worktree add --quiet --detach "$work/code" "$commit"
for code in "$work/code" "$PWD"; do # each with its own caches
  task=$([ "$code" = "$PWD" ] && echo check || echo make)
  HF_HOME="$work/home-$task" PYTHONPATH="$code" python -P scripts/checks/older_version.py "$task" "$work"
done
echo "what $commit wrote is read unchanged"
