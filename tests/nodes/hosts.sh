#!/usr/bin/env bash
# usage: hosts.sh up NAME | hosts.sh down NAME
# Two network namespaces, NAME-0 with address 10.77.0.1 and NAME-1 with 10.77.0.2, joined by a link NAME-0 = NAME-1: two
# hosts, as far as the network goes. They share this machine's files. As root; needs iproute2.
set -euo pipefail
name=$2
case $1 in
    up)
        trap '"$0" down "$name"' ERR
        for host in 0 1; do ip netns add "$name-$host"; done
        ip link add "$name-0" netns "$name-0" type veth peer name "$name-1" netns "$name-1"
        for host in 0 1; do
            ip -n "$name-$host" address add "10.77.0.$((host + 1))/24" dev "$name-$host"
            ip -n "$name-$host" link set "$name-$host" up
            ip -n "$name-$host" link set lo up
        done
        ;;
    down)
        for host in 0 1; do
            for process in $(ip netns pids "$name-$host" 2> /dev/null); do kill -KILL "$process" 2> /dev/null || true; done
            ip netns delete "$name-$host" 2> /dev/null || true
        done
        ;;
esac
