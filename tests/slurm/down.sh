#!/usr/bin/env bash
# usage: down.sh DIR  stops the daemons that up.sh DIR started
for file in "$1"/run/{slurmd-*,slurmctld,munged}.pid; do
    p=$(cat "$file" 2>/dev/null) && kill "$p" && while kill -0 "$p" 2>/dev/null; do sleep 0.1; done
done
true
