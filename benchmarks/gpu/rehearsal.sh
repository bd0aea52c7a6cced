#!/usr/bin/env bash
# Makes .gpu-rehearsal/, a Python 3.12 for rehearsals, which has no packages but those in machine.txt.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON312:-python3.12}
rm -rf .gpu-rehearsal
uv venv --quiet --seed --python "$python" .gpu-rehearsal
listed() { sed 's/[=#].*//' benchmarks/gpu/machine.txt | tr -d ' '; }
# The packages that the steps use, in the machine's versions where machine.txt names them.
uv pip install --quiet --python .gpu-rehearsal/bin/python --constraint benchmarks/gpu/machine.txt torch torchvision \
    pytorch-lightning torchmetrics numpy scipy matplotlib pillow rich pyyaml joblib cloudpickle requests tqdm safetensors \
    jax jinja2 filelock pandas setuptools packaging python-dateutil
for name in $(uv pip list --quiet --python .gpu-rehearsal/bin/python --format freeze | sed 's/==.*//'); do
    if ! listed | grep -qixF "$name"; then
        case $name in nvidia-*) ;; *) uv pip uninstall --quiet --python .gpu-rehearsal/bin/python "$name" && echo "hidden: $name" ;; esac
    fi
done
