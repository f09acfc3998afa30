"""The TPU scripts against a gcloud that records: what they ask for, when, and how they mend."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted((ROOT / "tpu_scripts").glob("*.sh"))
NEEDED = [tool for tool in ("bash", "git", "setsid") if shutil.which(tool) is None]
pytestmark = pytest.mark.skipif(bool(NEEDED), reason=f"not installed: {NEEDED}")

# Answers from files: `resource` and `node` hold one answer a line, the last one stays. scp and ssh
# act on the folder $FAKE/home instead of a worker; installing is left out. `create` and `ssh` hold
# what goes wrong with each such call, one word a line.
GCLOUD = f"""#!{sys.executable}
import json, os, shutil, subprocess, sys
from pathlib import Path
fake = Path(os.environ["FAKE"])
words = sys.argv[1:]
with (fake / "calls").open("a") as calls:
    calls.write(json.dumps(words) + "\\n")

def answer(name):
    lines = (fake / name).read_text().splitlines()
    if len(lines) > 1:
        (fake / name).write_text("\\n".join(lines[1:]))
    if lines[0] == "ABSENT":
        sys.exit("ERROR: NOT_FOUND: no such resource")
    if lines[0] == "OFFLINE":
        sys.exit("ERROR: connection refused")
    print(lines[0])

def fault(name):
    lines = (fake / name).read_text().splitlines() if (fake / name).exists() else []
    (fake / name).write_text("\\n".join(lines[1:]))
    if lines and lines[0] == "QUOTA":
        sys.exit("ERROR: RESOURCE_EXHAUSTED: Quota limit 'TPUV5sLitepod' has been exceeded")
    if lines and lines[0] == "HALF":  # the request was taken, its answer lost
        (fake / "resource").write_text("PROVISIONING\\nPROVISIONING\\nACTIVE")
        (fake / "node").write_text("ABSENT\\nREADY")
        sys.exit("ERROR: deadline exceeded")
    if lines and lines[0] == "TIMEOUT":
        print("ssh: connect to host 10.0.0.2 port 22: Connection timed out", file=sys.stderr)
        sys.exit(255)

if "create" in words:
    fault("create")
elif "describe" in words:
    answer("resource" if "queued-resources" in words else "node")
elif "delete" in words:
    shutil.rmtree(fake / "home")
    (fake / "home").mkdir()
elif "scp" in words:
    shutil.copy(words[words.index("scp") + 1], fake / "home")
elif "ssh" in words:
    fault("ssh")
    command = words[words.index("--command") + 1].partition(" && ")[0]
    worker = {{k: v for k, v in os.environ.items() if k != "RUNS_DIR" and k[:6] != "EGJAX_"}}
    done = subprocess.run(["bash", "-c", command], cwd=fake / "home",
        env={{**worker, "HOME": str(fake / "home")}})
    sys.exit(done.returncode)
