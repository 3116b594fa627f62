#!/usr/bin/env bash
# Runs the README's first command, made small, with the Python in $1: a user has newer versions of fastai and
# fastcore than the development tools allow. Prints what the command has written if it fails.
set -uo pipefail
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
options=(--epochs 1 --d_model 16 --n_heads 2 --n_layers 1 --seq_len 64 --bs 64)
if ! "$1" "$(command -v bijdiff_train)" "${options[@]}" --out "$out/model" > "$out/log" 2>&1; then
  cat "$out/log"
  exit 1
fi
