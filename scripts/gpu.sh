#!/usr/bin/env bash
# One short lease of a machine with a GPU: the adapter's checks, the speed of a step and of an answer, then as many cells
# of sweeps as processes side by side finish in the time; JSON is left in OUT.
#
#   scripts/gpu.sh OUT [SWEEP ...]         (recipes/pocket/next/leaderboard.yaml where no sweep is named)
#
# PYTHON (python3) has dymoe's dependencies; the pocket model's parts are in $DYMOE_CACHE or can be fetched. MINUTES (10) is
# the time for all of it, JOBS (8) the processes. SHAPE (--shape smollm2; what both benchmarks take) and KEYS ("--base.training.steps_per_task 2") go
# to the benchmarks and to the sweeps. Cells that stand in the repository's results are not learned again; a second call
# with the same OUT goes on. Without a GPU the same is tried on the CPU.
set -euo pipefail
cd "$(dirname "$0")/.."
out="$(realpath -m "${1:?usage: scripts/gpu.sh OUT [SWEEP ...]}")"
shift
[ $# -gt 0 ] || set -- recipes/pocket/next/leaderboard.yaml
python="${PYTHON:-python3}"
end=$((SECONDS + 60 * ${MINUTES:-10}))
read -ra shape <<<"${SHAPE:---shape smollm2}"
read -ra keys <<<"${KEYS:-}"
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS=1
mkdir -p "$out"

say() { printf '%s\n' "== $1 ($((end - SECONDS)) s left)"; }
# A step may take its share of the time; one that fails is told and the next ones go on.
step() {
  local seconds=$1 name=$2
  shift 2
  say "$name"
  timeout --signal=INT --kill-after=20 "$seconds" "$@" >"$out/$name.log" 2>&1 || echo "   exit $? (${out}/$name.log)"
  tail -n 2 "$out/$name.log"
}

share=$(((end - SECONDS) / 6))
step "$share" checks "$python" -m pytest -q -p no:cacheprovider tests/test_routing.py tests/adapter
step "$share" step "$python" benchmarks/step.py --results "$out" "${shape[@]}"
step "$share" decode "$python" benchmarks/decode.py --results "$out" "${shape[@]}"
for sweep in "$@"; do
  name="$(basename "$(dirname "$sweep")")-$(basename "$sweep" .yaml)"
  records="$out/$name.jsonl"
  standing="$(sed -n 's/^results: *//p' "$sweep")"
  # Another budget than the sweep's own makes other records.
  [ -e "$records" ] || [ -n "${KEYS:-}" ] || [ ! -e "$standing" ] || cp "$standing" "$records"
  left=$((end - SECONDS - 30))
  [ "$left" -gt 0 ] || break
  step "$left" "$name" "$python" -m dymoe sweep "$sweep" --jobs "${JOBS:-8}" --output "$out/runs-$name" \
    --results "$records" --table "$out/$name.md" "${keys[@]}"
done
say done
ls "$out"
