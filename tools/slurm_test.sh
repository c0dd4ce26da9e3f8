#!/usr/bin/env bash
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: slurm_test.sh PARTITION JOB_NAME CONFIG CHECKPOINT [flags of test.py]

Run test.py as a Slurm job, one process a GPU.

environment:
  GPUS            processes in all (8)
  GPUS_PER_NODE   processes on a machine (8, or GPUS if that is less)
  CPUS_PER_TASK   CPU cores of a process (5)
  SRUN_ARGS       further arguments of srun, split at blanks
  PYTHON          the interpreter (python)
TEXT
}

case "${1:-}" in
    -h | --help)
        usage
        exit 0
        ;;
esac
if (( $# < 4 )); then
    usage >&2
    exit 2
fi

gpus=${GPUS:-8}
if [[ ! $gpus =~ ^[1-9][0-9]*$ ]]; then
    echo "${0##*/}: error: GPUS=$gpus must be a whole number from 1" >&2
    exit 2
fi
gpus_per_node=${GPUS_PER_NODE:-$(( gpus < 8 ? gpus : 8 ))}
read -r -a srun_args <<< "${SRUN_ARGS:-}"

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
exec srun \
    --partition="$1" \
    --job-name="$2" \
    --gres=gpu:"$gpus_per_node" \
    --ntasks="$gpus" \
    --ntasks-per-node="$gpus_per_node" \
    --cpus-per-task="${CPUS_PER_TASK:-5}" \
    --kill-on-bad-exit=1 \
    "${srun_args[@]}" \
    "${PYTHON:-python}" -u "$here/test.py" "$3" "$4" --launcher slurm "${@:5}"
