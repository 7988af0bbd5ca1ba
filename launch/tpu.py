"""A run on a TPU slice of Google Cloud, from asking for it to deleting it (docs/pods.md).

    python launch/tpu.py run g14 --zone us-west4-a --topology v5e:16x16 --spot --storage gs://BUCKET --retry \\
      -- --config configs/llip_g14.py --workdir /mnt/llip/g14 \\
         --config.data.source=webdataset --config.data.path='/mnt/llip/data/*.tar' [--config.FIELD=VALUE ...]

does all of create, wait, setup and run until the training has finished, and deletes the slice. One at a time:

    create   ask for a slice                      run      start training, show its log, wait for its end
    wait     until the slice is there             logs     of the training
    setup    code, packages and storage on it     status   of slice and training
    delete   slice and request                    stop     training: it saves and ends

Every action can be done again. Exit codes: 0 done, 2 bad configuration or input, 1 anything else; run: the training's.
"""

import argparse
import sys
from pathlib import Path

from llip_jax.command_line import EXIT_FAILED, run
from llip_jax.config import ConfigError
from llip_jax.launching.checks import MOUNT, check_place, check_storage, check_training
from llip_jax.launching.pod import Pod, SliceLost, Unanswered
from llip_jax.launching.queued_resources import ACTIVE, Capacity, QueuedResource, Request
from llip_jax.launching.retry import run_until_done
from llip_jax.launching.shell import CommandFailed, Shell
from llip_jax.launching.slices import parse_topology

_ROOT = Path(__file__).resolve().parents[1]
_EXIT_INTERRUPTED = 130


def main(argv: list[str]) -> int:
    """Flags in, one call."""
    split = argv.index("--") if "--" in argv else len(argv)
    args, words = _parser().parse_args(argv[:split]), argv[split + 1 :]
    if words and args.action != "run":
        raise ConfigError(f"--: only run takes flags of launch/train.py, not {args.action}")
    check_place(args.name, args.zone)
    if args.failures < 1:
        raise ConfigError(f"--failures is {args.failures}, expected 1 or more")
    if args.dry_run:
        print("dry run: nothing is done")
    pod = Pod(QueuedResource(args.name, args.zone, args.project), Shell(args.dry_run))
    try:
        return _act(pod, args, words)
    except Unanswered as error:  # before anything was asked for
        print(f"error: {error}", file=sys.stderr)
        return EXIT_FAILED
    except (SliceLost, CommandFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        if pod.look() is not None:
            _warn(pod)
        return EXIT_FAILED
    except KeyboardInterrupt:
        print("\ninterrupted: what runs on the slice goes on", file=sys.stderr)
        _warn(pod)
        return _EXIT_INTERRUPTED


def _act(pod: Pod, args: argparse.Namespace, words: list[str]) -> int:
    match args.action:
        case "create":
            pod.create(_request(args))
        case "wait":
            pod.wait()
        case "setup":
            pod.setup(_ROOT, check_storage(args.storage))
        case "run":
            check_training(words, _ROOT)
            return _run_until_done(pod, args, words) if args.retry else _run(pod, words)
        case "logs":
            follow = ["--follow"] if args.follow else []
            pod.shell.run(pod.resource.worker("logs", *follow, host=args.worker), show=True)
        case "status":
            state = pod.state()
            if state is None:
                print(f"there is no {args.name} in {args.zone}")
                return 0
            pod.shell.run(pod.resource.describe(), show=True)
            if state == ACTIVE:
                pod.shell.run(pod.resource.worker("status"), show=True)
        case "stop":
            pod.shell.run(pod.resource.worker("stop"), show=True)
            _warn(pod)
        case "delete":
            pod.delete()
    return 0


def _run(pod: Pod, words: list[str]) -> int:
    pod.start(words)
    code = pod.watch().code
    pod.shell.tell(f"training ended with exit code {code}")
    _warn(pod)
    return code


def _run_until_done(pod: Pod, args: argparse.Namespace, words: list[str]) -> int:
    request, storage = _request(args), check_storage(args.storage)
    pod.check(request)  # Google that does not answer is waited for later, but not here: one may have to log in
    try:
        code = run_until_done(pod, request, _ROOT, storage, words, args.failures)
    except Exception:  # but Ctrl-C: someone is there to decide
        if not args.keep:
            pod.delete()
        raise
    if args.keep:
        _warn(pod)
    else:
        pod.delete()
    return code


def _warn(pod: Pod) -> None:
    """Says what may be costing money, and the command that ends it."""
    if pod.shell.dry_run:
        return
    resource = pod.resource
    print(
        f"{resource.name} in {resource.zone} may be costing money. To end that: {resource.ours('delete')}",
        file=sys.stderr,
    )


def _request(args: argparse.Namespace) -> Request:
    if args.topology is None:
        raise ConfigError("--topology: expected a slice to ask for, as v5e:16x16")
    capacity: Capacity = "spot" if args.spot else "reserved" if args.reserved else "on-demand"
    return Request(parse_topology(args.topology), capacity, tuple(args.gcloud_flag))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "action", choices=("create", "wait", "setup", "run", "logs", "status", "stop", "delete"), metavar="ACTION"
    )
    parser.add_argument("name", metavar="NAME", help="of the slice")
    parser.add_argument("--zone", required=True)
    parser.add_argument("--project", help="gcloud's own by default")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, and run none")
    asked = parser.add_argument_group("create, run --retry")
    asked.add_argument("--topology", help="v4:2x2x4, v5e:16x16, v5p:8x8x4, v6e:16x16, ...")
    capacity = asked.add_mutually_exclusive_group()
    capacity.add_argument("--spot", action="store_true", help="cheaper, taken back at any time")
    capacity.add_argument("--reserved", action="store_true", help="from the project's reservation")
    asked.add_argument(
        "--gcloud-flag",
        action="append",
        default=[],
        metavar="FLAG",
        help="a further flag of gcloud's, as --network=NAME",
    )
    installed = parser.add_argument_group("setup, run --retry")
    installed.add_argument("--storage", help=f"gs://BUCKET or nfs://HOST/SHARE, mounted at {MOUNT}")
    tried = parser.add_argument_group("run")
    tried.add_argument("--retry", action="store_true", help="do everything until the training has finished")
    tried.add_argument("--failures", type=int, default=5, help="failures in a row after which to give up (5)")
    tried.add_argument("--keep", action="store_true", help="do not delete the slice at the end of run --retry")
    shown = parser.add_argument_group("logs")
    shown.add_argument("--worker", default="0", help="host: a number or all (0)")
    shown.add_argument("--follow", action="store_true")
    return parser


if __name__ == "__main__":
    sys.exit(run(main))
