#!/usr/bin/env bash
# For what is left of the GPU's minutes: variants of the batched engine, each timed and held against float64 (tune.py).
#
#     benchmarks/gpu/tune.sh [--rehearse]
exec env SCRIPT=tune "$(dirname "$0")/measure.sh" "$@"
