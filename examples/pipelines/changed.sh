#!/usr/bin/env bash
# Translate the drawings below a folder that have no result yet, whatever their names, and print the size of each result.
#     examples/pipelines/changed.sh drawings/ coloured/
set -euo pipefail
mkdir -p "$2"
out=$(realpath "$2")
cd "$1"
find . -name '*.png' -print0 |
    ibmd sample --files-from - --null --output "$out/" --on-exists skip --print0 --quiet |
    xargs -0 --no-run-if-empty stat --printf '%s\t%n\0'
