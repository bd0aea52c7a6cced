#!/usr/bin/env bash
# Makes .gpu/, which holds what a GPU machine without a package registry lacks: packages, Omniglot and photos.
#
#     benchmarks/gpu/prepare.sh [FOLDER]
#
# FOLDER (../shared/data if left out) holds omniglot/images_*.zip and tinyimagenet100.zip.
# Needs a package registry, a C compiler and Python 3.12 (PYTHON312=PATH if it is not on the PATH). At the end it checks
# that .gpu/wheels or machine.txt has every module that the program and the benchmarks import.
set -euo pipefail
cd "$(dirname "$0")/../.."
data=${1:-../shared/data} python=${PYTHON312:-python3.12}
rm -rf .gpu
mkdir -p .gpu/wheels .gpu/data/omniglot
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
"$python" -m venv "$build/venv"
pip() { "$build/venv/bin/pip" --disable-pip-version-check "$@"; }
pip install --quiet "cython>=3.1,<4" setuptools wheel numpy packaging

# The versions that this project is resolved to, without W&B, which logger=none does not need; then the peers.
uv export --quiet --no-dev --no-emit-project --no-hashes --no-annotate --prune wandb > "$build/project.txt"
printf 'higher==0.2.1\ntorchopt==0.7.3\noptree==0.20.0\ngraphviz==0.21\n' > "$build/peers.txt"
"$build/venv/bin/python" benchmarks/gpu/carried.py list "$build/project.txt" "$build/peers.txt" > "$build/missing.txt"
grep -v '^learn2learn==' "$build/missing.txt" > "$build/others.txt"
pip wheel --quiet --no-deps --wheel-dir .gpu/wheels --requirement "$build/others.txt"
# Its published C files do not compile on Python 3.11 and later: its setup.py makes them anew, see pyproject.toml.
pip wheel --quiet --no-deps --no-build-isolation --use-pep517 --config-settings=--global-option=build_ext \
    --wheel-dir .gpu/wheels "$(grep '^learn2learn==' "$build/missing.txt")"

cp "$data"/omniglot/images_background.zip "$data"/omniglot/images_evaluation.zip .gpu/data/omniglot/
cp "$data"/tinyimagenet100.zip .gpu/data/ # ImageNet photos of 64 x 64 pixels: they fit as they are
chmod -R u+w .gpu

"$build/venv/bin/python" benchmarks/gpu/carried.py check
