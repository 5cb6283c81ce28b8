"""Measure speed and memory on the machine at hand: the throughput columns of Tables 2, 3 and 5, the cost of merging.

    python experiments/benchmark.py                                           # everything; 45 minutes on two cores
    python experiments/benchmark.py what=[inference] models=[repmlpnet_t224,resmlp_24_224] batch_sizes=[8]
    python experiments/benchmark.py what=[inference] engine=onnxruntime
    python experiments/benchmark.py what=[training]
    python experiments/benchmark.py what=[segmentation]                       # UperNet before and after merging
    python experiments/benchmark.py what=[older] batch_sizes=[8]              # RepMLP in ResNets against ResNets
    python experiments/benchmark.py device=cuda dtype=bfloat16 batch_sizes=[128] engine=compile

Networks are timed in turn within a round, so that a busy moment hits all; medians and quartiles of the rounds are told.
`plain` is RepMLPNet written as a published implementation would (plain_net.py). Speed does not depend on the weights,
which are random. Records go to results/benchmark/measured/; `python analysis/make_benchmark.py` makes tables of them.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import gc
import re
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import hydra
import timm
import torch
import torch.nn.functional as F
from older_networks import OLDER
from omegaconf import DictConfig, OmegaConf
from plain_net import PlainRepMLPNet, conv_to_fc_by_identity, merge_by_identity
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.profiler import ProfilerActivity, profile

from repmlp import RepMLP, RepMLPNet, SetSharingFC, conv_to_fc, deploy, fold_batch_norms
from repmlp.cost import count_macs, count_params
from repmlp.models.build import build_model, merged_copy
from repmlp.models.mixers import build_resmlp
from repmlp.models.upernet import STRIDE
from repmlp.runs.key import branch_label, config_key
from repmlp.runs.launch import mistakes_in_one_line, run_command
from repmlp.runs.provenance import device_name, git_state, processor, versions
from repmlp.runs.record import write_json
from repmlp.training.memory import freed_memory_kept

WHAT = ("inference", "branches", "training", "merging", "conv_to_fc", "scaling", "segmentation", "older")
FORMS = ("plain", "train-time", "merged", "deployed")
ENGINES = ("eager", "compile", "onnxruntime", "openvino")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TABLE_5 = ("repmlpnet_cifar", "resmlp12_cifar", "repmlpnet_t224", "repmlpnet_d256")
MODELS = Path(__file__).resolve().parent / "conf/model"
CITYSCAPES = 19  # classes
CIFAR: dict[str, Callable[..., nn.Module]] = {"repmlpnet_cifar": RepMLPNet, "resmlp12_cifar": build_resmlp}


@hydra.main(version_base="1.3", config_path="conf", config_name="benchmark")
def main(config: DictConfig) -> None:
    with mistakes_in_one_line():
        options = OmegaConf.to_container(config, resolve=True)
        check(options)
        bench = Bench(options)
        for what in options["what"]:
            {
                "inference": inference,
                "branches": branches,
                "training": training,
                "merging": merging,
                "conv_to_fc": single_conversion,
                "scaling": scaling,
                "segmentation": segmentation,
                "older": older,
            }[what](bench, options)


def check(options: Mapping[str, Any]) -> None:
    """Raise ValueError for a setting that is none."""
    for name, known in (("what", WHAT), ("forms", FORMS)):
        if not isinstance(options[name], list) or any(value not in known for value in options[name]):
            raise ValueError(f"{name}={options[name]}: use a list of {', '.join(known)}")
    for name, known in (("engine", ENGINES), ("dtype", DTYPES), ("device", ("auto", "cpu", "cuda"))):
        if options[name] not in known:
            raise ValueError(f"{name}={options[name]!r}: use {', '.join(known)}")
    if options["device"] == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda: torch finds no GPU here; use cpu")
    if options["engine"] in ("onnxruntime", "openvino") and options["dtype"] != "float32":
        raise ValueError(f"engine={options['engine']} runs in float32 alone, not in dtype={options['dtype']}")
    for name in ("batch_sizes", "training_batch_sizes"):
        if not all(type(n) is int and n > 0 for n in options[name]):
            raise ValueError(f"{name}={options[name]}: use a list of whole numbers, 1 or more")
    for name in options["older_models"]:
        if name not in OLDER:
            raise ValueError(f"older_models: {name!r} is none of {', '.join(OLDER)}")
    for text in options["models"] + options["training_models"]:
        parse(text)
    for text in options["segmentation_models"]:
        parse_upernet(text)


def parse(text: str) -> tuple[str, int]:
    """Split NAME or NAME@PIXELS; ValueError for an unknown network."""
    name, _, size = text.partition("@")
    if name in CIFAR:
        return name, 32
    if not timm.is_model(name) or (size and not size.isdigit()):
        raise ValueError(f"models: {text!r} is no network of timm or ours (NAME or NAME@PIXELS)")
    return name, int(size) if size else timm.get_pretrained_cfg(name).input_size[-1]


def parse_upernet(text: str) -> tuple[str, tuple[int, int]]:
    """Split NAME@HEIGHTxWIDTH; ValueError for an unknown network, or a size that it cannot take."""
    found = re.fullmatch(r"(upernet\w*)@([1-9]\d*)x([1-9]\d*)", text)
    if not found or not (MODELS / f"{found[1]}.yaml").is_file():
        raise ValueError(f"segmentation_models: {text!r} is no upernet of experiments/conf/model/ (NAME@HEIGHTxWIDTH)")
    height, width = int(found[2]), int(found[3])
    if height % STRIDE or width % STRIDE:
        raise ValueError(f"segmentation_models: {text!r}: height and width have to be multiples of {STRIDE}")
    return found[1], (height, width)


def configuration(name: str) -> DictConfig:
    """Read a network of conf/model/, which may be another one with changes."""
    own = OmegaConf.load(MODELS / f"{name}.yaml")
    bases = [configuration(base) for base in own.pop("defaults", []) if base != "_self_"]
    return OmegaConf.merge(*bases, own)


class Bench:
    """Where things run and how they are timed, and the writing of records."""

    def __init__(self, options: Mapping[str, Any]):
        cuda = options["device"] == "cuda" or (options["device"] == "auto" and torch.cuda.is_available())
        self.device = torch.device("cuda" if cuda else "cpu")
        if options["threads"]:
            torch.set_num_threads(options["threads"])
        self.dtype, self.rounds, self.warmup = DTYPES[options["dtype"]], options["rounds"], options["warmup"]
        self.folder = Path(options["results_dir"]) / "benchmark" / "measured"
        packages = ("torch", "timm", *(e for e in ("onnxruntime", "openvino") if e == options["engine"]))
        self.common = {
            "device": device_name(self.device),
            "processor": processor(),
            "threads": torch.get_num_threads(),
            "dtype": options["dtype"],
            "versions": versions(packages),
            **git_state(),
        }
        self.run = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime())  # ratios are taken within one run

    def seconds(self, run: Callable[[], Any]) -> float:
        self.wait()
        start = time.perf_counter()
        run()
        self.wait()
        return time.perf_counter() - start

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def in_turn(self, runs: Mapping[Any, Callable[[], Any]]) -> dict[Any, Tensor]:
        """Time every run once a round; returns the seconds of the rounds, (rounds,) each, warm-up left out."""
        taken: dict[Any, list[float]] = {key: [] for key in runs}
        for _ in range(self.warmup + self.rounds):
            for key, run in runs.items():
                taken[key].append(self.seconds(run))
        return {key: torch.tensor(times[self.warmup :], dtype=torch.float64) for key, times in taken.items()}

    def peak_memory(self, run: Callable[[], Any]) -> int | None:
        """Return the bytes that a run needs on top of what is there: of the GPU, or of the process (Linux alone)."""
        gc.collect()
        self.wait()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            run()
            self.wait()
            return torch.cuda.max_memory_allocated(self.device) - before
        try:
            ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back, or it would be used again unseen
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
            before = _status("VmRSS")
            run()
            return max(0, _status("VmHWM") - before)
        except (OSError, AttributeError):
            return None

    def kernels_started(self, run: Callable[[], Any]) -> int | None:
        """Count what a run starts on the GPU, kernels, copies and fills; None on a CPU."""
        if self.device.type != "cuda":
            return None
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as watched:
            run()
            self.wait()
        return sum(event.device_type == DeviceType.CUDA for event in watched.events())

    def write(self, kind: str, row: Mapping[str, Any], seconds: Tensor | None = None) -> dict[str, Any]:
        """Write one record; its key is everything that says what was measured and where.

        row: what was measured; what it says of the setting (dtype) goes before what was asked for.
        """
        record = {"kind": kind, **self.common, **row, "run": self.run, "rounds": self.rounds}
        if seconds is not None:
            low, middle, high = seconds.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
            record |= {"seconds": middle, "seconds_quartiles": [low, high]}
        same = (
            "kind",
            "model",
            "form",
            "img_size",
            "size",
            "batch_size",
            "engine",
            "device",
            "threads",
            "dtype",
            "of",
            "kernels",
            "freed_memory",
        )
        write_json(self.folder / f"{config_key({k: record[k] for k in same if k in record})}.json", record)
        return record


def middle(seconds: Tensor) -> float:
    """Return the median."""
    return float(seconds.quantile(0.5))


def _status(field: str) -> int:
    """Read a size in bytes off /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return 1024 * int(line.split()[1])


