#!/usr/bin/env bash
# The whole road on real video: prepare, train-vae, encode, train on two processes (killed and resumed), sample.
# Run by `make demo`. Finished parts are not done twice; DEMO_FRESH=1 begins anew.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/env.sh
source launch/env.sh
# Everything is small here: threads that wait for each other give little, and on a busy machine cost ten times the time.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

PYTHON=${PYTHON:-.venv/bin/python}
CONFIG=configs/demo.yaml
DATA=data/demo RUN=runs/demo
KILL_AFTER=${KILL_AFTER:-190} # steps
begin=$SECONDS

say() { printf '\n== %3d s  %s\n' $((SECONDS - begin)) "$*"; }
megasora() { "$PYTHON" -m megasora "$@"; }

[ "${DEMO_FRESH:-0}" = 1 ] && rm -rf "$DATA" "$RUN"
rm -rf "$RUN" # the run itself is short: it is always shown from its first step

say "real clips"
"$PYTHON" -m data_pipelines.prepare.demo_clips "$DATA/raw"
say "prepare: cut, caption, shard"
megasora prepare --config "$CONFIG"
say "train-vae: a small causal 3-D VAE"
[ -e "$DATA/vae/model.safetensors" ] || megasora train-vae --config "$CONFIG"
say "encode: latent shards"
megasora encode --config "$CONFIG"

say "train on 2 processes, to be killed (-9) after step $KILL_AFTER"
setsid "$PYTHON" -m megasora launch local --nproc 2 train --config "$CONFIG" &
job=$!
trap 'kill -9 -- -$job 2>/dev/null || true' EXIT
while kill -0 "$job" 2>/dev/null && ! grep -q "\"step\": $KILL_AFTER," "$RUN/metrics.jsonl" 2>/dev/null; do sleep 0.2; done
kill -9 -- "-$job" 2>/dev/null || { echo "the run ended before it could be killed"; exit 1; }
wait "$job" 2>/dev/null || true
trap - EXIT

say "killed; the same command resumes from the newest checkpoint"
megasora launch local --nproc 2 train --config "$CONFIG"

say "sample"
megasora sample --config "$CONFIG"

sheet=$(find "$RUN/samples" -name contact-sheet.png -printf '%T@ %p\n' | sort -n | tail -n 1 | cut -d' ' -f2-)
say "done. Everything lies here:"
printf '  %-12s %s\n' \
  clips "$DATA/raw" shards "$DATA/shards" VAE "$DATA/vae" latents "$DATA/latents" \
  metrics "$RUN/metrics.jsonl" TensorBoard "$PYTHON -m tensorboard.main --logdir $RUN/tb" \
  checkpoints "$RUN/checkpoints" samples "$sheet"
"$PYTHON" - "$RUN" <<'PY'
import sys
from pathlib import Path
from statistics import mean

from megasora.observe.metrics import history

steps = history(Path(sys.argv[1]))
for stage in dict.fromkeys(line["stage"] for line in steps):
    loss = [line["loss"] for line in steps if line["stage"] == stage]
    print(f"  loss, stage {stage}: {mean(loss[:10]):.3f} at first, {mean(loss[-10:]):.3f} at the end of {len(loss)} steps")
PY
