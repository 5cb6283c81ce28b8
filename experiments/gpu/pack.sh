#!/usr/bin/env bash
# Build .gpu/z, .gpu/a and .gpu/b, which travel to the GPU machine with the call before, the first and the second. In the project's root:
#   DATA=FOLDER bash experiments/gpu/pack.sh [QUEUE]
set -euo pipefail
kit=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
queue=${1:-$kit/queue.txt}
data=${DATA:?the folder of CIFAR-100 as shards: parquet/ and heads/ (see the README)}
python=${PYTHON:-.venv/bin/python}
limit=$((63 * 1024 * 1024))  # bytes a call, of 64 MiB
end=$((6 * 1024 * 1024))     # bytes of either half of the training set that travel with call 0

die() { echo "error: $*" >&2; exit 1; }
bytes() { du -sb --apparent-size "$@" | awk '{sum += $1} END {print sum}'; }

[[ -e experiments/ablate.py && -e .git ]] || die "run this in the project's root"
[[ $(uname -m) == x86_64 ]] || die "the GPU machine is x86-64, and so has to be the git that travels"
[[ -z $(git status --porcelain -- ':/' ':(top,exclude)results') ]] \
    || die "commit first: the rows are trained by the commit that travels, and records name it"
[[ -d $data/parquet ]] || die "no CIFAR-100 in $data: DATA=FOLDER with parquet/ and heads/"
exclude=$(git rev-parse --git-path info/exclude)
mkdir -p "$(dirname "$exclude")"
grep -qx '/.gpu/' "$exclude" 2>/dev/null || echo '/.gpu/' >>"$exclude"
rm -rf .gpu/z .gpu/a .gpu/b
mkdir -p .gpu/z/cifar .gpu/a .gpu/b

# What the GPU machine's Python lacks, at the versions of requirements.lock.
if [[ ! .gpu/wheels/.ready -nt requirements.lock ]]; then
    rm -rf .gpu/wheels
    "$python" -m pip wheel --quiet --no-deps --disable-pip-version-check --wheel-dir .gpu/wheels \
        --constraint <(sed 's/ ;.*//' requirements.lock) hydra-core omegaconf antlr4-python3-runtime 2>&1 \
        | grep -v '^WARNING: Location' >&2 || true
    (($(ls .gpu/wheels/*-none-any.whl | wc -l) == 3)) || die "three wheels of pure Python are needed: $(ls .gpu/wheels)"
    touch .gpu/wheels/.ready
fi
cp -r .gpu/wheels .gpu/a/

# The commit: its own text and the list of its files, from which first.sh makes it again out of the tree, which travels
# with every call. No file twice: the limit is near.
git cat-file commit HEAD >.gpu/z/commit
git ls-tree -r HEAD >.gpu/z/files
# git itself, for a machine that has none: records name the commit
libraries=$(ldd "$(command -v git)" | awk '/libpcre2|libz/ {print $3}')
tar -czhf .gpu/z/git.tgz --transform 's,.*/,,' -P "$(readlink -f "$(command -v git)")" $libraries

# the tests that are skipped where there is no GPU
grep -A1 'skipif(not torch.cuda.is_available' tests/test_*.py | sed -n 's/^\(.*\.py\)-def \(test_\w*\).*/\1::\2/p' >.gpu/a/gpu_tests
cp "$kit"/{env.sh,kit.py,cifar.py,first.sh,first.py,probe.py} .gpu/a/
cp "$kit"/{env.sh,kit.py,cifar.py,second.sh,second.py,keep.py} .gpu/b/
"$python" "$kit/rows.py" pack "$queue" .gpu/kit.json
cp .gpu/kit.json .gpu/a/
cp .gpu/kit.json .gpu/b/

# CIFAR-100: half of the training set with each call, but for the ends of the halves; these, the test set and the commit
# with the one before.
cp "$kit/before.sh" .gpu/z/
cp "$data"/heads/* .gpu/z/cifar/
cp "$data"/parquet/test-00000-of-00001.parquet .gpu/z/
for part in a:train-00000-of-00002.parquet b:train-00001-of-00002.parquet; do
    call=${part%%:*} shard=${part#*:}
    head --bytes=-"$end" "$data/parquet/$shard" >".gpu/$call/$shard.head"
    tail --bytes="$end" "$data/parquet/$shard" >".gpu/z/$shard.tail"
done
tree=$(git ls-files -z --cached --others --exclude-standard | du -cb --files0-from=- | tail -n 1 | cut -f 1)
for call in z a b; do
    over=$(($(bytes .gpu/$call) + tree - limit))
    ((over <= 0)) || die ".gpu/$call and the tree are $over bytes too large"
done

mib() { awk "BEGIN {printf \"%.1f MiB\", $1 / 1048576}"; }
cat <<EOF

packed: commit $(git rev-parse --short HEAD); tree $(mib "$tree"), .gpu/z $(mib "$(bytes .gpu/z)"), .gpu/a $(mib "$(bytes .gpu/a)"), .gpu/b $(mib "$(bytes .gpu/b)")
(the tree and one of them travel with a call, 64 MiB at most)
call 0: carry .gpu/z, limit 60 s
    bash .gpu/z/before.sh
call 1: carry .gpu/a, at once after it, limit 240 s
    bash .gpu/a/first.sh 160
call 2: carry .gpu/b, at once after it; T = what is left of the 15 minutes less 45 s, at most 600; limit T s
    bash .gpu/b/second.sh \$((T - 25))
EOF
