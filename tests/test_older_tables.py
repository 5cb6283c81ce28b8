"""The tables of the older paper: printed figures beside counts, dashes where nothing is known, measured ratios."""

import sys

import pandas as pd
import pytest
from conftest import ROOT, compose_config

sys.path.insert(0, str(ROOT / "analysis"))
from paper_tables import older
from paper_tables.configurations import DATA_SETS, MODELS, is_full_recipe
from paper_tables.older import NETWORKS, claims_table, counts, networks_table, read_paper_older, tables

# parameters while training and folded, MACs in G folded, as measured on the older code
MEASURED = {
    "resnet50": (25_557_032, 25_530_472, 4.089),
    "repmlp_res50_224": (41_071_144, 40_871_528, 3.891),
    "repmlp_res50_g4_8_320": (87_939_624, 87_383_144, 8.354),
    "repmlp_res50_light_224": (58_351_912, 57_868_264, 2.920),
}


def test_printed_figures_name_known_networks():
    paper = read_paper_older()
    assert set(paper["network"]) | set(paper["against"]) - {""} <= NETWORKS.keys()
    assert not paper.duplicated(["network", "against", "quantity"]).any()
    assert not (paper["printed"] == "").any()


@pytest.mark.parametrize("name", MEASURED)
def test_counts(name):
    found = counts(name)
    assert (found.params, found.folded_params, round(found.folded_macs / 1e9, 3)) == MEASURED[name]
    assert found.folded_params <= found.merged_params


def test_networks_table():
    table = networks_table().set_index("network")
    assert list(table.index) == list(NETWORKS)
    assert table.loc["pspnet_resnet50", ["params, batch norms folded", "paper params", "paper FLOPs"]].tolist() == [
        "46,562,451",
        "46.56M",
        "350004M",
    ]
    assert table.loc["repmlp_res50_224", "paper accuracy"] == "78.55 top-1"
    assert table.loc["pspnet_repmlp", ["paper params", "paper FLOPs", "paper accuracy"]].tolist() == [
        "-",
        "-",
        "76.48 mIoU",
    ]
    assert table.loc["faceresnet_96", ["paper params", "paper FLOPs", "paper accuracy"]].tolist() == ["-"] * 3


def test_claims_from_counts():
    table = claims_table().set_index(["network", "against", "what"])["ours"]
    assert table["repmlp_res50_g4_8_320", "repmlp_res50_g8_16_320", "params, %"] == "+47.5"
    assert table["repmlp_res50_g4_8_320", "repmlp_res50_g8_16_320", "MACs, %"] == "+3.7"
    assert table["repmlp_res50_light_224", "resnet50", "MACs, %"] == "-28.6"
    assert table["repmlp_res50_c4", "resnet50", "params, more"] == "+5.35M"
    assert table["repmlp_res50_224", "resnet101", "speed, %"] == "-"
    assert table["repmlp_res50_c4", "resnet50", "top-1, points"] == "-"


def test_claims_from_measurements():
    """Ratios within one run and of one form; two settings are told apart."""

    def rows(run, device, speeds, form="fused"):
        setting = {"device": device, "threads": 2, "dtype": "float32", "engine": "eager", "batch_size": 8}
        return [{"model": m, "form": form, "images_per_second": s, "run": run, **setting} for m, s in speeds.items()]

    first = rows("a", "CPU", {"repmlp_res50_light_224": 30.0, "resnet50": 20.0})
    alone = rows("b", "CPU", {"resnet101": 5.0}) + rows("a", "CPU", {"repmlp_res50_224": 50.0}, form="merged")
    what = ("repmlp_res50_light_224", "resnet50", "speed, %")
    one = claims_table(pd.DataFrame(first + alone)).set_index(["network", "against", "what"])["ours"]
    assert one[what] == "+50.0" and one["repmlp_res50_224", "resnet101", "speed, %"] == "-"
    second = rows("c", "GPU", {"repmlp_res50_light_224": 10.0, "resnet50": 20.0})
    two = claims_table(pd.DataFrame(first + second)).set_index(["network", "against", "what"])["ours"]
    assert two[what] == "+50.0 (CPU, 2, float32, eager, 8); -50.0 (GPU, 2, float32, eager, 8)"
    assert (
        claims_table(pd.DataFrame(), {"repmlp_res50_c4": 78.0, "resnet50": 77.0})["ours"].tolist().count("+1.00") == 1
    )


def test_all_tables_can_be_written(tmp_path):
    for name, (title, note, table) in tables(ROOT / "results").items():
        assert name.startswith("older_") and title and note and len(table)
        assert not table.isna().any().any()
    assert older.DASH in claims_table()["ours"].tolist()


def test_the_papers_configurations_are_those_that_the_commands_run():
    """configurations.yaml against experiments/conf: each network, its data and recipe as a bare command has them."""
    runs = {
        "cifar100": ["data=cifar100", "recipe=cifar100"],
        "imagenet": ["data=imagenet", "recipe=imagenet"],
        "cityscapes": ["data=cityscapes", "recipe=segmentation", "task=segmentation"],
    }
    assert runs.keys() == DATA_SETS.keys()
    for name in MODELS:
        data = "cityscapes" if name.startswith("upernet") else "cifar100" if name.endswith("cifar") else "imagenet"
        config = compose_config(f"model={name}", *runs[data])
        if DATA_SETS[data]["pretrained"]:
            config["model"]["backbone"] = "a" * 64
        n_train, n_eval = DATA_SETS[data]["images"]
        record = {"model": name, "data": data, "n_train": n_train, "n_eval": n_eval, "config": config}
        assert is_full_recipe(record), name
        assert not is_full_recipe({**record, "n_train": 100}) and not is_full_recipe(record, epochs=101)
        assert not is_full_recipe({**record, "data": "another"})
