"""launch/tpu.py against a stand-in for gcloud that writes down how it is called."""

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from recorded_commands import RecordedCommands, Reply
from run_helpers import ROOT

from launch.tpu import main
from llip_jax.config import ConfigError
from llip_jax.launching.pod import Pod
from llip_jax.launching.queued_resources import QueuedResource, Request
from llip_jax.launching.retry import run_until_done
from llip_jax.launching.shell import Shell
from llip_jax.launching.slices import parse_topology

WHERE = ["--zone=us-west4-a", "--project=mine"]
B16 = ["--config", "configs/llip_b16.py", "--workdir", "/mnt/llip/b16"]
TRAINING = ["--config", "configs/llip_demo.py", "--workdir", "/mnt/llip/demo"]
MISSING = Reply(1, err="ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: Resource was not found")
UNREACHABLE = Reply(255, err="ssh: connect to host 10.0.0.1 port 22: Connection timed out")
OFFLINE = Reply(1, err="Unable to find the server at tpu.googleapis.com")
RUNNING = "SubState=running\nExecMainCode=0\nExecMainStatus=0\n"


def polled(state: str, log: str = "") -> Reply:
    return Reply(out=f"{log}== state ==\n{state}")


def ended(code: int, how: int = 1) -> Reply:
    """As systemd says it; ``how`` 1: exited, 2: killed."""
    return polled(f"SubState={'failed' if code else 'exited'}\nExecMainCode={how}\nExecMainStatus={code}\n")


@pytest.fixture
def gcloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RecordedCommands:
    commands = RecordedCommands(tmp_path / "bin", "gcloud", "git")
    monkeypatch.setenv("PATH", commands.path)
    return commands


def act(action: str, *flags: str) -> int:
    return main([action, "g14", *WHERE, *flags])


def steps(gcloud: RecordedCommands) -> list[str]:
    """What was done, in a word each; looking is left out."""
    done = []
    for words in gcloud.calls("gcloud"):
        if words[4] == "ssh":
            command = shlex.split(words[-1].removeprefix("--command="))
            step = command[2] if command[0] == "bash" else "unpack"
        else:
            step = words[4]
        if step not in ("poll", "state", "describe"):
            done.append(step)
    return done


def pod(sleeps: list[float] | None = None) -> Pod:
    return Pod(
        QueuedResource("g14", "us-west4-a", "mine"), Shell(), sleep=(sleeps if sleeps is not None else []).append
    )


def retry(failures: int = 5, clock: Callable[[], float] = lambda: 0.0, sleeps: list[float] | None = None) -> int:
    request = Request(parse_topology("v5e:16x16"), "spot")
    return run_until_done(pod(sleeps), request, ROOT, "gs://bucket", TRAINING, failures, clock)


