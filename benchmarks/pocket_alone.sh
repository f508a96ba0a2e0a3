#!/usr/bin/env bash
# Is every pocket task learnable? Each task alone by plain LoRA, with the base model's own accuracy before it.
# The table of docs/experiments.md; about two minutes a task on one CPU core.
set -euo pipefail
cd "$(dirname "$0")/.."
JOBS=${JOBS:-2} OUT=${OUT:-runs/alone}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} OUT
mkdir -p "$OUT"
printf '%s\n' ScienceQA TextVQA ImageNet GQA VizWiz Grounding VQAv2 OCRVQA |
  xargs -P "$JOBS" -I{} bash -c '
    .venv/bin/dymoe run recipes/pocket/lora.yaml --tasks "[\"{}\"]" --training.steps_per_task 40 --training.batch_size 8 \
      --evaluation.limit 60 --evaluation.batch_size 60 --evaluation.zero_shot true \
      --training.threads "$OMP_NUM_THREADS" --output "$OUT/{}" --resume >"$OUT/{}.log" 2>&1
  '
.venv/bin/dymoe show "$OUT"/*/
