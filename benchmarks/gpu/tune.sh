#!/usr/bin/env bash
# Times variants of the batched engine, and their errors against float64 (tune.py), in the minutes that are left.
#
#     benchmarks/gpu/tune.sh [--rehearse]
exec env SCRIPT=tune "$(dirname "$0")/measure.sh" "$@"
