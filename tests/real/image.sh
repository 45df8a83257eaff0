#!/usr/bin/env bash
# Build the image of containers/Containerfile and its .sif without a registry: the base is made on the spot from Debian's
# packages (mmdebstrap), imported with podman, and given as the build argument BASE.
set -euo pipefail
cd "$(dirname "$0")/../.."
base=localhost/slmake-base:bookworm
if ! podman image exists $base; then
  tar=$(mktemp --suffix .tar)
  trap 'rm -f "$tar"' EXIT
  mmdebstrap --quiet --variant=minbase --include=python3,python3-venv,ca-certificates bookworm "$tar"
  podman import --quiet "$tar" $base
fi
# Where containers cannot be nested (in a virtual machine or another container), steps run in a chroot on the host's network.
BASE=$base ENGINE=podman ENGINE_ARGS="--isolation=chroot --network=host --quiet" make image MACHINE=cpu
MKSQUASHFS_ARGS="-comp zstd -Xcompression-level 3" make sif MACHINE=cpu
