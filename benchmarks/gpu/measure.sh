#!/usr/bin/env bash
# Measures this program on a GPU by one command of at most nine minutes, whose steps are those of measure.py.
#
#     benchmarks/gpu/measure.sh [STEP ...]      # on the GPU machine, with .gpu/ beside it; results in $OUT (outputs/gpu)
#     benchmarks/gpu/measure.sh --rehearse      # the same steps, tiny, on this machine's CPU; see rehearsal.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
export OUT=${OUT:-outputs/gpu} PYTHONUNBUFFERED=1
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
python=python3
if [[ " $* " == *" --rehearse "* ]]; then
    [[ -d .gpu-rehearsal ]] || benchmarks/gpu/rehearsal.sh
    python=.gpu-rehearsal/bin/python
    export OMP_NUM_THREADS=1 REHEARSE=1
fi
unset VIRTUAL_ENV PYTHONDONTWRITEBYTECODE
"$python" -m pip install --quiet --disable-pip-version-check --root-user-action=ignore --no-index --no-deps \
    --no-compile --target "$site" .gpu/wheels/*.whl
export PYTHONPATH=$site:src:benchmarks
mkdir -p "$OUT"
"$python" "benchmarks/gpu/${SCRIPT:-measure}.py" "$@"