# ---- inference


def build(name: str, img_size: int, kernels: tuple[int, ...] = (1, 3)) -> nn.Module:
    """Build a network with random weights, in evaluation mode; kernels: of the branches of ours."""
    torch.manual_seed(0)
    if name in CIFAR:
        return CIFAR[name](kernels=kernels).eval()
    fixed = {"img_size": img_size} if timm.get_pretrained_cfg(name).fixed_input_size else {}
    return timm.create_model(name, **fixed, **({"kernels": kernels} if name.startswith("repmlpnet") else {})).eval()


def in_form(model: nn.Module, form: str) -> nn.Module | None:
    """Bring one of our networks into a form; None where it has none such."""
    if form == "train-time":
        return model
    if form == "merged":
        return merged_copy(model)
    if not isinstance(model, RepMLPNet):
        return None
    return deploy(model) if form == "deployed" else PlainRepMLPNet(in_form(model, "merged"))


def fused(model: nn.Module) -> nn.Module:
    """Fold the batch norms that follow a convolution, as the paper does for CNNs, in timm's layers too."""
    if any(isinstance(m, RepMLP) for m in model.modules()):
        return fold_batch_norms(model)  # which merges the blocks first; their partitions are not traced

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module: nn.Module, name: str) -> bool:
            return isinstance(module, nn.BatchNorm2d) or super().is_leaf_module(module, name)

    if not any(isinstance(m, nn.BatchNorm2d) for m in model.modules()):
        return model
    model = copy.deepcopy(model)
    graph = Tracer().trace(model)
    modules = dict(model.named_modules())
    for node in graph.nodes:
        norm = modules.get(node.target) if node.op == "call_module" else None
        if not isinstance(norm, nn.BatchNorm2d):
            continue
        before = node.args[0]
        conv = modules.get(before.target) if before.op == "call_module" else None
        if isinstance(conv, nn.Conv2d) and len(before.users) == 1:
            model.set_submodule(before.target, fuse_conv_bn_eval(conv, norm))
            # timm's BatchNormAct2d ends with dropout and an activation
            rest = nn.Sequential(norm.drop, norm.act) if hasattr(norm, "act") else nn.Identity()
            model.set_submodule(node.target, rest)
    return model.eval()


