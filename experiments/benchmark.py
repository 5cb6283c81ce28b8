"""Measure speed and memory on the machine at hand: the throughput columns of Tables 2, 3 and 5, the cost of merging.

    python experiments/benchmark.py                                           # everything; 45 minutes on two cores
    python experiments/benchmark.py what=[inference] models=[repmlpnet_t224,resmlp_24_224] batch_sizes=[8]
    python experiments/benchmark.py what=[inference] engine=onnxruntime
    python experiments/benchmark.py what=[training]
    python experiments/benchmark.py what=[scaling] threads=1                  # how one layer grows; a quiet minute
    python experiments/benchmark.py what=[segmentation]                       # UperNet before and after merging
    python experiments/benchmark.py what=[precision]                          # float32, bfloat16, int8 (ONNX Runtime)
    python experiments/benchmark.py what=[older] batch_sizes=[8]              # RepMLP in ResNets against ResNets
    python experiments/benchmark.py device=cuda dtype=bfloat16 batch_sizes=[128] engine=compile

Networks are timed in turn within a round, so that a busy moment hits all; medians and quartiles of the rounds are told.
`plain` is RepMLPNet written as a published implementation would (benchmarks/plain_net.py). Speed does not depend on the
weights, which are random. Records go to results/benchmark/measured/; `python analysis/make_benchmark.py` makes tables
of them. What is measured lies in benchmarks/, one file each.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf

from repmlp.runs.launch import mistakes_in_one_line, run_command


@hydra.main(version_base="1.3", config_path="conf", config_name="benchmark")
def main(config: DictConfig) -> None:
    with mistakes_in_one_line():
        # here, so that --help comes without torch
        from benchmarks.bench import Bench
        from benchmarks.settings import check

        options = OmegaConf.to_container(config, resolve=True)
        check(options)
        bench = Bench(options)
        for what in options["what"]:
            importlib.import_module(f"benchmarks.{what}").measure(bench, options)


if __name__ == "__main__":
    run_command(main, Path(__file__).resolve().parents[1])