"""

RUN = ("--run", "gs://b/main")  # a place that outlives the workers


class Cloud:
    """A clone of the scripts, a gcloud that records, a folder that stands for the worker."""

    def __init__(self, path: Path):
        self.path = path
        self.home = path / "home"
        self.home.mkdir()
        (path / "bin").mkdir()
        (path / "bin" / "gcloud").write_text(GCLOUD)
        (path / "bin" / "gcloud").chmod(0o755)
        self.clone = path / "clone"
        shutil.copytree(ROOT / "tpu_scripts", self.clone / "tpu_scripts")
        (self.clone / "job.py").write_text(
            "import sys, time, pathlib\n"
            "print('args', sys.argv[1:], flush=True)\n"
            "pathlib.Path('runs/main').mkdir(parents=True, exist_ok=True)\n"
            "time.sleep(float(sys.argv[1])); sys.exit(int(sys.argv[2]))\n"
        )
        (self.clone / ".venv" / "bin").mkdir(parents=True)
        (self.clone / ".venv" / "bin" / "python").symlink_to(sys.executable)
        identity = ["-c", "user.name=t", "-c", "user.email=t@t"]
        for words in (["init", "-q"], ["add", "-f", "."], [*identity, "commit", "-qm", "x"]):
            subprocess.run(["git", "-C", str(self.clone), *words], check=True)
        self.answers(resource="ABSENT", node="ABSENT")

    def answers(self, **states: str) -> None:
        for name, lines in states.items():
            (self.path / name).write_text(lines.replace(" ", "\n"))

    def run(self, script: str, *arguments: str, **settings: str) -> subprocess.CompletedProcess:
        environment = {
            **os.environ,
            "PATH": f"{self.path / 'bin'}:{os.environ['PATH']}",
            "FAKE": str(self.path),
            "POLL": "0.1",
            **settings,
        }
        return subprocess.run(
            [str(self.clone / "tpu_scripts" / script), *arguments],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def calls(self) -> list[list[str]]:
        file = self.path / "calls"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def verbs(self) -> list[str]:
        """What was done, without the questions: create, delete, scp, ssh setup, ssh start, …"""
        found = []
        for words in self.calls():
            verb = next(w for w in words if w in ("create", "delete", "describe", "scp", "ssh"))
            if verb == "ssh":
                command = words[words.index("--command") + 1]
                verb += " " + command.split("remote.sh")[1].split()[0]
            if verb not in ("describe", "ssh status"):
                found.append(verb)
        return found


@pytest.fixture
def cloud(tmp_path):
    return Cloud(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert os.access(script, os.X_OK)
    if shutil.which("shellcheck"):
        done = subprocess.run(
            ["shellcheck", "-x", script.name], cwd=script.parent, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("script", "arguments", "expected"),
    [
        ("create.sh", (), ["queued-resources create egjax", "--spot", "--project p"]),
        ("delete.sh", (), ["queued-resources delete egjax"]),
        ("setup.sh", (), ["tpu-vm scp", "remote.sh\\ setup"]),
        ("run.sh", ("job", "0", "it's", *RUN), ["--worker all", "start\\ main"]),
        ("logs.sh", (), ["--worker 0", "logs\\ main"]),
        ("stop.sh", (), ["--worker all", "stop\\ main"]),
        ("watch.sh", ("job", *RUN), ["create", "scp", "start\\ main", "status", "delete"]),
    ],
)
def test_a_dry_run_prints_the_commands_and_calls_nothing(cloud, script, arguments, expected):
    done = cloud.run(script, *arguments, DRY_RUN="1", SPOT="1", PROJECT="p")
    assert done.returncode == 0, done.stderr
    assert cloud.calls() == []
    assert all(line.startswith("gcloud ") for line in done.stdout.splitlines())
    for words in expected:
        assert words in done.stdout


def test_create_asks_once_and_waits(cloud):
    cloud.answers(resource="ABSENT WAITING_FOR_RESOURCES PROVISIONING ACTIVE")
    assert cloud.run("create.sh").returncode == 0
    assert cloud.run("create.sh").returncode == 0
    assert cloud.verbs() == ["create"]


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED"])
def test_create_says_what_to_do_with_a_dead_slice(cloud, state):
    cloud.answers(resource=state)
    done = cloud.run("create.sh")
    assert done.returncode == 2
    assert "delete.sh" in done.stderr
    assert cloud.verbs() == []


def test_delete_twice_is_no_error(cloud):
    cloud.answers(resource="ACTIVE ABSENT")
    assert [cloud.run("delete.sh").returncode for _ in range(2)] == [0, 0]
    assert cloud.verbs() == ["delete"]


def test_no_answer_is_not_taken_for_absence(cloud):
    cloud.answers(resource="OFFLINE")
    for script in ("create.sh", "delete.sh"):
        assert cloud.run(script).returncode != 0
    assert cloud.verbs() == []


def status(cloud: Cloud) -> str:
    """What the worker says of the run."""
    environment = {**os.environ, "HOME": str(cloud.home)}
    return subprocess.run(
        ["bash", "egjax/tpu_scripts/remote.sh", "status", "main"],
        cwd=cloud.home,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()


def until(wanted: str, cloud: Cloud) -> str:
    for _ in range(100):
        found = status(cloud)
        if found == wanted:
            break
        time.sleep(0.1)
    return found


def test_a_run_is_started_once_and_tells_how_it_ended(cloud):
    assert cloud.run("setup.sh").returncode == 0
    assert status(cloud) == "absent"
    assert "started" in cloud.run("run.sh", "job", "1", "3", "it's a 'test'").stdout
    assert "is at work" in cloud.run("run.sh", "job", "1", "3").stdout
    assert status(cloud) == "running"
    assert until("ended 3", cloud) == "ended 3"
    log = (cloud.home / "egjax-runs" / "main.log").read_text()
    assert log.count("args") == 1
    assert "it's a 'test'" in log


def test_stop_ends_the_run(cloud):
    cloud.run("setup.sh")
    cloud.run("run.sh", "job", "50", "0")
    time.sleep(0.5)
    assert "stopped" in cloud.run("stop.sh").stdout
    assert status(cloud) == "ended 143"
    assert "not at work" in cloud.run("stop.sh").stdout


def test_watch_brings_up_and_leaves_with_the_code_of_the_run(cloud):
    cloud.answers(resource="ABSENT ABSENT ABSENT ACTIVE", node="ABSENT READY")
    done = cloud.run("watch.sh", "job", "0.2", "7")
    assert done.returncode == 7, done.stderr
    assert cloud.verbs() == ["create", "scp", "ssh setup", "ssh start"]


BOOT = Path("/proc/sys/kernel/random/boot_id")


def at_work(cloud: Cloud, boot: str) -> None:
    """The worker's note of a process that lives."""
    (cloud.home / "egjax-runs").mkdir(exist_ok=True)
    (cloud.home / "egjax-runs" / "main.pid").write_text(f"{os.getpid()} {boot}\n")