# Of Cloud TPU's tables of configurations.
@pytest.mark.parametrize(
    ("topology", "chips", "accelerator"),
    [
        ("v4:2x2x1", 4, "v4-8"),
        ("v4:2x2x4", 16, "v4-32"),
        ("v4:4x4x8", 128, "v4-256"),
        ("v5e:1x1", 1, "v5litepod-1"),
        ("v5e:2x4", 8, "v5litepod-8"),
        ("v5e:16x16", 256, "v5litepod-256"),
        ("v5p:2x2x1", 4, "v5p-8"),
        ("v5p:8x8x4", 256, "v5p-512"),
        ("v5p:4x4x12", 192, "v5p-384"),
        ("v6e:8x16", 128, "v6e-128"),
    ],
)
def test_a_topology_has_the_cloud_s_name(topology: str, chips: int, accelerator: str) -> None:
    found = parse_topology(topology)
    assert (found.chips, found.accelerator_type) == (chips, accelerator)


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("v5:4x4", "expected one of v4, v5e, v5p, v6e"),
        ("tpu7x:4x4x4", "GKE"),
        ("v5e:4x4x4", "expected 2 sides, as in v5e:4x4"),
        ("v5e", "expected 2 sides"),
        ("v5e:16x8", "the second twice the first"),
        ("v5e:32x32", "expected sides of 1, 2, 4, 8 or 16"),
        ("v5p:2x2x64", "of 256 chips Cloud TPU makes 4x8x8"),
    ],
)
def test_topologies_that_cannot_be_had_are_refused(topology: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_topology(topology)


@pytest.mark.parametrize(("flags", "words"), [([], []), (["--spot"], ["--spot"]), (["--reserved"], ["--reserved"])])
def test_create_asks_once(
    gcloud: RecordedCommands, capsys: pytest.CaptureFixture[str], flags: list[str], words: list[str]
) -> None:
    gcloud.answer("describe", MISSING, Reply(out="WAITING_FOR_RESOURCES\n"))
    for _ in range(2):
        assert act("create", "--topology", "v5e:16x16", "--gcloud-flag=--network=ours", *flags) == 0
    describe = ["gcloud", "compute", "tpus", "queued-resources", "describe", "g14", *WHERE, "--quiet"]
    create = ["gcloud", "compute", "tpus", "queued-resources", "create", "g14", *WHERE, "--quiet"]
    create += ["--node-id=g14", "--accelerator-type=v5litepod-256", "--runtime-version=v2-alpha-tpuv5-lite"]
    look = [*describe, "--format=value(state.state,tpu.nodeSpec[0].node.acceleratorType)"]
    assert gcloud.calls() == [look, [*create, *words, "--network=ours"], look]
    assert "g14 is there already (WAITING_FOR_RESOURCES)" in capsys.readouterr().out


def test_a_state_that_cannot_be_read_is_not_taken_for_a_missing_slice(
    gcloud: RecordedCommands, capsys: pytest.CaptureFixture[str]
) -> None:
    gcloud.answer("describe", Reply(1, err="ERROR: You do not currently have an active account selected."))
    assert act("create", "--topology", "v5e:16x16") == 1
    assert steps(gcloud) == []
    assert "active account" in capsys.readouterr().err


def test_wait_says_each_state_once(gcloud: RecordedCommands, capsys: pytest.CaptureFixture[str]) -> None:
    states = ["ACCEPTED", "WAITING_FOR_RESOURCES", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    gcloud.answer("describe", *(Reply(out=f"{state}\n") for state in states))
    pod().wait()
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()] == [*states[:2], "PROVISIONING"]


@pytest.mark.parametrize("reply", [Reply(out="FAILED\n"), Reply(out="SUSPENDED\n")])
def test_waiting_for_what_will_not_come_ends(
    gcloud: RecordedCommands, capsys: pytest.CaptureFixture[str], reply: Reply
) -> None:
    gcloud.answer("describe", reply)
    assert act("wait") == 1
    assert "python launch/tpu.py delete g14 --zone=us-west4-a --project=mine" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["wait"], 1, "g14 is not there"),
        (["status"], 0, "there is no g14 in us-west4-a"),
        (["create", "--topology=v5e:4x4"], 1, "quota"),
    ],
)
def test_nothing_is_said_to_cost_money_where_nothing_is(
    gcloud: RecordedCommands, capsys: pytest.CaptureFixture[str], words: list[str], code: int, said: str
) -> None:
    gcloud.answer("describe", MISSING)
    gcloud.answer(" create ", Reply(1, err="ERROR: quota exceeded"))
    assert act(*words) == code
    shown = "".join(capsys.readouterr())
    assert said in shown
    assert "money" not in shown


@pytest.mark.parametrize("action", ["create", "status", "wait", "delete"])
def test_without_a_project_it_says_what_to_do(gcloud: RecordedCommands, action: str) -> None:
    missing = "The required property [project] is not currently set."
    gcloud.answer(" delete |describe", Reply(1, err=f"ERROR: (gcloud.compute.tpus.queued-resources) {missing}"))
    with pytest.raises(ConfigError, match="gcloud config set project PROJECT, or --project=PROJECT"):
        main([action, "g14", "--zone=us-west4-a", "--topology=v5e:4x4"])
    assert "create" not in steps(gcloud)


