"""A local page to try a model on: python launch/explore.py --workdir runs/demo [--step N] [--port P]

One picks or uploads a picture, types captions and sees scores, the patches that each caption agrees with, and zero-shot
guesses. Needs Gradio (the extra "report"). Every user of this machine can open the page, and nobody else unless --host
says so; Ctrl-C ends it.

Exit codes: 0 ended, 2 bad input, 1 anything else.
"""

import argparse
import sys
from pathlib import Path

from llip_jax.command_line import run


def main(argv: list[str]) -> int:
    """Flags in, one call."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True, help="run directory, or weights as llip_jax.load takes")
    parser.add_argument("--step", type=int, help="checkpoint of the run (default: the newest)")
    parser.add_argument("--port", type=int, help="(default: the first free one from 7860 on)")
    parser.add_argument("--host", default="127.0.0.1", help="to listen on (default: %(default)s: this machine's users)")
    args = parser.parse_args(argv)
    from llip_jax.explorer.serve import explore

    explore(args.workdir, args.step, args.host, args.port)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