@pytest.mark.parametrize("lost", [("SUSPENDED", "READY"), ("ACTIVE", "PREEMPTED")])
def test_watch_continues_the_run_after_a_preemption(cloud, lost):
    resource, node = lost
    cloud.run("setup.sh")
    (cloud.path / "calls").unlink()
    at_work(cloud, BOOT.read_text().strip())
    # Looks of watch, watch (no answer), watch, delete, create, create, watch.
    cloud.answers(
        resource=f"ACTIVE OFFLINE {resource} {resource} ABSENT ACTIVE",
        node=f"READY {node} READY" if node == "PREEMPTED" else "READY",
    )
    done = cloud.run("watch.sh", "job", "0.2", "0", *RUN, SPOT="1")
    assert done.returncode == 0, done.stderr
    assert cloud.verbs() == ["delete", "create", "scp", "ssh setup", "ssh start"]
    (start,) = (words for words in cloud.calls() if " start " in words[-1])
    assert start[-1].endswith(" start main job 0.2 0 --run gs://b/main")


def test_a_process_of_an_earlier_boot_is_not_the_run(cloud):
    cloud.run("setup.sh")
    at_work(cloud, "another")
    assert status(cloud) == "absent"
    at_work(cloud, BOOT.read_text().strip())
    assert status(cloud) == "running"


@pytest.mark.parametrize("code", ["143", "4"])
def test_watch_starts_a_run_again_that_was_lost_on_a_slice_that_was_not(cloud, code):
    """A reboot for maintenance, or a worker that was slower than the others to be there."""
    cloud.answers(resource="ACTIVE", node="READY")
    cloud.run("setup.sh")
    (cloud.home / "egjax-runs").mkdir(exist_ok=True)
    (cloud.home / "egjax-runs" / "main.code").write_text(f"{code}\n")
    assert status(cloud) == "lost"
    done = cloud.run("watch.sh", "job", "0.2", "0", *RUN)
    assert done.returncode == 0, done.stderr
    assert "run main was lost, its slice is there" in done.stderr
    assert "delete" not in cloud.verbs()


