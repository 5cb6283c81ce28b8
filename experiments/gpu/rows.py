"""The rows of the queue by the project's own rules: their keys before they travel, their records when they come back.

    python rows.py pack QUEUE FILE    check that every row is one of the sweep's, write what first.py and second.py read
    python rows.py after FOLDER       take the records of FOLDER into results/, say what is there and what is left

Run in the project's root with its Python. GPU_REHEARSAL=1: tiny networks on a CPU.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path.cwd()))  # the project whose root this is, not an installed one

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from repmlp.branches import WAYS
from repmlp.branches import label as branch_label
from repmlp.runs.key import run_key
from repmlp.runs.launch import register_settings
from repmlp.runs.outcome import run_label
from repmlp.runs.record import BadRecord, read_record, record_path, write_record
from repmlp.runs.sweep import sweep_rows

register_settings()
REHEARSAL = bool(os.environ.get("GPU_REHEARSAL"))
STUDY, SWEEP = "locality_cifar100", "locality"
PRECISION = ["trainer.precision=bf16-mixed"]
TINY = ["data.n_train=256", "recipe.epochs=1", "recipe.warmup_epochs=0", "trainer.accelerator=cpu"]
MODELS = ["repmlpnet_tiny", "resmlp_tiny"] if REHEARSAL else ["repmlpnet_cifar", "resmlp12_cifar"]
BRANCHES = ["[1,3]", "[]", "[3]", "[1]"]
# what does not enter a key: checkpoints from which a row that one call has cut off goes on in the next one on the same
# machine, no pictures for TensorBoard, few evaluations
ROW = [
    *("trainer.checkpoint_every=10", "trainer.kernel_image_every=0"),
    *("trainer.progress_bar=false", f"trainer.threads={1 if REHEARSAL else 4}", "data.download=false"),
]
SEEDS = {SWEEP: "0,1,2"}  # of a sweep's rows that may be asked for; of the small ones:
SMALL_SEEDS = "0,1,2,3,4"
# A guess for rows of the small sweeps, which the first call does not time: seconds to the first step, and of a step
STARTING, SMALL_STEP = 30.0, 0.006
PROBE = [
    *("data=patterns", f"data.n_train={200 if REHEARSAL else 6400}", f"data.n_test={100 if REHEARSAL else 500}"),
    *("trainer.eval_every=1", "trainer.checkpoint_every=1000", "trainer.kernel_image_every=0"),
    *("trainer.progress_bar=false", f"trainer.threads={1 if REHEARSAL else 4}"),
    *(["trainer.accelerator=cpu"] if REHEARSAL else []),
]
# Ways to train, by the names of first.py's figures: what they set. "captured" is the whole step as one CUDA graph,
# "graphed" the network alone.
CAPTURED = ["trainer.graph=true", "trainer.compile=true"]
MODES = {
    "eager": [],
    "compiled": ["trainer.compile=true"],
    "graphed": ["trainer.compile=reduce-overhead"],
    "captured": CAPTURED[:1],
    "captured-compiled": CAPTURED,
    **{f"captured-compiled-{way}": [*CAPTURED, f"trainer.branches={way}"] for way in WAYS[1:]},
}
if REHEARSAL:  # where the last one has to fail
    MODES = {"eager": [], "compiled": ["trainer.compile=true", "trainer.branches=matrix"], "captured": CAPTURED[:1]}
# The modes that the first call times; the others were slower for both networks on an H200, or took too long to compile.
TIMED = list(MODES) if REHEARSAL else ["eager", "graphed", "captured-compiled", "captured-compiled-matrix"]
# Seconds of a row, one at a time, as an H200 would take by its measured step (both branches: 7.0 and 12.2 ms) and the
# time to start, compile and end: for a second call to go by where the first one timed nothing. Rows side by side shared
# the card in turns: n of them took n times as long, all but the compiling.
PLANS = {
    "repmlpnet_cifar": {"mode": "captured-compiled-matrix", "end": 10, "seconds": {"1": 350, "2": 620, "4": 1170}},
    "resmlp12_cifar": {"mode": "captured-compiled-matrix", "end": 10, "seconds": {"1": 560, "2": 1040}},
}
BENCHMARK = (
    ["device=cpu", "batch_sizes=[2]", "what=[inference]", "models=[repmlpnet_cifar]", "forms=[merged]", "rounds=1"]
    if REHEARSAL
    else [
        *("device=cuda", "dtype=bfloat16", "batch_sizes=[128]", "training_batch_sizes=[128]", "rounds=5"),
        *("what=[training,inference]", "models=[repmlpnet_cifar,resmlp12_cifar,repmlpnet_t224,repmlpnet_b224]"),
        "forms=[plain,merged,deployed,train-time]",
    ]
)


def composed(overrides: list[str]) -> dict[str, Any]:
    """Return a row's configuration as ablate.py sees it."""
    with initialize_config_dir(str(Path("experiments/conf").resolve()), version_base="1.3"):
        return OmegaConf.to_container(compose("config", overrides=overrides), resolve=True)


