#!/usr/bin/env bash
# Both calls, and what comes after them, on a machine without GPU: tiny networks, one epoch, real CIFAR-100.
#   DATA=FOLDER bash experiments/gpu/rehearse.sh     in the project's root, after any change of it, committed or not; 3 to 5 minutes
# GPU_PYTHON=FILE: a Python that has what the GPU machine's has (packages.txt); otherwise those packages of .venv that
# the GPU machine has too. PYTHON: the project's own, .venv/bin/python. Compilation is switched off: it takes minutes here.
set -euo pipefail
kit=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export PYTHON=${PYTHON:-$PWD/.venv/bin/python} GPU_REHEARSAL=1
began=$(date +%s)
: "${DATA:?the folder of CIFAR-100 as shards: parquet/ and heads/}"
DATA=$(cd "$DATA" && pwd)
export DATA
[[ -e experiments/ablate.py ]] || { echo "error: run this in the project's root" >&2; exit 1; }
root=$(mktemp -d /tmp/rehearsal.XXXX)
trap 'status=$?; ((status)) && echo "REHEARSAL FAILED, see $root" || rm -rf "$root"; exit $status' EXIT

say() { echo "-- $(($(date +%s) - began)) s: $*"; }
check() { # check WHAT COMMAND...
    local what=$1
    shift
    "$@" || { echo "NOT SO: $what" >&2; exit 1; }
    echo "   ok: $what"
}
records() { tar -tf "$1/records.tar" 2>/dev/null | wc -l; }
few_files() { # the limits of what goes back
    (($(find "$1" -type f | wc -l) <= 8)) && [[ -z $(find "$1" -type f -size +16M) ]]
}

say "a copy of the project with what is not committed yet"
git clone --quiet . "$root/p" 2>/dev/null
git ls-files -z --cached --others --exclude-standard | tar -c --null --ignore-failed-read -T - 2>/dev/null | tar -x -C "$root/p"
cd "$root/p"
export PYTHONPATH=$PWD
git add -A
git -c user.name=rehearsal -c user.email=none commit --quiet --message rehearsal >/dev/null || true

say "pack"
bash "$kit/pack.sh" "$kit/queue.rehearsal.txt" | tail -n 6

say "a machine that has the listed packages and no git"
mkdir "$root/m" "$root/bin" "$root/home"
if [[ -z ${GPU_PYTHON:-} ]]; then
    "$PYTHON" -m venv --without-pip "$root/venv"
    "$PYTHON" - "$kit/packages.txt" "$root"/venv/lib/python3*/site-packages <<'PYTHON'
import sys
from importlib.metadata import distributions
from pathlib import Path

listed = {name.replace("_", "-").lower() for name in Path(sys.argv[1]).read_text().split()}
for each in distributions():
    if (name := each.name.replace("_", "-").lower()) in listed or name.startswith(("nvidia", "cuda", "tensorboard")):
        tops = {f.parts[0] for f in each.files or () if f.parts[0] not in ("..", "__pycache__")}
        for top in tops:
            link, there = Path(sys.argv[2]) / top, Path(each.locate_file(top))
            if there.exists() and not link.exists():
                link.symlink_to(there)
PYTHON
    "$root/venv/bin/python" -c "import pyarrow" 2>/dev/null \
        || "$PYTHON" -m pip install --quiet --disable-pip-version-check --target "$root/venv/lib/pyarrow" pyarrow 2>/dev/null
    [[ -d $root/venv/lib/pyarrow ]] && echo "$root/venv/lib/pyarrow" >"$(echo "$root"/venv/lib/python3*/site-packages)/pyarrow.pth"
    GPU_PYTHON=$root/venv/bin/python
fi
printf '#!/bin/sh\nexec %s "$@"\n' "$GPU_PYTHON" >"$root/bin/python3"
chmod +x "$root/bin/python3"
cp -rs /usr/bin "$root/tools" && rm -f "$root"/tools/git* "$root"/tools/python3*
git archive HEAD | tar -x -C "$root/m"
mkdir "$root/m/.gpu"
call() { # call PART OUT COMMAND...: as the GPU machine runs it
    local part=$1 out=$2
    shift 2
    rm -rf "$root/m/.gpu/$part"
    cp -r "$root/p/.gpu/$part" "$root/m/.gpu/"
    mkdir -p "$out"
    (cd "$root/m" && exec env -i PATH="$root/bin:$root/tools" HOME="$root/home" OUT="$out" GPU_WORK="$root/w" \
        OMP_NUM_THREADS=1 TORCH_COMPILE_DISABLE=1 "$@")
}

