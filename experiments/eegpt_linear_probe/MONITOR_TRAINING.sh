#!/usr/bin/env bash
# Says how the run of RUN_STABLE_TRAINING.sh is doing; with --watch again every two seconds.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
program=$(command -v lightning-stability || true)
if [[ -z $program && -x $here/../../.venv/bin/lightning-stability ]]; then
    program=$here/../../.venv/bin/lightning-stability
fi
if [[ -z $program ]]; then
    printf "%s: lightning-stability is not installed: pip install '.[tuab]' in the project's folder\n" "$(basename "$0")" >&2
    exit 2
fi
exec "$program" status "${EEGPT_RUN_DIR:-$here/eegpt_stable}" "$@"
