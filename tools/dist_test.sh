#!/usr/bin/env bash
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: dist_test.sh CONFIG CHECKPOINT GPUS [flags of test.py]

Run test.py in GPUS processes on this machine, by torchrun. Without a GPU the
processes work on CPUs.

environment:
  NNODES        machines (1); start this script on each of them
  NODE_RANK     number of this machine, from 0 (0)
  MASTER_ADDR   address of machine 0 (127.0.0.1)
  PORT          port on machine 0 (a free one, or 29500 if MASTER_ADDR or
                NNODES is set)
  PYTHON        the interpreter (python)
TEXT
}

case "${1:-}" in
    -h | --help)
        usage
        exit 0
        ;;
esac
if (( $# < 3 )); then
    usage >&2
    exit 2
fi
gpus=$3
nnodes=${NNODES:-1}
node_rank=${NODE_RANK:-0}
for setting in "GPUS=$gpus" "NNODES=$nnodes"; do
    if [[ ! ${setting#*=} =~ ^[1-9][0-9]*$ ]]; then
        echo "${0##*/}: error: $setting must be a whole number from 1" >&2
        exit 2
    fi
done
if [[ ! $node_rank =~ ^[0-9]+$ ]] || (( node_rank >= nnodes )); then
    echo "${0##*/}: error: NODE_RANK=$node_rank must be from 0 to" \
        "NNODES - 1 = $(( nnodes - 1 ))" >&2
    exit 2
fi

if (( nnodes == 1 )) && [[ -z ${PORT:-}${MASTER_ADDR:-} ]]; then
    # The launcher picks a free port, so two runs on a machine do not collide.
    # Without --local-addr it needs a host name that resolves.
    rendezvous=(--standalone --local-addr 127.0.0.1)
else
    rendezvous=(
        --nnodes "$nnodes"
        --node-rank "$node_rank"
        --master-addr "${MASTER_ADDR:-127.0.0.1}"
        --master-port "${PORT:-29500}"
    )
fi

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
exec "${PYTHON:-python}" -m torch.distributed.run \
    "${rendezvous[@]}" --nproc-per-node "$gpus" \
    "$here/test.py" "$1" "$2" --launcher pytorch "${@:4}"