def compile_for(bench: Bench, model: nn.Module) -> nn.Module:
    """Compile a network, on a GPU with CUDA graphs."""
    return torch.compile(model, mode="reduce-overhead" if bench.device.type == "cuda" else None)


def runner(model: nn.Module, engine: str, images: Tensor, bench: Bench) -> Callable[[], Any]:
    """Return what runs the network once on the images by an engine."""
    if engine in ("eager", "compile"):
        # a copy: `to` casts in place, and the next form is made of the same network
        model = copy.deepcopy(model).to(bench.device, bench.dtype)
        images = images.to(bench.device, bench.dtype)
        if engine == "compile":
            model = compile_for(bench, model)

        def run() -> None:
            with torch.inference_mode():
                model(images)

        return run
    from repmlp.export import onnx_session, run_onnx, to_exported_program, to_onnx

    program = to_exported_program(model, tuple(images.shape[-2:]))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        to_onnx(program, path)
        if engine == "onnxruntime":
            return partial(run_onnx, onnx_session(path, torch.get_num_threads()), images)
        try:
            import openvino
        except ImportError as error:
            raise ModuleNotFoundError(f"engine=openvino ({error}): pip install openvino") from error
        core = openvino.Core()
        settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
        compiled = core.compile_model(core.read_model(path), "CPU", settings)
    return partial(compiled, images.numpy())


