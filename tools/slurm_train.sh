#!/usr/bin/env bash
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/launchers.sh"
slurm_launch train.py 'CONFIG' "$@"
