#!/usr/bin/env bash
# Call before the first one: put aside what does not fit beside the halves of the training set (64 MiB travel with a call).
#   bash .gpu/z/before.sh
set -euo pipefail
kit=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
carried=${GPU_WORK:-/tmp}/carried
rm -rf "$carried"
mkdir -p "$carried"
cp -r "$kit"/{cifar,commit,files,git.tgz} "$kit"/*.parquet* "$carried/"
ls -l "$carried"