def test_a_slice_of_another_topology_is_refused_and_not_touched(gcloud: RecordedCommands) -> None:
    gcloud.answer("describe", Reply(out="ACTIVE\tv5litepod-16\n"))
    run = ["run", "--retry", "--topology=v5e:4x8", "--storage=gs://bucket"]
    for words in (["create", "--topology=v5e:4x8"], [*run, "--", *TRAINING]):
        with pytest.raises(ConfigError, match="v5litepod-32, but g14 is there already as v5litepod-16"):
            act(*words)
    assert act("create", "--topology=v5e:4x4") == 0
    assert steps(gcloud) == []


def test_setup_sends_the_last_commit_as_soon_as_the_hosts_take_it(gcloud: RecordedCommands) -> None:
    gcloud.answer("scp", UNREACHABLE, UNREACHABLE, Reply())
    sleeps: list[float] = []
    pod(sleeps).setup(ROOT, "gs://bucket")
    assert len(sleeps) == 2
    archive = gcloud.calls("git")[-1]
    file = archive[4].removeprefix("--output=")
    assert archive == ["git", "-C", str(ROOT), "archive", f"--output={file}", "HEAD"]
    on_all = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "g14", *WHERE, "--quiet", "--worker=all"]
    on_first = [*on_all[:-1], "--worker=0"]
    assert gcloud.calls("gcloud")[-4:] == [
        ["gcloud", "compute", "tpus", "tpu-vm", "scp", file, "g14:", *WHERE, "--quiet", "--worker=all"],
        [*on_first, "--command=bash llip_jax/launch/tpu_worker.sh state"],
        [*on_all, "--command=rm -rf llip_jax && mkdir llip_jax && tar -xzf llip_jax.tar.gz -C llip_jax"],
        [*on_all, "--command=bash llip_jax/launch/tpu_worker.sh setup gs://bucket"],
    ]


def test_code_is_not_replaced_under_a_running_training(gcloud: RecordedCommands) -> None:
    """Also when its host does not answer at first; and what its log says meanwhile is left for the watch."""
    gcloud.answer("sh state", Reply(out=RUNNING))
    gcloud.answer("scp", UNREACHABLE, Reply())
    pod().setup(ROOT, "gs://bucket")
    pod().start(TRAINING)
    assert steps(gcloud) == ["scp", "scp"]
    assert not any("poll" in words[-1] for words in gcloud.calls())


@pytest.mark.parametrize(
    ("code", "how", "expected"), [(0, 1, 0), (1, 1, 1), (2, 1, 2), (75, 1, 75), (2, 2, 130), (9, 2, 137), (15, 2, 143)]
)
def test_run_starts_all_hosts_and_ends_with_the_exit_code_of_the_training(
    gcloud: RecordedCommands, capsys: pytest.CaptureFixture[str], code: int, how: int, expected: int
) -> None:
    gcloud.answer("poll", ended(code, how))
    assert act("run", "--", *TRAINING, "--config.data.path=a b/*") == expected
    (start,) = [words for words in gcloud.calls("gcloud") if "start" in words[-1]]
    assert start[-2] == "--worker=all"
    words = shlex.split(start[-1].removeprefix("--command="))
    assert words == ["bash", "llip_jax/launch/tpu_worker.sh", "start", *TRAINING, "--config.data.path=a b/*"]
    assert "delete g14" in capsys.readouterr().err


def test_the_log_is_shown_as_it_comes(gcloud: RecordedCommands, capsys: pytest.CaptureFixture[str]) -> None:
    """And an answer that fails to come now and then does no harm."""
    shown = [polled(RUNNING, "step 10\n"), polled(RUNNING), polled(RUNNING, "step 20\n")]
    gcloud.answer("poll", *[reply for one in shown for reply in (one, UNREACHABLE)], ended(0))
    gcloud.answer("describe", Reply(out="ACTIVE\n"))
    assert replace(pod(), patience=2).watch().code == 0
    assert capsys.readouterr().out == "step 10\nstep 20\n"


