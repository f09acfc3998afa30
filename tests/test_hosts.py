"""Several processes: who is missing or unlike is named, all stop at one step, a death is told."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from processes import LOOK, ROOT, codes, free_port, kill, launch

from egjax import hosts
from egjax.errors import EgjaxError

SAME = {"commit": "abc", "code": "1", "jax": "0.10.2", "chips": "4"}


def meet(reports: dict[int, dict[str, str]], count: int, timeout: float = 3.0) -> dict[int, object]:
    """The verdict that each process of the preflight hears."""
    address = f"localhost:{free_port()}"
    heard: dict[int, object] = {}

    def take_part(i: int) -> None:
        try:
            heard[i] = hosts.rendezvous(address, count, i, reports[i], timeout)
        except EgjaxError as error:
            heard[i] = error

    threads = [threading.Thread(target=take_part, args=(i,)) for i in reports]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return heard


def test_processes_that_are_alike_meet_in_any_order():
    names = meet({2: SAME, 0: SAME, 1: SAME}, 3)
    assert names[0] == names[1] == names[2]
    assert len(names[0]) == 3


@pytest.mark.parametrize(
    ("difference", "told"),
    [
        ({"commit": "def"}, "has commit def, others abc"),
        ({"jax": "0.9"}, "has jax 0.9, others 0.10.2"),
        ({"chips": "3"}, "has chips 3, others 4"),
        ({"libtpu": "1"}, "has libtpu 1, others none"),
    ],
)
def test_every_process_hears_which_one_is_unlike(difference, told):
    heard = meet({0: SAME, 1: {**SAME, **difference}, 2: SAME}, 3)
    assert all("process 1 (" in str(one) and told in str(one) for one in heard.values()), heard


def test_process_0_can_be_the_one_that_is_unlike():
    heard = meet({0: {**SAME, "code": "2"}, 1: SAME, 2: SAME}, 3)
    assert "process 0 (" in str(heard[2])
    assert "has code 2, others 1" in str(heard[2])


def test_a_missing_process_is_named_with_its_host(monkeypatch):
    monkeypatch.setenv("EGJAX_HOSTS", "ada,bob,cid")
    begun = time.monotonic()
    heard = meet({0: SAME, 1: SAME}, 3, timeout=1.5)
    assert time.monotonic() - begun < 10
    assert set(heard) == {0, 1}
    assert all("missing: process 2 (cid); there: 0 (" in str(one) for one in heard.values()), heard
    assert all(isinstance(one, hosts.MissingError) for one in heard.values())


def test_a_missing_coordinator_is_named():
    heard = meet({1: SAME}, 2, timeout=1.0)
    assert "missing: process 0" in str(heard[1])


def test_processes_that_count_each_other_differently_are_told():
    port, heard = free_port(), {}

    def join(index, count):
        try:
            hosts.rendezvous(f"localhost:{port}", count, index, SAME, 1.5)
        except EgjaxError as error:
            heard[index] = str(error)

    threads = [threading.Thread(target=join, args=one) for one in ((0, 2), (3, 4))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert heard[0] == heard[3]
    assert "process 3 (" in heard[0]
    assert "counts 4 processes, process 0 (" in heard[0]


def test_a_coordinator_without_a_port_is_told():
    with pytest.raises(EgjaxError, match="names no port"):
        hosts.start_hosts("10.0.0.1", 2, 0)


def test_noise_on_the_port_is_no_report():
    """A port scanner, or a process that dies half-way, neither counts nor ends the preflight."""
    import socket

    port = free_port()
    address, heard = f"localhost:{port}", {}
    first = threading.Thread(
        target=lambda: heard.update(names=hosts.rendezvous(address, 2, 0, SAME, 10.0))
    )
    first.start()
    time.sleep(0.3)
    for words in (b"", b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b'{"index": "x"}\n'):
        with socket.create_connection(("localhost", port)) as line:
            line.sendall(words)
    hosts.rendezvous(address, 2, 1, SAME, 10.0)
    first.join()
    assert len(heard["names"]) == 2


def test_facts_name_the_code_and_the_libraries():
    found = hosts.facts()
    assert {"commit", "code", "Python", "jax", "jaxlib", "chips"} <= set(found)
    assert len(found["code"]) == 12


def test_one_process_meets_nobody():
    assert hosts.agree("here", "x") == "x"
    assert hosts.agree("here", "x", gather=True) == ["x"]
    hosts.barrier("here")
    asked: list[int] = []
    stop = hosts.Agreed(asked, "loop")
    assert not stop
    asked.append(1)
    assert stop


def test_where_a_process_stands_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("EGJAX_COORDINATOR", "a:1")
    with pytest.raises(EgjaxError, match="EGJAX_PROCESSES"):
        hosts.find()
    monkeypatch.setenv("EGJAX_PROCESSES", "4")
    monkeypatch.setenv("EGJAX_PROCESS", "2")
    assert hosts.find() == ("a:1", 4, 2)
    monkeypatch.delenv("EGJAX_COORDINATOR")
    assert None in hosts.find()  # no pod, no Slurm


def loop(folder: Path, count: int, **environment: str) -> list[subprocess.Popen]:
    """Processes of `job_loop.py` that have begun to count."""
    started = launch(["tests/job_loop.py"], count, logs=folder, **environment)
    for _ in range(round(200 / LOOK)):
        if all((folder / f"{i}.out").read_text().count("\n") > 3 for i in range(count)):
            return started
        if any(process.poll() is not None for process in started):
            break
        time.sleep(LOOK)
    kill(started)
    raise AssertionError([p.read_text() for p in folder.glob("*.err")])


def test_sigterm_to_one_process_stops_all_at_the_same_look(tmp_path):
    processes = loop(tmp_path, 2)
    processes[1].send_signal(signal.SIGTERM)
    assert codes(processes, 60) == [0, 0]
    first, second = ((tmp_path / f"{i}.out").read_text() for i in (0, 1))
    assert first == second
    assert first.endswith("left\n")


@pytest.mark.parametrize("victim", [1, 0])
def test_a_process_that_is_gone_is_named_by_the_other(tmp_path, victim):
    """Also process 0, which holds what they talk over."""
    processes = loop(tmp_path, 2, EGJAX_SILENCE="4")
    processes[victim].kill()
    assert codes(processes, 60)[1 - victim] == hosts.LOST
    said = (tmp_path / f"{1 - victim}.err").read_text()
    assert f"error: process {victim} (" in said
    assert "the same command goes on from what was saved" in said


def toy(
    run: Path, count: int, *arguments: object, devices: int = 1, **environment: str
) -> list[subprocess.Popen]:
    command = ["tests/job_toy.py", "--run", str(run), *map(str, arguments)]
    logs = run.with_suffix(".logs")
    return launch(command, count, devices=devices, logs=logs, **environment)


def said(run: Path) -> str:
    return "".join(p.read_text() for p in sorted(run.with_suffix(".logs").glob("*.err")))


def until_step(run: Path, step: int, timeout: float = 200.0) -> None:
    """Waits until the run has logged that step."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        lines = steps(run)
        if lines and lines[-1] >= step:
            return
        time.sleep(0.1)
    raise AssertionError(f"step {step} was not reached:\n{said(run)[-3000:]}")


