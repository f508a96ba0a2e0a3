#!/usr/bin/env bash
# The eight-task pocket stream by every method, several seeds: runs/stream/METHOD-SEED, then one report over all of them.
#
#   benchmarks/pocket_stream.sh                    the table of docs/experiments.md (two CPU cores: about two hours)
#   SEEDS="0 1 2" JOBS=6 benchmarks/pocket_stream.sh --training.steps_per_task 120 --training.batch_size 16 \
#     --evaluation.limit 250 --evaluation.batch_size 125      a fuller budget; the processes share one GPU where there is one
#
# Words after the script's name are keys of the recipes. Started again it goes on where it was stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
SEEDS=${SEEDS:-0 1} METHODS=${METHODS:-dymoe incmoelora lora joint} JOBS=${JOBS:-2} OUT=${OUT:-runs/stream}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} OUT EXTRA="$*"
mkdir -p "$OUT"
for seed in $SEEDS; do for method in $METHODS; do echo "$method $seed"; done; done |
  xargs -P "$JOBS" -L 1 bash -c '
    method=$1 seed=$2; shift 2
    .venv/bin/dymoe run "recipes/pocket/$method.yaml" --seed "$seed" --output "$OUT/$method-$seed" \
      --training.threads "$OMP_NUM_THREADS" --resume $EXTRA >"$OUT/$method-$seed.log" 2>&1 \
      && echo "done: $method, seed $seed" || { echo "failed: $method, seed $seed; see $OUT/$method-$seed.log"; exit 255; }
  ' _
.venv/bin/dymoe report "$OUT"/*/ --output "$OUT/report.html"
