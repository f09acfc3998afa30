"""The log reaches TensorBoard's files and W&B, and a missing library is told."""

import sys
from types import SimpleNamespace

import pytest

from egjax.errors import EgjaxError
from egjax.train.flops import peak_flops
from egjax.train.writers import writers


def test_tensorboard_files_hold_what_was_logged(tmp_path):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    with writers(["tensorboard"], tmp_path, "sft") as log:
        log(5, {"loss": 0.5, "mfu": 0.25})
    (path,) = (tmp_path / "tensorboard").iterdir()
    data, found = path.read_bytes(), {}
    while data:  # length, its checksum, event, its checksum
        length = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + length])
        found |= {value.tag: (event.step, value.simple_value) for value in event.summary.value}
        data = data[16 + length :]
    assert found == {"loss": (5, 0.5), "mfu": (5, 0.25)}


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
