import dataclasses
import itertools
import os
import socket
import subprocess
import sys
import textwrap

import jax
import pytest
from jax.sharding import AxisType, PartitionSpec
from processes import cpus

from egjax.errors import EgjaxError
from egjax.hosts import start_hosts
from egjax.mesh import batch_of, batch_sharding, check_divides, local_rows, make_mesh, sharding


def run(code, **environment):
    """Runs code in a fresh interpreter, where JAX has not started yet."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_axes_are_auto_and_split_what_divides():
    mesh = make_mesh()
    assert mesh.axis_names == ("data", "model")
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert mesh.size == jax.device_count()


@dataclasses.dataclass(frozen=True)
class Chip:
    """A v5p chip as far as its place in the mesh is concerned."""

    id: int
    coords: tuple[int, int, int]
    platform: str = "tpu"
    device_kind: str = "TPU v5"
    core_on_chip: int = 0
    process_index: int = 0
    slice_index: int = 0


@pytest.mark.parametrize(("data", "model"), [(16, 4), (8, 8), (32, 2)])
def test_a_torus_takes_axes_that_split_its_dimensions(data, model):
    places = itertools.product(range(4), range(4), range(4))
    chips = [Chip(i, place) for i, place in enumerate(places)]
    mesh = make_mesh(data=data, model=model, devices=chips)
    assert mesh.devices.shape == (data, model)
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert sorted(chip.id for chip in mesh.devices.flat) == list(range(64))
    # Chips that share a matrix are near: in a block, not a line through half of the torus.
    for group in mesh.devices:
        spread = [max(c) - min(c) for c in zip(*(chip.coords for chip in group), strict=True)]
        assert sum(spread) <= {2: 1, 4: 3, 8: 4}[model]


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(EgjaxError, match="does not fit"):
        make_mesh(data=jax.device_count() + 1)
    with pytest.raises(EgjaxError, match="at least 1"):
        make_mesh(model=0)


def test_eight_devices_equal_one():
    result = run(
        """
        import jax, numpy as np
        from jax.sharding import PartitionSpec as S
        from egjax.errors import EgjaxError
        from egjax.lm import hf
        from egjax.lm.config import LlamaConfig
        from egjax.lm.generate import generate, pad_prompts
        from egjax.lm.model import forward
        from egjax.lm.params import init
        from egjax.mesh import batch_sharding, check_divides, make_mesh, sharding
        import tempfile

        mesh = make_mesh(data=4, model=2)
        # A mesh axis is used once; what it does not divide stays whole.
        assert sharding(mesh, ("vocab", "mlp"), (4, 4)).spec == S("model", None)
        assert sharding(mesh, ("embed", "heads"), (6, 4)).spec == S(None, "model")
        config = LlamaConfig(48, 32, 64, 2, 4, 2, 8, max_seq_len=32)
        one = init(jax.random.key(0), config)
        many = init(jax.random.key(0), config, mesh)
        assert many["layers"]["gate"].sharding.spec == S(None, "data", "model")
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many)):
            np.testing.assert_allclose(a, b, atol=1e-6)
        tokens = jax.random.randint(jax.random.key(1), (8, 12), 0, 48)
        split = jax.device_put(tokens, batch_sharding(mesh))
        assert len(split.addressable_shards) == 8
        assert split.addressable_shards[0].data.shape == (2, 12)
        function = jax.jit(forward, static_argnums=1)
        np.testing.assert_allclose(
            function(one, config, tokens), function(many, config, split), atol=1e-5
        )
        prompts = pad_prompts([[3, 4], [5]] * 4, pad_id=0, bucket=4)
        draws = [
            generate([(p, config)], prompts, jax.random.key(2), max_new_tokens=4).tokens
            for p in (one, many)
        ]
        assert np.array_equal(*draws)
        with tempfile.TemporaryDirectory() as folder:
            hf.save(folder, config, many)
            _, loaded = hf.load(folder, mesh=mesh)
        for a, b in zip(jax.tree.leaves(many), jax.tree.leaves(loaded)):
            assert a.sharding == b.sharding
            np.testing.assert_array_equal(a, b)
        check_divides(mesh, 8)
        try:
            check_divides(mesh, 6)
        except EgjaxError as error:
            assert "e.g. 8" in str(error)
        else:
            raise AssertionError("6 rows over 4 devices")
        print("equal")
        """,
        **cpus(8),
    )
    assert result.stdout.strip() == "equal", result.stderr


def test_two_processes_find_each_other():
    code = """
        import sys, jax
        from egjax.hosts import start_hosts
        index = start_hosts("localhost:{port}", 2, int(sys.argv[1]), timeout_s=60)
        print(index, jax.process_count(), jax.device_count())
    """
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code).replace("{port}", str(port)), str(i)],
            env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [out.split() for out, _ in outputs] == [["0", "2", "2"], ["1", "2", "2"]], outputs


def test_a_bad_start_says_what_to_do():
    with pytest.raises(EgjaxError, match="indices run from 0"):
        start_hosts("localhost:1", 2, 2)
    result = run(
        """
        from egjax.errors import EgjaxError
        from egjax.hosts import start_hosts
        try:
            start_hosts(None, 2, 0)
        except EgjaxError as error:
            print(error)
        """
    )
    assert "process 0 of 2 did not join" in result.stdout, result.stderr


def test_one_device_needs_no_thought():
    mesh = make_mesh(devices=jax.devices()[:1])
    assert sharding(mesh, ("vocab", None), (3, 5)).spec == PartitionSpec("model", None)
    assert batch_sharding(mesh).spec == PartitionSpec("data")
    check_divides(mesh, 3)


def test_a_process_reads_the_rows_of_its_own_devices():
    placing = batch_sharding(make_mesh(devices=jax.devices()[:1]))
    rows = local_rows(placing, 6)
    assert rows.tolist() == [0, 1, 2, 3, 4, 5]
    batch = batch_of({"x": rows[:, None] * 10}, placing, 6)
    assert batch["x"].sharding.spec == PartitionSpec("data")
    assert batch["x"][:, 0].tolist() == [0, 10, 20, 30, 40, 50]
