# What dist_{train,test}.sh and slurm_{train,test}.sh share; to be sourced.

tools=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)

fail() {
    echo "${0##*/}: error: $*" >&2
    exit 2
}

check_count() {
    [[ $2 =~ ^[1-9][0-9]*$ ]] || fail "$1=$2 must be a whole number from 1"
}

# check_usage TEXT NUMBER ARGUMENTS: print TEXT and exit if help is asked for,
# or if there are fewer than NUMBER arguments.
check_usage() {
    local text=$1 number=$2
    shift 2
    case "${1:-}" in
        -h | --help)
            echo "$text"
            exit 0
            ;;
    esac
    if (( $# < number )); then
        echo "$text" >&2
        exit 2
    fi
}

# dist_launch SCRIPT PATHS ARGUMENTS: ARGUMENTS begin with the script's PATHS
# (their names, separated by blanks) and the number of processes.
dist_launch() {
    local script=$1 names paths
    read -r -a names <<< "$2"
    paths=${#names[@]}
    shift 2
    check_usage "usage: ${0##*/} ${names[*]} GPUS [flags of $script]

Run $script in GPUS processes on this machine, by torchrun. Without a GPU the
processes work on CPUs.

environment:
  NNODES        machines (1); start this script on each of them
  NODE_RANK     number of this machine, from 0 (0)
  MASTER_ADDR   address of machine 0 (127.0.0.1)
  PORT          port on machine 0 (a free one, or 29500 if MASTER_ADDR or
                NNODES is set)
  MAX_RESTARTS  how often to start all processes again after one has died
                (0); a training goes on from its last checkpoint
  PYTHON        the interpreter (python)" $(( paths + 1 )) "$@"
    local gpus=${*:paths+1:1} nnodes=${NNODES:-1} node_rank=${NODE_RANK:-0}
    check_count GPUS "$gpus"
    check_count NNODES "$nnodes"
    # 10#: a number with a 0 in front is not an octal one.
    if [[ ! $node_rank =~ ^[0-9]+$ ]] || (( 10#$node_rank >= nnodes )); then
        fail "NODE_RANK=$node_rank must be from 0 to NNODES - 1 =" \
            "$(( nnodes - 1 ))"
    fi
    local rendezvous restarts=${MAX_RESTARTS:-0}
    if [[ ! $restarts =~ ^[0-9]+$ ]]; then
        fail "MAX_RESTARTS=$restarts must be a whole number from 0"
    fi
    node_rank=$(( 10#$node_rank )) restarts=$(( 10#$restarts ))
    if (( nnodes == 1 )) && [[ -z ${PORT:-}${MASTER_ADDR:-} ]]; then
        # The launcher picks a free port, so two runs on a machine do not
        # collide. Without --local-addr it needs a host name that resolves.
        rendezvous=(--standalone --local-addr 127.0.0.1)
    else
        rendezvous=(
            --nnodes "$nnodes"
            --node-rank "$node_rank"
            --master-addr "${MASTER_ADDR:-127.0.0.1}"
            --master-port "${PORT:-29500}"
        )
    fi
    if (( restarts > 0 )); then
        if (( nnodes > 1 )); then
            fail "MAX_RESTARTS is for one machine: with NNODES=$nnodes the" \
                "launchers do not agree on a new start; start this script" \
                "again on each machine, with --resume"
        fi
        rendezvous+=(--max-restarts "$restarts")
        # Else the processes of the next start get the store of the former
        # ones (seen in torch 2.11), read where those listened, and fail or
        # wait for ever.
        export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    fi
    # What is older is not a checkpoint of this run: see mmrpa/elastic.py.
    MMRPA_LAUNCHED=$(date +%s)
    export MMRPA_LAUNCHED
    exec "${PYTHON:-python}" -m torch.distributed.run \
        "${rendezvous[@]}" --nproc-per-node "$gpus" "$tools/$script" \
        "${@:1:paths}" --launcher pytorch "${@:paths+2}"
}

# slurm_launch SCRIPT PATHS ARGUMENTS: ARGUMENTS begin with the partition, the
# name of the job and the script's PATHS.
slurm_launch() {
    local script=$1 names paths
    read -r -a names <<< "$2"
    paths=${#names[@]}
    shift 2
    check_usage "usage: ${0##*/} PARTITION JOB_NAME ${names[*]} \
[flags of $script]

Run $script as a Slurm job, one process a GPU.

environment:
  GPUS            processes in all (8)
  GPUS_PER_NODE   processes on a machine (8, or GPUS if that is less)
  CPUS_PER_TASK   CPU cores of a process (5)
  SRUN_ARGS       further arguments of srun, split at blanks
  PYTHON          the interpreter (python)" $(( paths + 2 )) "$@"
    local gpus=${GPUS:-8} srun_args
    check_count GPUS "$gpus"
    local gpus_per_node=${GPUS_PER_NODE:-$(( gpus < 8 ? gpus : 8 ))}
    read -r -a srun_args <<< "${SRUN_ARGS:-}"
    exec srun \
        --partition="$1" \
        --job-name="$2" \
        --gres=gpu:"$gpus_per_node" \
        --ntasks="$gpus" \
        --ntasks-per-node="$gpus_per_node" \
        --cpus-per-task="${CPUS_PER_TASK:-5}" \
        --kill-on-bad-exit=1 \
        "${srun_args[@]}" \
        "${PYTHON:-python}" -u "$tools/$script" \
        "${@:3:paths}" --launcher slurm "${@:paths+3}"
}