def test_a_run_goes_on_with_new_slices_until_it_is_done(gcloud: RecordedCommands) -> None:
    """The first is taken back while it trains, the second before it is there; the third finishes."""
    active, gone = Reply(out="ACTIVE\n"), Reply(out="SUSPENDED\n")
    first = [MISSING, active, Reply(out="SUSPENDING\n")]
    gcloud.answer("describe", *first, MISSING, MISSING, gone, MISSING, MISSING, active)
    gcloud.answer("poll", polled(RUNNING), UNREACHABLE, ended(0))
    sleeps: list[float] = []
    assert retry(failures=1, sleeps=sleeps) == 0
    session = ["create", "scp", "unpack", "setup", "start"]
    assert steps(gcloud) == [*session, "delete", "create", "delete", *session]


def test_retrying_ends_with_a_slice_deleted(gcloud: RecordedCommands, capsys: pytest.CaptureFixture[str]) -> None:
    gcloud.answer("describe", MISSING, MISSING, Reply(out="ACTIVE\n"), MISSING)
    gcloud.answer("poll", ended(0))
    flags = ["--retry", "--topology=v5e:16x16", "--spot", "--storage=gs://bucket"]
    assert act("run", *flags, "--", *TRAINING) == 0
    assert steps(gcloud)[-2:] == ["start", "delete"]
    assert gcloud.calls("gcloud")[-2][3:] == ["queued-resources", "delete", "g14", *WHERE, "--quiet", "--force"]
    assert "g14 is deleted" in capsys.readouterr().out


def test_a_slice_can_be_kept(gcloud: RecordedCommands, capsys: pytest.CaptureFixture[str]) -> None:
    gcloud.answer("describe", Reply(out="ACTIVE\n"))
    gcloud.answer("poll", ended(0))
    assert act("run", "--retry", "--keep", "--topology=v5e:16x16", "--storage=gs://bucket", "--", *TRAINING) == 0
    assert "delete" not in steps(gcloud)
    assert "delete g14" in capsys.readouterr().err


