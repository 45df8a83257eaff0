#!/usr/bin/env bash
# Build the OCI image of containers/Containerfile with docker or podman, whichever is there.
#   tools/image.sh cpu|cuda TORCH [TORCH_BACKEND]
# From the environment: ENGINE (docker or podman), BASE (another base image), ENGINE_ARGS (more options of `build`),
# PIP_FIND_LINKS (a folder of wheels), SSL_CERT_FILE (a bundle of certificates; used for the build, not kept in the image).
set -euo pipefail
cd "$(dirname "$0")/.."
machine=$1 torch=$2 backend=${3:-}
# The machine that builds the image need not have the GPU that will run it.
if [ "$machine" = cuda ] && [ "$backend" = auto ]; then backend=cu130; fi

engine=${ENGINE:-}
for candidate in docker podman; do
  if [ -z "$engine" ] && "$candidate" info >/dev/null 2>&1; then engine=$candidate; fi
done
if [ -z "$engine" ]; then
  echo "image: neither docker nor podman works here (\`docker info\`, \`podman info\`): install one, for example podman." >&2
  exit 1
fi

cuda=docker.io/nvidia/cuda:13.0.1-base-ubuntu24.04@sha256:f8ef28f579ea42a44b415d2c5d46f788e6a9b395c6c83f2929416e1fc192c143
base=${BASE:-$([ "$machine" = cuda ] && echo $cuda || true)}
empty=$(mktemp -d)
trap 'rm -rf "$empty"' EXIT
revision=$(git rev-parse HEAD 2>/dev/null || echo unknown)
git diff --quiet HEAD -- envs containers 2>/dev/null || revision+=-changed
# Never with a user name or password that the remote's address may hold.
source=$(git remote get-url origin 2>/dev/null | sed -E 's#^([a-z]+://)[^/]*@#\1#' || true)

options=(
  --build-arg "MACHINE=$machine" --build-arg "TORCH=$torch" --build-arg "TORCH_BACKEND=$backend"
  --build-arg "REVISION=$revision" --build-arg "SOURCE=${source:-unknown}"
  --build-context "wheels=${PIP_FIND_LINKS:-$empty}"
)
if [ -n "$base" ]; then options+=(--build-arg "BASE=$base"); fi
if [ -n "${SSL_CERT_FILE:-}" ]; then options+=(--secret "id=ca,src=$SSL_CERT_FILE"); fi
# shellcheck disable=SC2086 # several options in one variable
"$engine" build --file containers/Containerfile --tag "slmake:$machine" "${options[@]}" ${ENGINE_ARGS:-} envs
echo "image: slmake:$machine, $("$engine" image inspect --format '{{.Size}}' "slmake:$machine" | awk '{printf "%.2f GB", $1 / 1e9}')," \
  "$("$engine" image inspect --format '{{.Id}}' "slmake:$machine") ($engine)"