def inference(bench: Bench, options: Mapping[str, Any]) -> None:
    """Images a second of every network and form, beside the machine's matrix product in the same rounds."""
    engine = options["engine"]
    for batch in options["batch_sizes"]:
        runs: dict[Any, Callable[[], Any]] = {"matmul": matmul(bench)}
        facts: dict[Any, dict[str, Any]] = {}
        for text in options["models"]:
            name, size = parse(text)
            model = build(name, size)
            ours = name in CIFAR or name.startswith("repmlpnet")
            # an exported network is merged, so other forms would be the same one again
            forms = [f for f in options["forms"] if engine in ("eager", "compile") or f in ("plain", "deployed")]
            for form in forms if ours else ["fused"]:
                if (shaped := in_form(model, form) if ours else fused(model)) is None:
                    continue
                images = torch.randn(batch, 3, size, size)
                facts[text, form] = {
                    "model": name,
                    "form": form,
                    "img_size": size,
                    "params": count_params(shaped) or sum(p.numel() for p in shaped.parameters()),
                    "macs": count_macs(shaped, size),
                }
                runs[text, form] = runner(shaped, engine, images, bench)
        print(f"inference, batch {batch}, {engine}: {len(facts)} networks, {bench.rounds} rounds", flush=True)
        seconds = bench.in_turn(runs)
        peak = MATMUL_FLOP / middle(seconds["matmul"])
        for key, fact in facts.items():
            typical = middle(seconds[key])
            row = {
                **fact,
                "batch_size": batch,
                "engine": engine,
                "images_per_second": batch / typical,
                "share_of_matmul_peak": 2 * fact["macs"] * batch / typical / peak,
                "matmul_flops": peak,
                "peak_memory_bytes": bench.peak_memory(runs[key]),
            }
            record = bench.write("inference", row, seconds[key])
            print(f"  {key[0]:28s} {key[1]:10s} {line(record)}", flush=True)


MATMUL_SIDE = 2048
MATMUL_FLOP = 2 * MATMUL_SIDE**3


def matmul(bench: Bench) -> Callable[[], Any]:
    """A square matrix product: what the machine can do at this moment."""
    a, b = (torch.randn(MATMUL_SIDE, MATMUL_SIDE, device=bench.device, dtype=bench.dtype) for _ in range(2))
    return partial(torch.mm, a, b)


def line(record: Mapping[str, Any]) -> str:
    low, high = (1000 * s for s in record["seconds_quartiles"])
    text = f"{1000 * record['seconds']:9.2f} ms ({low:.2f} to {high:.2f})"
    if "images_per_second" in record:
        text += f", {record['images_per_second']:8.1f} images/s"
    if "share_of_matmul_peak" in record:
        text += f", {100 * record['share_of_matmul_peak']:3.0f} % of the matrix product's rate"
    return text


def branches(bench: Bench, options: Mapping[str, Any]) -> None:
    """Images a second of training-time networks with and without branches: the last column of the paper's Table 5."""
    for batch in options["batch_sizes"]:
        facts, runs = {}, {}
        for name in TABLE_5:
            size = parse(name)[1]
            for kernels in ((), (1,), (3,), (1, 3)) if name in CIFAR else ((), (1, 3)):
                model = build(name, size, kernels)
                images = torch.randn(batch, 3, size, size)
                facts[name, kernels] = {"model": name, "img_size": size, "kernels": list(kernels)}
                runs[name, kernels] = runner(model, options["engine"], images, bench)
        print(f"branches, batch {batch}, {options['engine']}: {len(facts)} networks, {bench.rounds} rounds", flush=True)
        seconds = bench.in_turn(runs)
        for key, fact in facts.items():
            speed = batch / middle(seconds[key])
            row = {
                **fact,
                "form": "train-time",
                "batch_size": batch,
                "engine": options["engine"],
                "images_per_second": speed,
            }
            print(
                f"  {key[0]:16s} {branch_label(key[1]):8s} {line(bench.write('branches', row, seconds[key]))}",
                flush=True,
            )


# ---- the older paper's networks


def older(bench: Bench, options: Mapping[str, Any]) -> None:
    """Images a second of RepMLP in ResNets and of its peers (arXiv 2105.01883), all with their batch norms folded."""
    for batch in options["batch_sizes"]:
        facts, runs = {}, {}
        for name in options["older_models"]:
            construct, size = OLDER[name]
            torch.manual_seed(0)
            net = fused(construct().eval())
            facts[name] = {
                "model": name,
                "form": "fused",
                "img_size": size,
                "params": sum(p.numel() for p in net.parameters()),
                "macs": count_macs(net, size),
            }
            runs[name] = runner(net, options["engine"], torch.randn(batch, 3, size, size), bench)
        print(f"older, batch {batch}, {options['engine']}: {len(facts)} networks, {bench.rounds} rounds", flush=True)
        seconds = bench.in_turn(runs)
        for name, fact in facts.items():
            row = {
                **fact,
                "batch_size": batch,
                "engine": options["engine"],
                "images_per_second": batch / middle(seconds[name]),
                "peak_memory_bytes": bench.peak_memory(runs[name]),
            }
            print(f"  {name:28s} {line(bench.write('older', row, seconds[name]))}", flush=True)