def test_watch_gives_up_a_run_that_is_lost_each_time(cloud):
    cloud.answers(resource="ACTIVE", node="READY")
    cloud.run("setup.sh")
    watch = cloud.clone / "tpu_scripts" / "watch.sh"
    watch.write_text(watch.read_text().replace("again=10", "again=2"))
    done = cloud.run("watch.sh", "job", "0", "4", *RUN)
    assert done.returncode == 2
    assert "was lost again and again" in done.stderr
    assert (cloud.home / "egjax-runs" / "main.log").read_text().count("args") == 3


def test_watch_ends_where_somebody_stopped_the_run(cloud):
    cloud.answers(resource="ACTIVE", node="READY")
    cloud.run("setup.sh")
    cloud.run("run.sh", "job", "50", "0")
    time.sleep(0.5)
    cloud.run("stop.sh")
    assert cloud.run("watch.sh", "job", "50", "0", *RUN).returncode == 143


@pytest.mark.parametrize(
    ("arguments", "lasts"),
    [
        ((), False),
        (("--run", "runs/main"), False),
        (("--run", "gs://c/y", "--run", "runs/other"), False),
        (("--model", "gs://c/y"), False),
        (("--run", "/mnt/other/main"), False),
        (("--run", "gs://c/y"), True),
        (("--run=gs://c/y",), True),
        (("--out", "gs://c/y/eai"), True),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_a_spot_slice_wants_a_place_that_outlives_it(cloud, arguments, lasts):
    done = cloud.run("watch.sh", "job", *arguments, SPOT="1", DRY_RUN="1")
    if lasts:
        assert done.returncode == 0, done.stderr
    else:
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("error: SPOT=1 needs --run gs://")
        assert done.stderr.count("\n") == 1
    assert cloud.calls() == []


@pytest.mark.parametrize("place", ["runs/main", "./runs/main", "/mnt/shared/main"])
def test_a_shared_file_system_outlives_a_spot_slice(cloud, place):
    settings = {"SPOT": "1", "DRY_RUN": "1", "RUNS_DIR": "/mnt/shared"}
    done = cloud.run("watch.sh", "job", "--run", place, **settings)
    assert done.returncode == 0, done.stderr


def test_settings_reach_the_workers_and_nothing_else_does(cloud):
    settings = {
        "RUNS_DIR": str(cloud.path / "it's shared"),
        "EGJAX_EXTRA": "cuda",
        "EGJAX_MULTI_HOST": "0",
        "EGJAX_BUCKET_SILENCE": "7",
        "EGJAX_SILENCE": "8",
        "EGJAX_PATIENCE": "9",
        "EGJAX_TRACEBACK": "1",
        "EGJAX_COSTS": "a b.json",
    }
    others = {"EGJAX_PROCESS": "1", "WANDB_API_KEY": "secret"}
    (cloud.path / "it's shared").mkdir()
    cloud.answers(resource="ACTIVE", node="READY")
    done = cloud.run("watch.sh", "job", "0.2", "0", **settings, **others)
    assert done.returncode == 0, done.stderr
    assert cloud.verbs() == ["scp", "ssh setup", "ssh start"]
    for words in (words for words in cloud.calls() if "ssh" in words):
        command = words[-1].replace("tar xzf egjax.tar.gz && ", "")
        shown = subprocess.run(
            ["bash", "-c", command.replace("bash egjax/tpu_scripts/remote.sh", "env #")],
            env={"PATH": os.environ["PATH"]},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()
        given = dict(line.split("=", 1) for line in shown)
        assert {k: v for k, v in given.items() if k in settings} == settings
        assert not set(given) & set(others)
    assert (cloud.path / "it's shared" / "main").is_dir()  # the job wrote runs/main


@pytest.mark.parametrize(
    ("chips", "image"),
    [
        ("v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v5p-8", "v2-alpha-tpuv5"),
        ("v6e-8", "v2-alpha-tpuv6e"),
        ("v4-8", "tpu-ubuntu2204-base"),
    ],
)
def test_the_image_follows_from_the_chips(cloud, chips, image):
    def asked(**settings: str) -> str:
        done = cloud.run("create.sh", ACCELERATOR_TYPE=chips, DRY_RUN="1", **settings)
        return done.stdout.split("--runtime-version ")[1].strip()

    assert asked() == image
    assert asked(RUNTIME_VERSION="mine") == "mine"
    for page in ("docs/tpu.md", "tpu_scripts/README.md"):
        text = (ROOT / page).read_text()
        assert "tpu/docs/runtimes" in text
        assert chips.startswith("v4") or f"`{image}`" in text


def test_chips_without_a_known_image_end_the_watch(cloud):
    done = cloud.run("watch.sh", "job", ACCELERATOR_TYPE="v99-8")
    assert done.returncode == 2
    assert "RUNTIME_VERSION" in done.stderr
    assert cloud.verbs() == []


@pytest.mark.parametrize("page", ["docs/tpu.md", "tpu_scripts/README.md"])
def test_the_first_commands_of_a_page_are_accepted(cloud, page):
    """As printed, but for what they would do: each is a dry run."""
    block = re.search(r"```bash\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert block is not None
    ours = ("export ", "DRY_RUN=1 ", "tpu_scripts/")
    lines = [line for line in block[1].splitlines() if line.startswith(ours)]
    assert sum("watch.sh" in line for line in lines) == 2
    done = subprocess.run(
        ["bash", "-ec", "\n".join(lines)],
        cwd=cloud.clone,
        env={**os.environ, "DRY_RUN": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("start\\ first\\ experiments.pipeline") == 2


def test_the_command_that_prints_the_numbers_prints_them():
    line = re.search(r"results.json \| (.*)", (ROOT / "docs" / "tpu.md").read_text())
    assert line is not None
    results = ROOT / "experiments" / "results" / "long" / "results.json"
    shown = subprocess.run(
        ["bash", "-c", line[1]],
        stdin=results.open(),
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONUTF8": "1"},
    ).stdout
    models = json.loads(results.read_text())["models"]
    wanted = [
        f"{model['name']} {score['split']} {score['success']['value']}"
        for model in models
        for score in model["scores"]
    ]
    assert len(wanted) > 10
    assert shown.splitlines() == wanted


def test_pages_agree_on_the_time_of_a_run():
    found = [
        re.findall(r"(\d+) minutes on two CPU cores", (ROOT / page).read_text())
        for page in ("README.md", "docs/tpu.md")
    ]
    assert found[0] == found[1] != []


@pytest.mark.parametrize("host", ["has uv", "had uv", "has pip", "guards its Python"])
def test_setup_finds_or_installs_uv(cloud, host):
    """On a host with nothing but these tools; `had uv`: from an earlier set-up."""
    tools, home = cloud.path / "tools", cloud.home
    for folder in (tools, home / ".local" / "bin"):
        folder.mkdir(parents=True)
    for tool in ("bash", "dirname", "mkdir", "cp"):
        (tools / tool).symlink_to(shutil.which(tool))

    def fake(file: Path, text: str) -> Path:
        file.write_text(f"#!/usr/bin/env bash\nset -e\n{text}\n")
        file.chmod(0o755)
        return file

    (tools / "env").symlink_to(shutil.which("env"))
    uv = fake(cloud.path / "uv", 'echo "$*" >>"$FAKE/uv_calls"')
    guarded = '[[ "$*" == *--break-system-packages* ]] || exit 1' if "guards" in host else ""
    fake(
        tools / "python3",
        f'echo "$*" >>"$FAKE/pip_calls"\n[[ "$*" == *--user* ]]\n{guarded}\n'
        'cp "$FAKE/uv" "$HOME/.local/bin/uv"',
    )
    if host == "has uv":
        shutil.copy(uv, tools)
    elif host == "had uv":
        shutil.copy(uv, home / ".local" / "bin")
    environment = {"PATH": str(tools), "HOME": str(home), "FAKE": str(cloud.path)}
    for _ in range(2):
        subprocess.run(
            ["bash", "tpu_scripts/remote.sh", "setup"],
            cwd=cloud.clone,
            env=environment,
            check=True,
        )
    pip = cloud.path / "pip_calls"
    calls = pip.read_text().splitlines() if pip.exists() else []
    assert len(calls) == {"has uv": 0, "had uv": 0, "has pip": 1, "guards its Python": 2}[host]
    assert (cloud.path / "uv_calls").read_text().count("-e .[all,gcs,tpu]\n") == 2


def test_a_quota_error_ends_the_watch_and_says_what_to_do(cloud):
    cloud.answers(create="QUOTA")
    done = cloud.run("watch.sh", "job", "0.2", "0")
    assert done.returncode == 2
    assert "Quota limit" in done.stderr
    assert "ask for quota" in done.stderr
    assert cloud.verbs() == ["create"]


def test_watch_takes_up_a_slice_that_was_half_created(cloud):
    """The first request is taken but its answer lost: it is not asked for twice, nor deleted."""
    cloud.answers(create="HALF")
    done = cloud.run("watch.sh", "job", "0.2", "5")
    assert done.returncode == 5, done.stderr
    assert cloud.verbs() == ["create", "scp", "ssh setup", "ssh start"]


def test_watch_outlives_ssh_timeouts(cloud):
    """At the set-up, and while the run works: neither deletes the slice nor starts a second run."""
    cloud.answers(resource="ACTIVE", node="READY", ssh="TIMEOUT TIMEOUT OK OK OK TIMEOUT")
    cloud.run("setup.sh")  # times out, nothing is installed
    done = cloud.run("watch.sh", "job", "1", "6")
    assert done.returncode == 6, done.stderr
    assert "delete" not in cloud.verbs()
    log = (cloud.home / "egjax-runs" / "main.log").read_text()
    assert log.count("args") == 1


def test_a_run_in_the_foreground_saves_on_sigterm_and_leaves_with_its_code(cloud):
    """What slurm.sh, sky.yaml and a plain machine use."""
    cloud.run("setup.sh")
    environment = {**os.environ, "HOME": str(cloud.home), "RUNS_DIR": str(cloud.path / "shared")}
    (cloud.path / "shared").mkdir()
    command = ["bash", "tpu_scripts/remote.sh", "here", "main", "job"]
    where = cloud.home / "egjax"
    assert subprocess.run([*command, "0", "7"], cwd=where, env=environment).returncode == 7
    assert (cloud.path / "shared" / "main").is_dir()
    process = subprocess.Popen([*command, "50", "0"], cwd=where, env=environment)
    time.sleep(1.0)
    process.terminate()
    assert process.wait(20) == 143


def test_slurm_queues_a_run_again_that_was_asked_to_stop(cloud):
    for name, text in (
        ("scontrol", '[[ $1 == show ]] && printf "a\\nb\\n" || echo "$@" >>"$FAKE/requeued"'),
        ("srun", 'echo "$EGJAX_HOSTS $@" >>"$FAKE/srun"; exit "$CODE"'),
    ):
        file = cloud.path / "bin" / name
        file.write_text(f"#!/usr/bin/env bash\n{text}\n")
        file.chmod(0o755)
    settings = {"SLURM_JOB_ID": "9", "SLURM_JOB_NODELIST": "[a-b]"}
    settings["SLURM_SUBMIT_DIR"] = str(cloud.clone)
    assert cloud.run("slurm.sh", "job", "--run", "runs/x", CODE="0", **settings).returncode == 0
    assert not (cloud.path / "requeued").exists()
    assert cloud.run("slurm.sh", "job", CODE="143", **settings).returncode == 143
    assert (cloud.path / "requeued").read_text() == "requeue 9\n"
    words = (cloud.path / "srun").read_text().splitlines()[0]
    assert words.startswith("a,b --kill-on-bad-exit=0 bash tpu_scripts/remote.sh here 9 job --run")
    # 3: a step gave NaN, and would again. 4: a node was lost, ten times at most.
    for code, restarts, queued in (("3", "0", 1), ("4", "0", 2), ("4", "9", 3), ("4", "10", 3)):
        again = {"CODE": code, "SLURM_RESTART_COUNT": restarts}
        assert cloud.run("slurm.sh", "job", **again, **settings).returncode == int(code)
        assert (cloud.path / "requeued").read_text().count("requeue 9\n") == queued
