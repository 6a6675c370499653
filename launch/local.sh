#!/usr/bin/env bash
# A verb on N processes of this machine. Its exit code is the verb's own.
#   launch/local.sh 8 train --config configs/demo.yaml --run.steps=100
# PYTHON names another interpreter than the project's .venv.
set -euo pipefail
if [ $# -lt 2 ]; then
    echo "usage: launch/local.sh PROCESSES VERB [arguments of the verb]" >&2
    exit 2
fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/env.sh
source "$root/launch/env.sh"
processes=$1
shift
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    [ ! -x "$root/.venv/bin/python" ] || PYTHON=$root/.venv/bin/python
fi
exec "$PYTHON" -m megasora launch local --nproc "$processes" "$@"
