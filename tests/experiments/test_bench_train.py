"""The benchmark of training steps, small, beside a peer that says what it is told to."""

import json
import sys
from dataclasses import replace

import pytest

from egjax.errors import EgjaxError
from egjax.lm.config import LlamaConfig
from egjax.lm.params import count
from experiments.bench_train import Config, main

SMALL = Config(
    width=16,
    layers=1,
    mlp=16,
    heads=2,
    kv_heads=1,
    vocabulary=32,
    pairs=2,
    prompt=12,
    completion=4,
    rows=2,
    length=16,
    matrix=16,
    repeats=2,
    json=True,
)
MODEL = LlamaConfig(32, 16, 16, 1, 2, 1, 8, max_seq_len=16)
PEER = """#!{python}
import json, sys
shapes = json.load(open(sys.argv[2]))
assert (shapes["pairs"], shapes["prompt"], shapes["completion"]) == (2, 12, 4)
print("a library says hello")
print(json.dumps({{"parameters": {parameters}, "versions": {{"google-tunix": "0"}}}}), flush=True)
for line in sys.stdin:
    {reply}
"""


def peer(folder, *, parameters=None, reply=None):
    """An interpreter that runs a peer of its own, whatever script it is given."""
    path = folder / "python"
    reply = reply or 'print(json.dumps({"seconds": 8.0, "cpu_seconds": 4.0}), flush=True)'
    parameters = count(MODEL) if parameters is None else parameters
    path.write_text(PEER.format(python=sys.executable, parameters=parameters, reply=reply))
    path.chmod(0o755)
    return path


def test_rows_of_both_sides_and_what_they_were_made_from(tmp_path, capsys):
    out = tmp_path / "figures.json"
    main(replace(SMALL, peer_python=peer(tmp_path), out=out))
    rows = {row["name"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    for name, theirs in (("dpo_step", 8.0), ("dpo_step_cpu", 4.0)):
        row = rows[f"{name}/tunix"]
        assert row["peer_value"] == theirs
        assert row["ratio"] == pytest.approx(row["value"] / theirs)
        assert rows[f"{name}/two_passes"]["value"] == row["value"]
    for name in ("dpo_step", "sft_step", "distill_step"):
        per_token = rows[f"{name}/flops"]["value"] / rows[f"{name}/tokens_per_second"]["value"]
        assert per_token > 0
        assert rows[f"{name}/mfu"]["value"] == pytest.approx(
            rows[f"{name}/flops"]["value"] / rows["matrix_rate/float32"]["value"]
        )
    record = json.loads(out.read_text())
    assert {row["name"]: row for row in record["figures"]} == rows
    assert record["config"]["prompt"] == 12
    assert record["made"]["peer"] == {"google-tunix": "0"}
    assert record["made"]["hardware"]["cores"] > 0
    assert str(tmp_path) not in out.read_text()


def test_a_peer_of_another_size_or_that_ends_is_told(tmp_path):
    config = replace(SMALL, steps=("dpo",))
    with pytest.raises(EgjaxError, match=f"Tunix's model has 5 parameters, ours {count(MODEL)}"):
        main(replace(config, peer_python=peer(tmp_path, parameters=5)))
    with pytest.raises(EgjaxError, match="the peer ended: out of memory"):
        main(replace(config, peer_python=peer(tmp_path, reply='sys.exit("out of memory")')))
    with pytest.raises(EgjaxError, match="cannot be started"):
        main(replace(config, peer_python=tmp_path / "nowhere"))
