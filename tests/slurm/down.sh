#!/usr/bin/env bash
# usage: down.sh DIR  stops the daemons that up.sh DIR started
D=$1
for n in slurmd slurmctld munged; do p=$(cat "$D/run/$n.pid" 2>/dev/null) && kill "$p" && while kill -0 "$p" 2>/dev/null; do sleep 0.1; done; done; true
