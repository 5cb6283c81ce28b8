#!/usr/bin/env bash
# Take what came back from the GPU machine into the project. In its root:
#   bash experiments/gpu/after.sh FOLDER
set -euo pipefail
kit=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
[[ -e experiments/ablate.py ]] || { echo "error: run this in the project's root" >&2; exit 1; }
exec "${PYTHON:-.venv/bin/python}" "$kit/rows.py" after "${1:?folder of the files that came back}"
