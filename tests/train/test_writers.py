"""The log reaches TensorBoard's files and W&B, and a missing library is told."""

import json
import sys
import time
from types import SimpleNamespace

import jax
import pytest
from train_toy import apply, batches, init

from egjax.errors import EgjaxError
from egjax.train.flops import peak_flops
from egjax.train.loop import fit
from egjax.train.objectives import next_token
from egjax.train.optim import OptimConfig, make_optimizer
from egjax.train.step import init_state, make_train_step
from egjax.train.writers import writers


def checksum(data):
    """CRC-32C as TFRecord files mask it, bit by bit."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def events(path):
    """The records of a TensorBoard file: length, its checksum, event, its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    data = path.read_bytes()
    while data:
        length = int.from_bytes(data[:8], "little")
        body = data[12 : 12 + length]
        assert int.from_bytes(data[8:12], "little") == checksum(data[:8])
        assert int.from_bytes(data[12 + length : 16 + length], "little") == checksum(body)
        yield Event.FromString(body)
        data = data[16 + length :]


def scalars(path):
    return {
        (event.step, value.tag): value.simple_value
        for event in events(path)
        for value in event.summary.value
    }


def test_tensorboard_files_hold_what_was_logged(tmp_path):
    pytest.importorskip("tensorboardX")
    with writers(["tensorboard"], tmp_path, "sft") as log:
        log(5, {"loss": 0.5, "mfu": 0.25})
    (path,) = (tmp_path / "tensorboard").iterdir()
    assert scalars(path) == {(5, "loss"): 0.5, (5, "mfu"): 0.25}
    # A run that was killed writes its last steps again: those of the older file are dropped.
    time.sleep(1.1)  # files are named by the second
    with writers(["tensorboard"], tmp_path, "sft") as log:
        log(4, {"loss": 0.75})
    (again,) = set((tmp_path / "tensorboard").iterdir()) - {path}
    assert [e.step for e in events(again) if e.session_log.status == e.session_log.START] == [4]
    assert scalars(again) == {(4, "loss"): 0.75}


def test_tensorboard_and_json_lines_of_a_run_agree(tmp_path):
    pytest.importorskip("tensorboardX")
    tx = make_optimizer(OptimConfig(learning_rate=0.01), 3)
    with writers(["tensorboard"], tmp_path, "toy") as log:
        fit(
            init_state(init(), tx),
            make_train_step(next_token(apply), tx),
            batches(),
            num_steps=3,
            key=jax.random.key(0),
            directory=tmp_path,
            log_every=1,
            on_log=log,
        )
    (path,) = (tmp_path / "tensorboard").iterdir()
    found = scalars(path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    want = {(x["step"], name): x[name] for x in lines for name in x if name != "step"}
    assert {"loss", "grad_norm", "param_norm", "update_norm"} <= {name for _, name in want}
    assert found == pytest.approx(want, rel=1e-6)


def test_wandb_gets_what_was_logged(tmp_path, monkeypatch):
    calls = []

    class Run:
        def log(self, metrics, step):
            calls.append((step, metrics))

        def finish(self):
            calls.append("finish")

    def begin(**options):
        calls.append(options)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=begin))
    for _ in range(2):
        with writers(["wandb"], tmp_path / "out", "dpo") as log:
            log(1, {"loss": 0.5})
    assert calls[1:3] == [(1, {"loss": 0.5}), "finish"]
    assert calls[0] == calls[3]  # the same directory goes on with the same run
    assert calls[0]["name"] == "dpo"
    named = [{"inputs": "a", "config": {"seed": 1}}, {"inputs": "b"}, {"inputs": "a"}]
    calls.clear()
    for options in named:
        with writers(["wandb"], tmp_path / "out", "dpo", **options):
            pass
    begun = [call for call in calls if call != "finish"]
    assert [one["config"] for one in begun] == [{"seed": 1}, {}, {}]
    assert begun[0]["id"] == begun[2]["id"] != begun[1]["id"]


def history(path):
    """What a file of W&B's offline mode says of steps; a log in LevelDB's format."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, found = path.read_bytes()[7:], {}
    while len(data) > 7:  # checksum, length, kind, record
        length = int.from_bytes(data[4:6], "little")
        assert data[6] == 1, "a record in several pieces"
        record = Record.FromString(data[7 : 7 + length])
        items = {x.key or x.nested_key[0]: json.loads(x.value_json) for x in record.history.item}
        if items:
            found[items.pop("_step")] = items
        data = data[7 + length :]
    return found


def test_wandb_without_a_network_keeps_what_was_logged(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with writers(["wandb"], tmp_path, "sft") as log:
        log(5, {"loss": 0.5, "mfu": 0.25})
        log(6, {"loss": 0.25})
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    deadline = time.monotonic() + 60
    while len(found := history(path)) < 2 and time.monotonic() < deadline:
        time.sleep(0.2)  # its own process writes the file
    assert found[5]["loss"] == 0.5
    assert found[5]["mfu"] == 0.25
    assert found[6]["loss"] == 0.25


def test_what_cannot_be_logged_to_is_told(tmp_path, monkeypatch):
    with pytest.raises(EgjaxError, match="cannot log to 'paper'"), writers(["paper"], tmp_path, ""):
        pass
    monkeypatch.setitem(sys.modules, "wandb", None)
    with (
        pytest.raises(ImportError, match=r"pip install 'egjax\[wandb\]'"),
        writers(["wandb"], tmp_path, ""),
    ):
        pass
    with writers([], tmp_path, "") as log:
        log(1, {"loss": 0.5})
    assert not list(tmp_path.iterdir())


def test_peaks_by_device():
    def devices(*kinds):
        return [SimpleNamespace(device_kind=kind) for kind in kinds]

    assert peak_flops(devices("NVIDIA H200", "NVIDIA H100 80GB HBM3")) == 2 * 989e12
    assert peak_flops(devices("NVIDIA H100 PCIe")) == 756e12
    assert peak_flops(devices("TPU v5 lite")) == 197e12
    assert peak_flops(devices("TPU v5")) == 459e12
    assert peak_flops(devices("cpu")) is None
    assert peak_flops(devices("TPU v4", "cpu")) is None
