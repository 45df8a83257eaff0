#!/usr/bin/env bash
# Turn the OCI image into an Apptainer image: containers/slmake-MACHINE.sif.
#   tools/sif.sh cpu|cuda
# From the environment: ENGINE (docker or podman), MKSQUASHFS_ARGS (options of mksquashfs).
set -euo pipefail
cd "$(dirname "$0")/.."
machine=$1 sif=containers/slmake-$1.sif

if ! builder=$(command -v apptainer || command -v singularity); then
  echo "sif: apptainer is not installed here: see https://apptainer.org/docs/admin/latest/installation.html" >&2
  exit 1
fi
for candidate in ${ENGINE:-docker podman}; do
  if "$candidate" image inspect "slmake:$machine" >/dev/null 2>&1; then engine=$candidate; fi
done
if [ -z "${engine:-}" ]; then
  echo "sif: no image slmake:$machine here: \`make image MACHINE=$machine\` builds it." >&2
  exit 1
fi

work=$(mktemp -d "containers/.sif.XXXXXX")
trap 'rm -rf "$work"' EXIT
"$engine" save --output "$work/image.tar" "slmake:$machine"
APPTAINER_TMPDIR=$PWD/$work APPTAINER_CACHEDIR=$PWD/$work/cache \
  "$builder" build ${MKSQUASHFS_ARGS:+--mksquashfs-args "$MKSQUASHFS_ARGS"} "$work/new.sif" "docker-archive:$work/image.tar"
mv "$work/new.sif" "$sif"
