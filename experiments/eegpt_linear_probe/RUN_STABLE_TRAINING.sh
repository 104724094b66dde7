#!/usr/bin/env bash
# Starts the stable recipe (tuab_stable: all callbacks of the package) in a tmux session, or goes on with it from its last
# good checkpoint, if there is one. A run that was killed, or whose machine went down, is gone on with by the same line.
#
#   RUN_STABLE_TRAINING.sh [options of `lightning-stability fit`]
#   RUN_STABLE_TRAINING.sh --data.root=/data/tuab --model.checkpoint=eegpt_mcae_58chs_4s_large4E.ckpt --trainer.max_epochs=50
#
# Checkpoints, logs and the cache of windows go to EEGPT_RUN_DIR, by default the folder eegpt_stable beside this script.
set -euo pipefail

session=eegpt_stable
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

fail() {
    printf '%s: %s\n' "$(basename "$0")" "$1" >&2
    exit 2
}

command -v tmux >/dev/null || fail "tmux was not found. Install it, for example with: apt-get install tmux"
if tmux has-session -t "=$session" 2>/dev/null; then
    fail "the session $session is running already. Look at it: tmux attach -t $session; end it: tmux kill-session -t $session"
fi
program=$(command -v lightning-stability || true)
if [[ -z $program && -x $here/../../.venv/bin/lightning-stability ]]; then
    program=$(cd "$here/../../.venv/bin" && pwd)/lightning-stability
fi
[[ -n $program ]] || fail "lightning-stability is not installed: pip install '.[tuab]' in the project's folder"

run_dir=${EEGPT_RUN_DIR:-$here/eegpt_stable}
mkdir -p "$run_dir"
run_dir=$(cd "$run_dir" && pwd)
log=$run_dir/training.log

fit=("$program" fit --config tuab_stable "--trainer.default_root_dir=$run_dir" "--data.cache_dir=$run_dir/tuab_cache"
    # a line of the progress bar for each batch would fill the log file
    "--trainer.callbacks+=TQDMProgressBar" --trainer.callbacks.refresh_rate=20 --ckpt_path=last_good "$@")
# a mistake in the options is said here, not in a session that closes at once
"${fit[@]}" --print_config >/dev/null || fail "these options are not understood; the session was not started"

# A tmux server that runs already has the environment that it was started with.
environment=()
for name in PATH PYTHONPATH LD_LIBRARY_PATH CUDA_VISIBLE_DEVICES OMP_NUM_THREADS LIGHTNING_STABILITY_CALLBACKS; do
    [[ -z ${!name+x} ]] || environment+=("$name=${!name}")
done
# shellcheck disable=SC2016  # the words are for the shell in the session
in_session='set -o pipefail; log=$1; shift
printf "\n== %s: %s\n" "$(date)" "$*" >>"$log"
"$@" 2>&1 | tee -a "$log"; status=$?
printf "== %s: ended with status %s\n" "$(date)" "$status" >>"$log"'
tmux new-session -d -s "$session" -c "$PWD" env "${environment[@]}" bash -c "$in_session" "$session" "$log" "${fit[@]}"

cat <<END
Started in the tmux session $session.
  look at it     tmux attach -t $session        (leave it with Ctrl-b d; Ctrl-C ends the training)
  how it goes    $here/MONITOR_TRAINING.sh --watch
  its output     $log
  go on later    $0 with the same options
END