def test_no_slice_is_left_behind_when_the_launcher_itself_fails(
    gcloud: RecordedCommands, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> int:
        raise OSError("no space left on device")

    monkeypatch.setattr("launch.tpu.run_until_done", fail)
    gcloud.answer("describe", MISSING)
    with pytest.raises(OSError, match="no space"):
        act("run", "--retry", "--topology=v5e:16x16", "--storage=gs://bucket", "--", *TRAINING)
    assert steps(gcloud) == ["delete"]


def test_a_bad_configuration_is_not_tried_again(gcloud: RecordedCommands) -> None:
    gcloud.answer("describe", Reply(out="ACTIVE\n"))
    gcloud.answer("poll", ended(2))
    sleeps: list[float] = []
    assert retry(sleeps=sleeps) == 2
    assert steps(gcloud).count("start") == 1
    assert sleeps == []


def test_failures_are_tried_again_later_and_later_and_then_no_more(gcloud: RecordedCommands) -> None:
    gcloud.answer("describe", MISSING)
    gcloud.answer(" create ", Reply(1, err="RESOURCE_EXHAUSTED"))
    sleeps: list[float] = []
    assert retry(failures=7, sleeps=sleeps) == 1
    assert sleeps == [30, 60, 120, 240, 480, 600]
    assert steps(gcloud) == ["create"] * 7


def test_training_that_failed_is_started_again_on_the_same_slice(gcloud: RecordedCommands) -> None:
    gcloud.answer("describe", Reply(out="ACTIVE\n"))
    gcloud.answer("poll", ended(1))
    assert retry(failures=2) == 1
    assert steps(gcloud) == ["scp", "unpack", "setup", "start"] * 2


def test_only_failures_in_a_row_count(gcloud: RecordedCommands) -> None:
    gcloud.answer("describe", Reply(out="ACTIVE\n"))
    codes = [1, 75, 1, 0]
    gcloud.answer("poll", *(ended(code) for code in codes))
    assert retry(failures=2) == 0
    assert steps(gcloud).count("start") == len(codes)


def test_training_stopped_before_it_could_listen_has_not_failed(gcloud: RecordedCommands) -> None:
    gcloud.answer("describe", Reply(out="ACTIVE\n"))
    gcloud.answer("poll", ended(signal.SIGTERM, how=2), ended(0))
    assert retry(failures=1) == 0
    assert steps(gcloud).count("start") == 2


def test_failures_before_a_long_session_do_not_count(gcloud: RecordedCommands) -> None:
    gcloud.answer("describe", Reply(out="ACTIVE\n"))
    gcloud.answer("poll", *[ended(1)] * 3, ended(0))
    times = iter(range(0, 100_000, 4000))
    assert retry(failures=2, clock=lambda: next(times)) == 0


def test_a_request_that_fails_again_and_again_is_given_up(gcloud: RecordedCommands) -> None:
    gcloud.answer("describe", *[MISSING, Reply(out="FAILED\n"), MISSING] * 2)
    assert retry(failures=2) == 1
    assert steps(gcloud) == ["create", "delete"] * 2


def test_training_that_was_told_to_stop_is_not_started_again(gcloud: RecordedCommands) -> None:
    gcloud.answer("describe", Reply(out="ACTIVE\n"))
    stopped = ended(75)
    gcloud.answer("poll", stopped._replace(out=f"{stopped.out}Stopped=yes\n"))
    assert retry() == 75
    assert steps(gcloud).count("start") == 1


def test_a_restarted_host_is_set_up_again(gcloud: RecordedCommands) -> None:
    gcloud.answer("describe", Reply(out="ACTIVE\n"))
    dead = polled("SubState=dead\nExecMainCode=0\nExecMainStatus=0\n")
    gcloud.answer("poll", polled(RUNNING), dead, ended(0))
    assert retry(failures=1) == 0
    assert steps(gcloud) == ["scp", "unpack", "setup", "start"] * 2


def test_a_slice_whose_host_stays_silent_is_replaced(gcloud: RecordedCommands) -> None:
    asked = [MISSING] + [Reply(out="ACTIVE\n")] * 11  # create, wait, then once for each of ten unanswered polls
    gcloud.answer("describe", *asked, MISSING, MISSING, Reply(out="ACTIVE\n"))
    gcloud.answer("poll", *[UNREACHABLE] * 10, ended(0))
    assert retry() == 0
    assert steps(gcloud).count("create") == 2
    assert steps(gcloud).count("delete") == 1


def test_without_a_network_here_a_run_is_left_alone(gcloud: RecordedCommands) -> None:
    gcloud.answer("describe", *[OFFLINE] * 12, Reply(out="ACTIVE\n"))
    gcloud.answer("poll", *[UNREACHABLE] * 12, ended(0))
    assert pod().watch().code == 0
    assert steps(gcloud) == []


def test_without_a_network_here_a_slice_is_waited_for(
    gcloud: RecordedCommands, capsys: pytest.CaptureFixture[str]
) -> None:
    waiting = Reply(out="WAITING_FOR_RESOURCES\n")
    gcloud.answer("describe", waiting, *[OFFLINE] * 12, waiting, Reply(out="ACTIVE\n"))
    pod().wait()
    out = capsys.readouterr().out
    assert out.count("WAITING_FOR_RESOURCES") == 1
    assert out.count("Unable to find the server") == 12


@pytest.mark.parametrize("broken", [" create ", "scp", "sh setup", "sh start"])
def test_what_fails_without_a_network_here_is_no_failure_of_the_run(gcloud: RecordedCommands, broken: str) -> None:
    """It is back after a while, and a command that was lost is given again."""
    outage = [OFFLINE] * 4
    before = [MISSING] if broken == " create " else [Reply(out="ACTIVE\n")] * 2
    after = [MISSING] if broken == " create " else []
    gcloud.answer("describe", *before, *outage, *after, Reply(out="ACTIVE\n"))
    gcloud.answer(broken, *[UNREACHABLE] * (10 if broken == "scp" else 1), Reply())
    gcloud.answer("poll", ended(0))
    sleeps: list[float] = []
    assert retry(failures=1, sleeps=sleeps) == 0
    assert "delete" not in steps(gcloud)
    assert sleeps[-4:] == [30] * 4


def test_a_slice_that_cannot_be_deleted_for_want_of_a_network_is_deleted_later(gcloud: RecordedCommands) -> None:
    gone = Reply(out="SUSPENDED\n")
    gcloud.answer(" delete ", *[OFFLINE] * 10, Reply())
    gcloud.answer("describe", gone, gone, *[OFFLINE] * 11, gone, gone, MISSING, MISSING, Reply(out="ACTIVE\n"))
    gcloud.answer("poll", ended(0))
    assert retry(failures=1) == 0
    assert steps(gcloud) == [*["delete"] * 11, "create", "scp", "unpack", "setup", "start"]


def test_who_has_to_log_in_is_told_at_once_and_nothing_is_deleted(
    gcloud: RecordedCommands, capsys: pytest.CaptureFixture[str]
) -> None:
    gcloud.answer("describe", Reply(1, err="ERROR: You do not currently have an active account selected."))
    assert act("run", "--retry", "--topology=v5e:4x4", "--storage=gs://bucket", "--", *TRAINING) == 1
    assert steps(gcloud) == []
    assert "active account" in capsys.readouterr().err


def test_delete_waits_until_nothing_is_left(gcloud: RecordedCommands, capsys: pytest.CaptureFixture[str]) -> None:
    gcloud.answer("delete", Reply(1, err="the resource is being suspended"), Reply())
    gcloud.answer("describe", Reply(out="SUSPENDING\n"), Reply(out="DELETING\n"), MISSING)
    pod().delete()
    assert steps(gcloud) == ["delete"] * 3
    assert capsys.readouterr().out == "g14 is deleted\n"


def test_deleting_what_is_not_there_is_fine(gcloud: RecordedCommands) -> None:
    gcloud.answer(" delete |describe", MISSING)
    assert act("delete") == 0


def test_delete_goes_on_when_the_network_here_is_gone_for_a_while(gcloud: RecordedCommands) -> None:
    gcloud.answer(" delete ", *[OFFLINE] * 5, Reply())
    gcloud.answer("describe", *[OFFLINE] * 6, MISSING)
    pod().delete()
    assert steps(gcloud) == ["delete"] * 7


def test_a_slice_that_is_not_deleted_is_told(gcloud: RecordedCommands) -> None:
    gcloud.answer(" delete ", Reply(1, err="PERMISSION_DENIED"))
    gcloud.answer("describe", Reply(out="ACTIVE\n"))
    with pytest.raises(RuntimeError, match="may cost money: PERMISSION_DENIED"):
        pod().delete()


def test_ctrl_c_tells_what_costs_money_and_the_command_that_ends_it(gcloud: RecordedCommands) -> None:
    gcloud.answer("describe", Reply(out="WAITING_FOR_RESOURCES\n"))
    process = subprocess.Popen(
        [sys.executable, "launch/tpu.py", "wait", "g14", *WHERE],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "python launch/tpu.py delete g14 --zone=us-west4-a --project=mine" in err


def test_a_dry_run_prints_every_command_and_calls_none(
    gcloud: RecordedCommands, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--dry-run", "--retry", "--topology=v6e:16x16", "--spot", "--storage=gs://bucket"]
    assert act("run", *flags, "--", *TRAINING, "--config.data.path=a b/*") == 0
    assert gcloud.calls() == []
    shown = capsys.readouterr()
    first, *commands = shown.out.splitlines()
    assert (first, shown.err) == ("dry run: nothing is done", "")
    lines = [shlex.split(line) for line in commands]
    assert {words[0] for words in lines} == {"gcloud", "git"}  # and no word of what came of them
    actions = [words[4] if words[0] == "gcloud" else words[3] for words in lines]
    assert [action for action in actions if action != "describe"] == [
        *["create", "status", "archive", "scp", "ssh", "ssh", "ssh"],  # look, unpack, setup
        *["ssh", "ssh", "ssh", "delete"],  # look, start, watch
    ]
    assert any("'--config.data.path=a b/*'" in words[-1] for words in lines)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*TRAINING[:2], "--workdir", "runs/demo"], "--workdir is 'runs/demo', expected a folder under /mnt/llip"),
        ([*TRAINING, "--config.train.stepz=3"], "stepz"),
        (["--config", "configs/none.py", *TRAINING[2:]], "no file 'configs/none.py'"),
        ([*TRAINING[:2], "--workdir", "/mnt/llip/../demo"], "--workdir is '/mnt/llip/../demo'"),
        (B16, "data.path: '' is not valid"),
        ([*B16, "--config.data.path=data"], "data.path: 'data' is not on the hosts"),
        ([*B16, "--config.data.path=/mnt/llip/../data"], "is not on the hosts"),
        ([*B16, "--config.data.path=/mnt/llip/{a,b}/*.tar,/home/me/*.tar"], "'/home/me/\\*.tar' is not on the hosts"),
        ([*B16, "--config.data.path=/mnt/llip/a", "--config.data.eval_path=b"], "data.eval_path: 'b' is not on the"),
        ([*B16, "--config.data.mixture={'a': {'path': 'c'}}"], "data.mixture.a.path: 'c' is not on the hosts"),
    ],
)
def test_what_would_fail_on_the_hosts_fails_before_it_costs(
    gcloud: RecordedCommands, words: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        act("run", "--retry", "--topology=v5e:4x4", "--storage=gs://bucket", "--", *words)
    assert gcloud.calls() == []


@pytest.mark.parametrize("words", [["--bogus=5"], ["stray"], ["--check"], ["--process=0"]])
def test_words_that_not_every_host_can_train_with_are_refused(
    gcloud: RecordedCommands, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        act("run", "--", *TRAINING, *words)
    assert f"launch/train.py: error: unrecognized arguments: {words[0]}" in capsys.readouterr().err
    assert gcloud.calls() == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["create", "G14", *WHERE], "NAME is 'G14'"),
        (["create", "g14-", *WHERE], "NAME is 'g14-'"),
        (["create", "g14", "--zone=us-west4"], "--zone is 'us-west4'"),
        (["run", "g14", *WHERE, "--failures=0"], "--failures is 0"),
    ],
)
def test_names_that_google_would_refuse_are_refused(gcloud: RecordedCommands, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        main(words)
    assert gcloud.calls() == []


UNMOUNTABLE = ["/mnt/disk", "gs://", "gs://bucket/folder", "nfs://10.0.0.2", "nfs://10.0.0.2/"]


@pytest.mark.parametrize("storage", [[], *([f"--storage={url}"] for url in UNMOUNTABLE)])
def test_a_run_that_would_not_outlive_its_slice_is_refused(gcloud: RecordedCommands, storage: list[str]) -> None:
    with pytest.raises(ConfigError, match="expected gs://BUCKET or nfs://HOST/SHARE"):
        act("run", "--retry", "--topology=v5e:4x4", *storage, "--", *TRAINING)
    assert gcloud.calls() == []


def test_without_gcloud_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="gcloud is not installed"):
        act("create", "--topology=v5e:4x4")


def test_the_launcher_needs_no_jax() -> None:
    code = "import sys, launch.tpu; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