def steps(run: Path) -> list[int]:
    """Steps in the log of the run, in the order of its lines."""
    found = [p for name in ("toy", "toy.unfinished") for p in run.glob(f"{name}/metrics.jsonl")]
    lines = found[0].read_text().splitlines() if found else []
    return [json.loads(line)["step"] for line in lines if line.endswith("}")]


def weights(run: Path) -> list[np.ndarray]:
    import jax

    from egjax.train.checkpoint import load_params

    return [np.asarray(x) for x in jax.tree.leaves(load_params(run / "toy" / "model")[0])]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The weights that one process finds, undisturbed."""
    run = tmp_path_factory.mktemp("hosts") / "alone"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "tests/job_toy.py", "--run", str(run)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    return weights(run)


TOLERANCE = 2e-4  # of weights of size 0.1 to 1, after 40 steps of Adam at a rate of 0.01


def close(run: Path, alone: list[np.ndarray]) -> None:
    assert steps(run) == list(range(1, 41))  # every step once
    for ours, theirs in zip(weights(run), alone, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "then"), [(2, 1), (2, 4), (4, 2)])
def test_sigterm_to_one_saves_all_at_one_step_and_another_number_goes_on(
    tmp_path, alone, count, then
):
    run = tmp_path / "run"
    processes = toy(run, count, "--pause", 0.2, devices=2)
    until_step(run, 3)
    processes[count - 1].send_signal(signal.SIGTERM)
    assert codes(processes, 120) == [143] * count, said(run)
    (left,) = {int(p.name) for p in (run / "toy.unfinished" / "checkpoints").iterdir()}
    assert steps(run)[-1] == left < 40
    assert codes(toy(run, then, devices=2), 200) == [0] * then, said(run)
    close(run, alone)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [1, 0])
def test_a_killed_process_is_told_by_the_others_and_the_run_goes_on(tmp_path, alone, victim):
    run = tmp_path / "run"
    processes = toy(run, 2, "--pause", 0.2)
    until_step(run, 12)
    processes[victim].kill()
    begun = time.monotonic()
    other = codes([processes[1 - victim]], 120)[0]
    assert time.monotonic() - begun < 120
    assert other == hosts.LOST, said(run)
    assert f"error: process {victim} (" in said(run)
    assert codes(toy(run, 2), 200) == [0, 0], said(run)
    close(run, alone)


@pytest.mark.slow
def test_units_are_divided_and_a_restart_does_the_missing_ones(tmp_path):
    run = tmp_path / "run"
    processes = toy(run, 2, "--units", 6, "--pause", 1.0)
    done = run / "done.txt"
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and not (
        done.exists() and len(done.read_text().splitlines()) >= 3
    ):
        time.sleep(0.05)
    for process in processes:
        process.kill()
    first = {line.split()[0] for line in done.read_text().splitlines()}
    assert codes(toy(run, 3, "--units", 6), 200) == [0, 0, 0], said(run)
    lines = [line.split() for line in done.read_text().splitlines()]
    kept = {p.stem for p in run.glob("units*/parts/*")}
    assert not kept  # cleared away once they are in the result
    assert {number for number, _ in lines} == set("012345")
    # A unit is done twice only if it was killed between its work and its file.
    assert len(lines) <= 6 + 2
    assert len({who for number, who in lines if number not in first}) > 1
    out = run.with_suffix(".logs") / "0.out"
    assert out.read_text().strip() == "[0, 1, 4, 9, 16, 25]"


@pytest.mark.slow
def test_random_kills_lose_little_and_double_nothing(tmp_path, alone):
    """EGJAX_KILLS of them (3, if it is not set), of one process or all, at random steps."""
    run, every, rng = tmp_path / "run", 5, np.random.default_rng(0)
    settings = ("--pause", 0.2, "--save-every", every)
    for _ in range(int(os.environ.get("EGJAX_KILLS", 3))):
        at = saved(run)
        processes = toy(run, 2, *settings, EGJAX_SILENCE="10")
        until_step(run, min(at + int(rng.integers(1, 2 * every)), 39))
        seen = steps(run)[-1]
        victims = processes if rng.random() < 0.3 else [processes[int(rng.integers(2))]]
        for victim in victims:
            victim.kill()
        assert all(codes(processes, 120)), said(run)
        assert saved(run) >= seen - every
    assert codes(toy(run, 2, *settings), 200) == [0, 0], said(run)
    close(run, alone)


def saved(run: Path) -> int:
    """Step of the latest complete checkpoint."""
    found = run.glob("toy.unfinished/checkpoints/*")
    return max((int(p.name) for p in found if p.name.isdecimal()), default=0)


@pytest.mark.slow
def test_an_error_of_one_process_ends_the_others_with_its_line(tmp_path):
    run = tmp_path / "run"
    assert codes(toy(run, 2, "--fail", 1), 120) == [2, 2], said(run)
    assert said(run).count("this one cannot") >= 2


@pytest.mark.slow
def test_a_signal_to_a_process_that_leaves_does_not_keep_it(tmp_path):
    run = tmp_path / "run"
    processes = toy(run, 2, "--fail", 0)
    for _ in range(round(120 / LOOK)):
        if "error: this one cannot" in said(run):
            break
        time.sleep(LOOK)
    processes[0].send_signal(signal.SIGTERM)
    assert codes(processes, 30) == [2, 2], said(run)