# ---- segmentation


def segmentation(bench: Bench, options: Mapping[str, Any]) -> None:
    """Images a second of UperNet with each of its backbones, as trained and merged, one image at a time."""
    runs: dict[Any, Callable[[], Any]] = {"matmul": matmul(bench)}
    facts = {}
    for text in options["segmentation_models"]:
        name, (height, width) = parse_upernet(text)
        torch.manual_seed(0)
        model = build_model(OmegaConf.to_container(configuration(name)), CITYSCAPES).eval()
        forms = {"train-time": model, "merged": merged_copy(model)}
        if not isinstance(model.backbone, RepMLPNet):
            forms = {"train-time": model}  # which has nothing to merge
        for form, net in forms.items():
            facts[text, form] = {
                "model": name,
                "form": form,
                "size": f"{height}x{width}",
                "macs": count_macs(net, (height, width)),
            }
            runs[text, form] = runner(net, options["engine"], torch.randn(1, 3, height, width), bench)
    print(f"segmentation, {options['engine']}: {len(facts)} networks, {bench.rounds} rounds", flush=True)
    seconds = bench.in_turn(runs)
    peak = MATMUL_FLOP / middle(seconds["matmul"])
    for key, fact in facts.items():
        typical = middle(seconds[key])
        row = {
            **fact,
            "batch_size": 1,
            "engine": options["engine"],
            "images_per_second": 1 / typical,
            "share_of_matmul_peak": 2 * fact["macs"] / typical / peak,
            "peak_memory_bytes": bench.peak_memory(runs[key]),
        }
        print(f"  {key[0]:28s} {key[1]:10s} {line(bench.write('segmentation', row, seconds[key]))}", flush=True)


# ---- training


def training(bench: Bench, options: Mapping[str, Any]) -> None:
    """One training step of our path against the straightforward one: forward, backward, clipping and AdamW."""
    for text in options["training_models"]:
        name, size = parse(text)
        for batch in options["training_batch_sizes"]:
            ours = build(name, size).train()
            nets = {"ours": ours}
            if isinstance(ours, RepMLPNet):
                nets = {"plain": PlainRepMLPNet(ours), **nets}
            runs = {form: step(net, batch, size, form == "ours", bench, options) for form, net in nets.items()}
            # a GPU's memory torch keeps by itself; on a CPU our commands train with it kept
            memories = {"returned": contextlib.nullcontext, "kept": freed_memory_kept}
            if bench.device.type != "cpu":
                memories = {None: contextlib.nullcontext}
            for memory, context in memories.items():
                said = f", freed memory {memory}" if memory else ""
                print(f"training, {text}, batch {batch}, {options['engine']}{said}, {bench.rounds} rounds", flush=True)
                with context():
                    seconds = bench.in_turn(runs)
                    for form, run in runs.items():
                        row = {
                            "model": name,
                            "form": form,
                            "img_size": size,
                            "batch_size": batch,
                            "engine": options["engine"],
                            "freed_memory": memory,
                            "images_per_second": batch / middle(seconds[form]),
                            "peak_memory_bytes": bench.peak_memory(run),
                            "kernels_started": bench.kernels_started(run),
                        }
                        print(f"  {form:10s} {line(bench.write('training', row, seconds[form]))}", flush=True)


def step(
    net: nn.Module, batch: int, size: int, fast: bool, bench: Bench, options: Mapping[str, Any]
) -> Callable[[], Any]:
    """Return what trains a network for one step on a fixed batch; dtypes below float32 by autocast."""
    net = net.to(bench.device)
    images = torch.randn(batch, 3, size, size, device=bench.device)
    labels = torch.randint(0, net.num_classes if hasattr(net, "num_classes") else 100, (batch,), device=bench.device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-5, weight_decay=0.1, **({"fused": True} if fast else {}))
    called = compile_for(bench, net) if options["engine"] == "compile" and fast else net

    def run() -> None:
        with torch.autocast(bench.device.type, bench.dtype, enabled=bench.dtype != torch.float32):
            loss = F.cross_entropy(called(images), labels, label_smoothing=0.1)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


# ---- merging