say "call 0"
call z "$root/out0" bash .gpu/z/before.sh >/dev/null

say "call 1 without probes, then with them"
call a "$root/out1" bash .gpu/a/first.sh 0 | grep "no probes"
check "its half of the data is decoded" test -e "$root"/w/parts/train-00000-of-00002.raw -a ! -e "$root/w/plan.json"
call a "$root/out1" bash .gpu/a/first.sh 240
check "both networks are planned" test "$(grep -c '"seconds"' "$root/w/plan.json")" = 2
check "few enough files come back" few_files "$root/out1"
check "a mode that this machine cannot do is named" grep -q 'captured: NOT READY.*has no CUDA graphs' "$root/out1/first.log"

say "call 2, stopped when the first row is finished"
call b "$root/out2" timeout 200 bash .gpu/b/second.sh 190 &
caller=$!
for _ in $(seq 150); do (($(records "$root/out2"))) && break || sleep 1; done
pid=$(pgrep -f "^[^ ]*python[0-9.]* $root/m/.gpu/b/second.py" | head -n 1)
kill -KILL "$pid"
wait $caller || echo "   ended with status $?"
check "its record has come back" test "$(records "$root/out2")" -ge 1
check "nothing of it runs on" test -z "$(sleep 1; pgrep -f "experiments/ablate.py.*$root/w" || true)"
done_before=$(records "$root/out2")

say "call 2 once more: the rest, with a row that fails"
call b "$root/out3" timeout 200 bash .gpu/b/second.sh 190
check "four rows of five are there, one of another sweep" test "$(records "$root/out3")" = 4
check "the failed one is named" grep -q 'FAILED repmlpnet_tiny \[1\]' "$root/out3/second.log"
check "finished rows were not run again" test "$(grep -c '  start ' "$root/out3/second.log")" -le $((6 - done_before))
check "heatmaps and weights come back" test -e "$root/out3/pictures.tar" -a -e "$root/out3/weights.tar.0"
check "few enough files come back" few_files "$root/out3"

say "call 2 with too little time, stopped by the machine's own limit"
rm -rf "$root"/w/p/results/{locality,small_more_data}_cifar100 "$root/w/p/outputs"
call b "$root/out4" timeout 200 bash .gpu/b/second.sh 190 &
caller=$!
# a second after the first row has started, on any machine: a fixed time was enough for whole rows on a quick one
for _ in $(seq 600); do grep -qs '  start ' "$root/out4/second.log" && break || sleep 0.2; done
sleep 1
kill -TERM "$(pgrep -f "^[^ ]*python[0-9.]* $root/m/.gpu/b/second.py" | head -n 1)"
wait $caller || echo "   ended with status $?"
check "it says what was cut off" grep -q 'cut off' "$root/out4/second.log"

say "after"
bash "$kit/after.sh" "$root/out3" | sed 's/^/   /'
keys=$(ls results/locality_cifar100/records | wc -l)
check "two or three records are in results/" test "$keys" -ge 2
check "that of the other sweep is in its study" test "$(git ls-files --others results/small_more_data_cifar100 | wc -l)" = 1
mkdir -p "$root/bad/records"
tar -xf "$root/out3/records.tar" -C "$root/bad/records"
cd "$root/bad/records/locality_cifar100/records"
first=$(ls | head -n 1) second=$(ls | tail -n 1)
head -c 1000 "$first" >damaged.json
sed 's/"dirty": false/"dirty": true/' "$second" >"$first.tmp" && mv "$first.tmp" "$second"
sed 's/"seed": 0/"seed": 1/' "$first" >other.tmp && mv other.tmp "$first"
tar -cf "$root/bad/records.tar" ./*.json
cd "$root/p"
bash "$kit/after.sh" "$root/bad" >"$root/refused" && exit 1
grep REFUSED "$root/refused" | sed 's/^/   /'
check "damaged, dirty and changed records are refused" test "$(grep -c REFUSED "$root/refused")" -ge 3

say "the sweep itself finds these rows finished"
"$PYTHON" experiments/ablate.py +sweep=locality model=repmlpnet_tiny 'model.kernels=[],[1,3]' data.n_train=256 \
    recipe.epochs=1 recipe.warmup_epochs=0 trainer.accelerator=cpu trainer.precision=bf16-mixed data.root="$root/w/cifar" \
    2>&1 | tee "$root/sweep" | sed 's/^/   /'
check "two rows are skipped" grep -q '2 runs: 2 skipped' "$root/sweep"
"$PYTHON" analysis/make_tables.py --study locality_cifar100 | sed 's/^/   /'
say "PASSED"
