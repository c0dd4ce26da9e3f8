#!/usr/bin/env bash
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/launchers.sh"
dist_launch align_attention.py 'CONFIG TEACHER IMAGES' "$@"