def merging(bench: Bench, options: Mapping[str, Any]) -> None:
    """Time and memory of merging a whole variant: ours (float64, by blocks of rows) and by convolving identities."""
    for text in options["models"]:
        name, size = parse(text)
        if not name.startswith("repmlpnet"):
            continue
        model = build(name, size)
        plain = PlainRepMLPNet(model)
        layers = [m for m in model.modules() if isinstance(m, SetSharingFC)]
        plain_blocks = [unit.repmlp_block for stage in plain.stages for unit in stage]

        def ours(layers: list[SetSharingFC] = layers) -> None:
            with torch.no_grad():
                for layer in layers:  # in place, as reparameterize() does; the branches stay, to do it again
                    layer.merged(out=layer.weight)

        def by_identity(blocks: list[nn.Module] = plain_blocks) -> None:
            for block in blocks:
                merge_by_identity(block)

        compare(bench, "merging", {"model": name, "img_size": size}, {"ours": ours, "identity": by_identity})


def single_conversion(bench: Bench, options: Mapping[str, Any]) -> None:
    """One 3x3 convolution as a matrix on a 64x64 map, one share-set."""
    kernel = torch.randn(1, 1, 3, 3)
    runs = {
        "ours": lambda: conv_to_fc(kernel, (64, 64)),
        "identity": lambda: conv_to_fc_by_identity(kernel, (64, 64)),
    }
    same = torch.equal(runs["ours"]()[0], runs["identity"]())
    fact = {"of": "3x3 on 64x64, S=1", "same_bits": same, "result_bytes": 4 * 64**4}
    compare(bench, "conv_to_fc", fact, runs)


def compare(bench: Bench, kind: str, fact: Mapping[str, Any], runs: Mapping[str, Callable[[], Any]]) -> None:
    """Time two ways of merging in turn, measure what each needs on top of `result_bytes`, and write both."""
    seconds = bench.in_turn(runs)
    print(f"{kind}, {fact.get('model', fact.get('of'))}, {bench.rounds} rounds", flush=True)
    for form, run in runs.items():
        memory = bench.peak_memory(run)
        memory = None if memory is None else max(0, memory - fact.get("result_bytes", 0))
        row = {**fact, "form": form, "peak_memory_bytes": memory, "dtype": "float32"}  # of the weights, always
        record = bench.write(kind, row, seconds[form])
        extra = "" if memory is None else f", {memory / 2**20:.1f} MiB more at the peak"
        print(f"  {form:10s} {line(record)}{extra}", flush=True)


# ---- scaling


def scaling(bench: Bench, options: Mapping[str, Any]) -> None:
    """How time and memory of a merged set-sharing FC grow with side of the map, channels and share-sets (batch 8)."""
    base = {"side": 16, "channels": 256, "share_sets": 16}
    values = {"side": (8, 16, 32, 64), "channels": (64, 128, 256, 512), "share_sets": (1, 4, 16, 64)}
    for name, points in values.items():
        runs, memory = {}, {}
        for value in points:
            at = {**base, name: value}
            fc = SetSharingFC((at["side"],) * 2, at["share_sets"], inference_mode=True)
            fc = fc.to(bench.device, bench.dtype).eval()
            x = torch.randn(8, at["channels"], at["side"], at["side"], device=bench.device, dtype=bench.dtype)
            runs[value] = torch.inference_mode()(partial(fc, x))
            memory[value] = sum(p.numel() * p.element_size() for p in fc.parameters())
        seconds = bench.in_turn(runs)
        times = [middle(seconds[value]) for value in points]
        exponents = {
            "seconds": slope(points, times),
            "weight_bytes": slope(points, list(memory.values())),
        }
        row = {
            "of": name,
            "base": base,
            "points": list(points),
            "point_seconds": times,
            "weight_bytes": list(memory.values()),
            "exponents": exponents,
        }
        bench.write("scaling", row)
        text = ", ".join(f"{v}: {1000 * t:.2f} ms" for v, t in zip(points, times, strict=True))
        print(f"scaling with {name}: {text}; exponent {exponents['seconds']:.2f}", flush=True)


def slope(x: tuple[int, ...], y: list[float]) -> float:
    """Return the exponent of y ~ x^p fitted to all points, by least squares of the logarithms."""
    log_x, log_y = torch.tensor(x, dtype=torch.float64).log(), torch.tensor(y, dtype=torch.float64).log()
    log_x = log_x - log_x.mean()
    return float((log_x * log_y).sum() / log_x.square().sum())


if __name__ == "__main__":
    run_command(main, Path(__file__).resolve().parents[1])
