"""Records: keys, atomic writes, damaged files."""

import json
import subprocess
import sys

import pytest

from repmlp.runs.key import config_key
from repmlp.runs.record import MEASURED, REQUIRED, BadRecord, load_records, read_record, record_path, write_record

RECORD = dict.fromkeys(REQUIRED | MEASURED["classification"], 1)


def test_key_depends_on_values_and_not_on_order():
    assert config_key({"a": 1, "b": [1, 2]}) == config_key({"b": [1, 2], "a": 1})
    assert config_key({"a": 1}) != config_key({"a": 2})
    assert len(config_key({})) == 12


def test_records_round_trip(tmp_path):
    path = record_path(tmp_path, "study", "abc")
    write_record(path, {**RECORD, "seed": 4})
    assert read_record(path)["seed"] == 4
    frame = load_records(tmp_path)
    assert frame["key"].tolist() == ["abc"] and frame["seed"].tolist() == [4]
    assert len(load_records(tmp_path, "other")) == 0
    assert [p.name for p in path.parent.iterdir()] == ["abc.json"]


def test_records_of_each_task_are_asked_for_and_checked_apart(tmp_path):
    masks = {**dict.fromkeys(REQUIRED | MEASURED["segmentation"], 1), "task": "segmentation"}
    write_record(record_path(tmp_path, "study", "image"), RECORD)
    write_record(record_path(tmp_path, "study", "pixels"), masks)
    assert load_records(tmp_path)["key"].tolist() == ["image"]
    assert load_records(tmp_path, task="segmentation")["key"].tolist() == ["pixels"]
    with pytest.raises(BadRecord, match="miou_pct"):
        write_record(tmp_path / "a.json", {**RECORD, "task": "segmentation"})


def test_incomplete_records_are_refused(tmp_path):
    with pytest.raises(BadRecord, match="a record needs the fields top1_pct"):
        write_record(tmp_path / "a.json", {k: v for k, v in RECORD.items() if k != "top1_pct"})
    with pytest.raises(ValueError):
        write_record(tmp_path / "a.json", {**RECORD, "top1_pct": float("nan")})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["", "{", "[]", '{"study": 1}', "\udcff"])
def test_damaged_records_are_named_and_left_out(tmp_path, text):
    good, bad = (record_path(tmp_path, "study", key) for key in ("good", "bad"))
    write_record(good, RECORD)
    bad.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(BadRecord, match=r"bad\.json is no whole record"):
        read_record(bad)
    with pytest.warns(UserWarning, match=r"left out: .*bad\.json"):
        assert load_records(tmp_path)["key"].tolist() == ["good"]
    assert bad.exists()


def test_a_full_disk_leaves_the_old_record(tmp_path):
    """A write that fails half-way (a file-size limit stands for a full disk): the old record is whole, no litter."""
    path = tmp_path / "a.json"
    write_record(path, RECORD)
    before = path.read_text()
    script = (
        "import json, resource, sys\n"
        "from pathlib import Path\n"
        "from repmlp.runs.record import write_record\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "try:\n"
        "    write_record(Path(sys.argv[1]), json.loads(sys.argv[2]))\n"
        "except OSError as error:\n"
        "    print('OSError', error.errno)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(path), json.dumps({**RECORD, "seed": 9})], capture_output=True, text=True
    )
    assert done.stdout.startswith("OSError"), done.stderr
    assert path.read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
