"""Shell scripts, manifest and container file under launch/: checked, and run against stand-ins for what they call."""

import os
import re
import shlex
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml
from kubeflow_trainer_api.models import JobsetV1alpha2JobSet
from recorded_commands import RecordedCommands, Reply
from run_helpers import ROOT

from launch.tpu import main
from llip_jax.command_line import split_overrides
from llip_jax.config_files import load
from llip_jax.launching.slices import parse_topology

SCRIPTS = [*sorted((ROOT / "launch").rglob("*.sh")), *sorted((ROOT / "launch").rglob("*.sbatch")), ROOT / ".ci/run"]
WORDS = ["--config", "configs/llip_b16.py", "--config.data.path=a b/{0..9}$HOME.tar"]


def call(
    script: str, *words: str, commands: RecordedCommands, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(ROOT / "launch" / script), *words],
        env=os.environ | {"PATH": commands.path} | (environment or {}),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_has_nothing_to_say(script: Path) -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([shellcheck, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


# Slurm


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"),
    [
        (0, "", False),
        (2, "", False),
        (75, "", True),
        (75, "99", True),
        (143, "99", True),
        (1, "", True),
        (137, "19", True),
        (1, "20", False),
    ],
)
def test_a_slurm_job_goes_back_into_the_queue_where_that_helps(
    tmp_path: Path, code: int, restarts: str, requeued: bool
) -> None:
    commands = RecordedCommands(tmp_path / "bin", "srun", "scontrol")
    commands.answer("^srun", Reply(code))
    slurm = {"SLURM_JOB_ID": "17", "SLURM_CPUS_PER_TASK": "12", "PYTHON": "python"}
    done = call(
        "train.sbatch",
        *WORDS,
        commands=commands,
        environment=slurm | ({"SLURM_RESTART_COUNT": restarts} if restarts else {}),
    )
    assert commands.calls("srun") == [
        ["srun", "--kill-on-bad-exit=0", "--wait=300", "--cpus-per-task=12", "python", "launch/train.py", *WORDS]
    ]
    assert commands.calls("scontrol") == ([["scontrol", "requeue", "17"]] if requeued else [])
    assert done.returncode == (0 if requeued else code)


def test_a_slurm_job_that_cannot_be_requeued_ends_with_the_training_s_exit_code(tmp_path: Path) -> None:
    commands = RecordedCommands(tmp_path / "bin", "srun", "scontrol")
    commands.answer("^srun", Reply(75))
    commands.answer("^scontrol", Reply(1, err="Requested operation is presently disabled"))
    assert call("train.sbatch", *WORDS, commands=commands, environment={"SLURM_JOB_ID": "17"}).returncode == 75


# TPU hosts


@pytest.fixture
def host(tmp_path: Path) -> tuple[RecordedCommands, dict[str, str]]:
    """A host with nothing mounted; sudo only writes down."""
    names = ("sudo", "mountpoint", "gcsfuse", "systemctl", "python3", "mount.nfs")
    commands = RecordedCommands(tmp_path / "bin", *names)
    commands.answer("^mountpoint", Reply(1))
    uv = tmp_path / "home/.local/bin"
    uv.mkdir(parents=True)
    (uv / "uv").write_text('#!/bin/sh\nmkdir -p "$HOME/llip_jax_venv"\necho "$PWD: uv $*" >> "$HOME/uv"\n')
    (uv / "uv").chmod(0o700)
    return commands, {"HOME": str(tmp_path / "home")}


@pytest.mark.parametrize(
    ("url", "mounts"),
    [
        (
            "gs://runs",
            "/gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 runs /mnt/llip",
        ),
        ("nfs://10.0.0.2/share/a", "sudo mount -t nfs 10.0.0.2:/share/a /mnt/llip"),
    ],
)
def test_setup_installs_and_mounts_and_can_be_done_again(
    host: tuple[RecordedCommands, dict[str, str]], url: str, mounts: str
) -> None:
    commands, environment = host
    for _ in range(2):
        done = call("tpu_worker.sh", "setup", url, commands=commands, environment=environment)
        assert done.returncode == 0, done.stderr
    assert " ".join(commands.calls()[-1]).endswith(mounts)
    home = environment["HOME"]
    install = f"{ROOT}: uv pip install --quiet --requirement requirements.txt --editable .[tpu]"
    venv = f"uv venv --quiet --python 3.11 {home}/llip_jax_venv"
    lines = Path(home, "uv").read_text().splitlines()
    assert lines[0].endswith(venv)
    assert lines[1:] == [install, install]


def test_what_is_mounted_is_not_mounted_again(host: tuple[RecordedCommands, dict[str, str]], tmp_path: Path) -> None:
    _, environment = host
    commands = RecordedCommands(tmp_path / "mounted", "sudo", "mountpoint", "gcsfuse")
    call("tpu_worker.sh", "setup", "gs://runs", commands=commands, environment=environment)
    assert commands.calls() == [["mountpoint", "--quiet", "/mnt/llip"]]


def test_training_is_started_as_a_service_with_its_words_as_they_are(
    host: tuple[RecordedCommands, dict[str, str]],
) -> None:
    commands, environment = host
    call("tpu_worker.sh", "setup", "gs://runs", commands=commands, environment=environment)
    done = call("tpu_worker.sh", "start", *WORDS, commands=commands, environment=environment)
    assert done.returncode == 0, done.stderr
    stop, reset, start = commands.calls("sudo")[-3:]
    assert (stop, reset) == (
        ["sudo", "systemctl", "stop", "llip-train"],
        ["sudo", "systemctl", "reset-failed", "llip-train"],
    )
    python = start.index(f"{environment['HOME']}/llip_jax_venv/bin/python")
    assert start[python + 1 :] == ["launch/train.py", *[word.replace("$", "$$") for word in WORDS]]
    assert {
        "--unit=llip-train",
        f"--uid={os.getuid()}",
        f"--working-directory={ROOT}",
        "--property=KillMode=mixed",
    } < set(start)
    assert "--property=RemainAfterExit=yes" in start  # otherwise a finished training is forgotten
    # A host that goes down ends services in reverse order: the run still has to save.
    assert "--property=After=network-online.target llip-storage.service mnt-llip.mount" in start


def test_the_state_is_told_without_touching_the_log(host: tuple[RecordedCommands, dict[str, str]]) -> None:
    commands, environment = host
    commands.answer("^systemctl show", Reply(out="SubState=running\n"))
    done = call("tpu_worker.sh", "state", commands=commands, environment=environment)
    assert done.stdout == "SubState=running\n"
    assert [words[0] for words in commands.calls()] == ["systemctl"]


def test_poll_says_what_is_new_and_whether_training_was_told_to_stop(
    host: tuple[RecordedCommands, dict[str, str]],
) -> None:
    commands, environment = host
    commands.answer("^sudo journalctl", Reply(out="step 10\n"), Reply())
    commands.answer("^systemctl show", Reply(out="SubState=running\n"))
    first = call("tpu_worker.sh", "poll", commands=commands, environment=environment)
    assert first.stdout == "step 10\n== state ==\nSubState=running\n"
    assert f"--cursor-file={environment['HOME']}/.llip_jax_cursor" in commands.calls("sudo")[0]
    call("tpu_worker.sh", "stop", commands=commands, environment=environment)
    second = call("tpu_worker.sh", "poll", commands=commands, environment=environment)
    assert second.stdout == "== state ==\nSubState=running\nStopped=yes\n"
    call("tpu_worker.sh", "setup", "gs://runs", commands=commands, environment=environment)
    call("tpu_worker.sh", "start", *WORDS, commands=commands, environment=environment)
    third = call("tpu_worker.sh", "poll", commands=commands, environment=environment)
    assert third.stdout == "== state ==\nSubState=running\n"


def test_an_unknown_action_on_a_host_is_refused(host: tuple[RecordedCommands, dict[str, str]]) -> None:
    commands, environment = host
    done = call("tpu_worker.sh", "reboot", commands=commands, environment=environment)
    assert (done.returncode, done.stderr) == (2, "tpu_worker.sh: no action named reboot\n")


# GKE


def manifest() -> dict:
    return yaml.safe_load((ROOT / "launch/gke/jobset.yaml").read_text())


def test_the_manifest_has_only_what_kubernetes_knows() -> None:
    """Models made of Kubernetes' and JobSet's own specification refuse wrong values and leave out unknown fields."""
    given = manifest()
    parsed = JobsetV1alpha2JobSet.from_dict(given)
    assert parsed is not None
    assert parsed.to_dict() == given


def test_the_manifest_asks_for_all_hosts_of_its_slice() -> None:
    job = manifest()["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    (container,) = pod["containers"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert job["parallelism"] == job["completions"] == parse_topology(f"v5e:{topology}").chips / chips
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_only_a_bad_configuration_is_not_restarted_on_gke() -> None:
    spec = manifest()["spec"]
    (rule,) = spec["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    assert (rule["onExitCodes"]["operator"], rule["onExitCodes"]["values"]) == ("In", [2])
    (container,) = spec["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    (policy,) = spec["failurePolicy"]["rules"]
    assert (policy["action"], policy["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])


def test_the_manifest_s_command_is_one_of_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    job = manifest()["spec"]["replicatedJobs"][0]["template"]["spec"]
    python, program, *words = job["template"]["spec"]["containers"][0]["command"]
    others, overrides = split_overrides(words)
    assert (python, program) == ("python", "launch/train.py")
    assert [word.partition("=")[0] for word in others] == ["--config", "--workdir"]
    load(others[0].partition("=")[2], overrides)


def test_xpk_is_told_what_to_run_and_what_to_restart(tmp_path: Path) -> None:
    commands = RecordedCommands(tmp_path / "bin", "xpk")
    given = {
        "CLUSTER": "llip",
        "ZONE": "us-west4-a",
        "TPU_TYPE": "v5litepod-256",
        "IMAGE": "image:1",
        "STORAGE": "runs",
    }
    done = call(
        "gke/xpk.sh", "g14", *WORDS, commands=commands, environment=given | {"XPK_FLAGS": "--priority=high --dry-run"}
    )
    assert done.returncode == 0, done.stderr
    ((*words, command, priority, dry_run),) = commands.calls()
    assert words == [
        *["xpk", "workload", "create", "--workload=g14", "--cluster=llip", "--zone=us-west4-a"],
        *["--tpu-type=v5litepod-256", "--docker-image=image:1", "--storage=runs", "--max-restarts=100"],
        *["--restart-on-exit-codes=1,75", "--termination-grace-period-seconds=600"],
    ]
    assert shlex.split(command.removeprefix("--command=")) == ["exec", "python", "launch/train.py", *WORDS]
    assert (priority, dry_run) == ("--priority=high", "--dry-run")


def test_xpk_without_a_cluster_is_not_called(tmp_path: Path) -> None:
    commands = RecordedCommands(tmp_path / "bin", "xpk")
    done = call("gke/xpk.sh", "g14", *WORDS, commands=commands)
    assert done.returncode != 0
    assert "CLUSTER: name of the cluster" in done.stderr
    assert commands.calls() == []


# Container and documentation


def test_the_container_has_what_the_program_needs_and_nothing_of_the_workplace() -> None:
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line]
    assert ignored[0] == "*"
    kept = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    assert kept >= {"llip_jax", "launch", "configs"}
    assert all((ROOT / name).exists() for name in kept)
    (copied,) = re.findall(r"^COPY (.*) \./$", (ROOT / "Containerfile").read_text(), re.MULTILINE)
    assert all(any(fnmatch(name, pattern) for pattern in kept) for name in copied.split())


def documented() -> list[str]:
    """Commands of docs/pods.md that call the launcher."""
    text = (ROOT / "docs/pods.md").read_text().replace("\\\n", " ")
    return [line.strip() for line in text.splitlines() if line.strip().startswith("python launch/tpu.py ")]


def test_the_documentation_calls_the_launcher() -> None:
    assert len(documented()) >= 5


@pytest.mark.parametrize("command", documented())
def test_documented_commands_of_the_launcher_are_understood(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"ZONE": "us-west4-a", "BUCKET": "runs"}.items():
        command = command.replace(f"${name}", value)
    words = shlex.split(command, comments=True)[2:]
    monkeypatch.chdir(ROOT)
    assert main([words[0], "--dry-run", *words[1:]]) == 0
    assert "gcloud compute tpus" in capsys.readouterr().out


def test_every_documented_training_names_its_data() -> None:
    text = (ROOT / "docs/pods.md").read_text().replace("\\\n", " ")
    trainings = [line for line in text.splitlines() if "--workdir" in line and "--config configs/" in line]
    assert len(trainings) >= 6
    for line in trainings:
        assert "--config.data.source=" in line, line
        assert "--config.data.path=" in line, line