@functools.cache
def sweep(name: str = SWEEP) -> dict[str, dict[str, Any]]:
    """Return the rows of `+sweep=NAME` with all its seeds, key -> configuration."""
    given = [f"+sweep={name}", f"seed={SEEDS.get(name, SMALL_SEEDS)}", *(PRECISION if name == SWEEP else [])]
    if REHEARSAL:
        given += [f"model={','.join(MODELS)}" if name == SWEEP else "model=repmlpnet_tiny", *TINY]
    if REHEARSAL and name == SWEEP:
        given += [f"study={STUDY}"]
    with initialize_config_dir(str(Path("experiments/conf").resolve()), version_base="1.3"):
        whole = compose("config", overrides=[f"+sweep={name}"], return_hydra_config=True)
    configs = [composed(row) for row in sweep_rows(whole.hydra.sweeper.params, given)]
    return {run_key(config): config for config in configs}


def asked(queue: Path) -> list[tuple[str, str]]:
    """Return the lines of a queue, each with its sweep: `sweep=NAME` among its words, or else `locality`."""
    lines = [line for line in queue.read_text().splitlines() if line.strip() and not line.startswith("#")]
    named = [[w.removeprefix("sweep=") for w in line.split() if w.startswith("sweep=")] for line in lines]
    return [(line, name[0] if name else SWEEP) for line, name in zip(lines, named, strict=True)]


def but_trainer(config: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in config.items() if k not in ("trainer", "data")} | {
        "data": {**config["data"], "download": 0}
    }


def pack(queue: Path, file: Path) -> None:
    rows = []
    for line, name in asked(queue):
        known = sweep(name)
        model, kernels, seed, *more = (word for word in line.split() if not word.startswith("sweep="))
        # the sweep itself with one value where it has several: `sweep=` alone would be taken for the group of that name
        overrides = [f"+sweep={name}", f"model={model}", f"model.kernels={kernels}", f"seed={seed}", *ROW]
        if name == SWEEP:
            overrides += [f"study={STUDY}", "trainer.eval_every=20", *PRECISION]
        overrides += (TINY if REHEARSAL else []) + more
        config = composed(overrides)
        key, study = run_key(config), config["study"]
        if not (more and REHEARSAL) and (key not in known or but_trainer(config) != but_trainer(known[key])):
            sys.exit(f"error: {queue.name}: {line!r} is no row of +sweep={name}")
        there = record_path("results", study, key).exists()
        print(f"{key}  {run_label(config)}{': there already' if there else ''}")
        if not there:
            # data.n_train null is all 50,000 images
            steps = (config["data"]["n_train"] or 50_000) // config["recipe"]["batch_size"]
            row = {"key": key, "name": f"{model} {kernels} seed {seed}", "model": model, "overrides": overrides}
            rows.append({**row, "study": study, "epochs": config["recipe"]["epochs"], "steps": steps})
            if name == SWEEP and kernels == BRANCHES[0] and seed == "0":
                rows[-1]["keep"] = True  # weights and heatmaps of these come back
            if name != SWEEP:
                step = config["recipe"]["epochs"] * steps * SMALL_STEP
                rows[-1]["guess"] = {str(n): round(STARTING + n * step) for n in (1, 2, 4)}
    if not rows:
        sys.exit("error: every row of the queue has its record")
    timed = next((row for row in rows if row["model"] in MODELS), rows[0])  # all rows of Table 5 take the same steps
    write_json = {
        "commit": git("rev-parse", "HEAD"),
        "rows": rows,
        "epochs": timed["epochs"],
        "steps": timed["steps"],
        "models": [m for m in MODELS if any(row["model"] == m for row in rows)],
        "branches": BRANCHES,
        "modes": MODES,
        "timed": TIMED,
        "plans": {} if REHEARSAL else PLANS,
        "side_by_side": [2] if REHEARSAL else [2, 4],
        "probe": PRECISION + PROBE,
        "benchmark": BENCHMARK,
    }
    file.write_text(json.dumps(write_json, indent=1) + "\n")


