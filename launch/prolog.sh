#!/usr/bin/env bash
# For SLURM's Prolog: looks at the node before every job. A node that is not fit is drained by SLURM, with its reason in the
# node's log, and the job goes back into the queue. In slurm.conf:
#   Prolog=/opt/megasora/launch/prolog.sh
#   PrologFlags=Alloc,NoHold
#   SchedulerParameters=nohold_on_prolog_fail
# SLURM starts it as root with an almost empty environment, so what it needs stands in a file of two shell variables:
#   PYTHON=/opt/megasora/.venv/bin/python
#   DOCTOR=(--gpus 8 --driver 575.57.08 --free-gb 50 --directory /scratch)
set -euo pipefail
settings=${MEGASORA_PROLOG:-/etc/megasora/prolog}
PYTHON=python3 DOCTOR=()
# shellcheck source=/dev/null
[ ! -e "$settings" ] || source "$settings"
code=0
found=$(timeout 100 "$PYTHON" -m megasora doctor --directory /tmp "${DOCTOR[@]}" 2>&1) || code=$?
[ "$code" = 0 ] || printf '%s\n' "$found" | grep -e BAD -e megasora: >&2
exit "$code"
