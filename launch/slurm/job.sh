# What the batch scripts beside this file share: sourced by them, inside of a job. See launch/README.md.

STOPPED=85  # the ranks' exit code when they were asked to stop: a checkpoint is written, and the job goes on later

fail() {  # what is wrong, how to fix it
  printf '%s\n    fix: %s\n' "$1" "$2" >&2
  exit 2
}

[ -n "${SLURM_JOB_ID:-}" ] || fail "this script runs as a SLURM job" "sbatch ${0##*/} ..."
if [ -n "${SPEFT_PYTHON:-}" ]; then
  python=$SPEFT_PYTHON
elif [ -x "$root/.venv/bin/python" ]; then
  python=$root/.venv/bin/python
else
  python=python
fi
found=$(command -v "$python") ||
  fail "no Python environment: $python" "run make in $root, or export SPEFT_PYTHON=/path/of/python"
export PATH=${found%/*}:$PATH  # DeepSpeed looks for ninja there

train() {  # recipe, key=value ...
  local folder
  folder=$(run_folder "$@") || exit 2
  log_to "$folder"
  run_ranks train.py --recipe "$1" --resume auto "${@:2}"
}

run_folder() {  # recipe, key=value ...: its output_dir
  local words=() word resolved
  for word; do [[ $word == --* ]] || words+=("$word"); done
  resolved=$(PYTHONPATH=$root "$python" -P -m speft_ds.cli.main show "${words[@]}" --plain) || return
  "$python" -c 'import sys, yaml; print(yaml.safe_load(sys.stdin)["output_dir"])' <<<"$resolved"
}

log_to() {  # folder: what follows is written to a file in it
  local id=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}
  mkdir -p "$1" || exit 1
  echo "log: $1/slurm-$id.out"
  exec >>"$1/slurm-$id.out" 2>&1
  echo "$(date '+%F %T') job $id on $SLURM_JOB_NODELIST, restart ${SLURM_RESTART_COUNT:-0}"
}

run_ranks() {  # script, arguments: run it as one task per rank, and end the job as it ends
  # srun takes this from its own variable only.
  [ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
  # A signal must not kill a rank whose Python has not come up yet.
  srun --kill-on-bad-exit=1 bash -c 'trap "" TERM USR1; exec "$@"' rank "$python" "$root/launch/$1" "${@:2}" &
  local step=$! code told=yes
  # SLURM signals the ranks itself. What comes to this shell alone goes on to them: as USR1, since TERM makes
  # srun kill them.
  trap 'told=yes; kill -USR1 $step' TERM USR1
  while [ -n "$told" ]; do  # a signal ends the wait before the ranks have ended
    told=
    wait $step
    code=$?
  done
  echo "$(date '+%F %T') the ranks ended with $code"
  [ $code -ne $STOPPED ] || requeue
  exit $code
}

requeue() {  # have SLURM run this job again, unless it does so by itself or is ending the job for good
  scontrol show config | grep -qE "^RequeueExit +=(.*[ ,])?$STOPPED(,|$)" && return
  [ "$(squeue --noheader --job="$SLURM_JOB_ID" --format=%T)" = RUNNING ] || return
  scontrol requeue "$SLURM_JOB_ID" || echo "to go on: sbatch the same again"
}