def refusal(path: Path, known: dict[tuple[str, str], dict[str, Any]]) -> str | None:
    """Say why a record is not taken, None where it is; `known`: (study, key) -> configuration."""
    try:
        record = read_record(path)
    except BadRecord as error:
        return str(error)
    if record["dirty"] is not False:
        return f"dirty is {record['dirty']}: the code was not what its commit says"
    commit = record["commit"] or ""
    if subprocess.run(["git", "merge-base", "--is-ancestor", commit, "HEAD"], capture_output=True).returncode:
        return f"its commit {commit[:9] or 'is unknown'}: no commit of this branch"
    key = run_key(record["config"])
    if key != path.stem:
        return f"its configuration has the key {key} by this code"
    if (record["study"], key) not in known:
        return "no row of the queue's sweeps"
    return None


def after(folder: Path) -> None:
    sweeps = dict.fromkeys(name for _, name in asked(Path(__file__).with_name("queue.txt")))
    known = {(config["study"], key): config for name in sweeps for key, config in sweep(name).items()}
    refused = 0
    with tempfile.TemporaryDirectory() as temporary:
        for archive in folder.rglob("*.tar"):
            if archive.name == "records.tar":
                unpack(archive, Path(temporary))
        for path in sorted(Path(temporary).rglob("*.json")):
            if reason := refusal(path, known):
                print(f"REFUSED {path.name}: {reason}")
                refused += 1
                continue
            target = record_path("results", read_record(path)["study"], path.stem)
            if target.exists():
                print(f"{path.stem}: there already, left as it is")
            else:
                write_record(target, json.loads(path.read_text()))
                print(f"{path.stem}: taken")
    keep_pictures_and_weights(folder)
    keep_measurements(folder)
    left = []
    print(f"\n{STUDY} in bfloat16:")
    for key, config in sweep().items():
        row = f"{config['model']['name']:16s} {branch_label(config['model']['kernels']):8s} seed {config['seed']}"
        try:
            record = read_record(record_path("results", STUDY, key))
            print(f"  {row}  top-1 {record['top1_pct']:.2f}, {record['train_seconds']:.0f} s on {record['device']}")
        except FileNotFoundError:
            left.append(row)
    print(f"{len(sweep()) - len(left)} of {len(sweep())} rows are there; left:", *(left or ["nothing"]), sep="\n  ")
    print(
        "\nNext: git add results and commit, then\n"
        "  python analysis/make_tables.py\n"
        "  python analysis/make_benchmark.py\n"
        f"  python analysis/plot_curves.py {STUDY}"
    )
    sys.exit(1 if refused else 0)


def keep_pictures_and_weights(folder: Path) -> None:
    """Heatmaps go to results/STUDY/, float16 weights to outputs/STUDY/KEY/."""
    for archive in folder.rglob("pictures.tar"):
        unpack(archive, Path("results") / STUDY)
        print(f"heatmaps: results/{STUDY}/")
    parts = sorted(folder.rglob("weights.tar.[0-9]"))
    if parts:
        with tempfile.TemporaryDirectory() as temporary:
            whole = Path(temporary) / "weights.tar"
            whole.write_bytes(b"".join(part.read_bytes() for part in parts))
            unpack(whole, Path("outputs") / STUDY)
        print(f"weights in float16: outputs/{STUDY}/KEY/")


def keep_measurements(folder: Path) -> None:
    """Take the benchmark's records, and the timing of the first call, into results/benchmark/."""
    with tempfile.TemporaryDirectory() as temporary:
        for archive in folder.rglob("benchmark.tar"):
            unpack(archive, Path(temporary))
        taken = 0
        for path in Path(temporary).rglob("*.json"):
            if json.loads(path.read_text())["dirty"] is not False:
                print(f"REFUSED {path.name}: the code was not what its commit says")
                continue
            target = Path("results/benchmark/measured") / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
            taken += 1
    if taken:
        print(f"benchmark: {taken} records in results/benchmark/measured/")
    for path in folder.rglob("first.json"):
        told = json.loads(path.read_text())
        if told["device"] != "no GPU" and any(len(epochs) > 2 for epochs in told["probes"].values()):
            name = f"{told['device'].replace(' ', '-')}_{told['commit'][:12]}.json"
            target = Path("results/benchmark/steps") / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(json.dumps(told, indent=1) + "\n")
            print(f"steps: {target}")


def unpack(archive: Path, into: Path) -> None:
    into.mkdir(parents=True, exist_ok=True)
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(into, filter="data")
    except tarfile.TarError as error:
        print(f"REFUSED {archive.name}: no whole archive ({error})")


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["pack", queue, file]:
            pack(Path(queue), Path(file))
        case ["after", folder]:
            after(Path(folder))
        case _:
            sys.exit(__doc__)
