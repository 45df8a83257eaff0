#!/usr/bin/env bash
# Resolve envs/*.in into envs/*.lock, with hashes, for every platform and Python from 3.11 on.
#   tools/lock.sh .venv/bin/uv
# torch and the packages that only its CUDA build needs stay out: their hashes differ from machine to machine.
set -euo pipefail
uv=$1
compile=("$uv" pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header)
for machine in cpu cuda bench; do
  all=$(mktemp)
  "${compile[@]}" "envs/$machine.in" -o "$all"
  skip=(--no-emit-package torch --no-emit-package triton)
  while read -r name; do skip+=(--no-emit-package "$name"); done < <(grep -oE '^(nvidia|cuda)-[a-z0-9-]+' "$all" | sort -u)
  "${compile[@]}" "${skip[@]}" "envs/$machine.in" -o "envs/$machine.lock"
  rm -f "$all"
done
for name in uv dev azureml lm-eval serve llama; do "${compile[@]}" "envs/$name.in" -o "envs/$name.lock"; done
grep -c == envs/*.lock
