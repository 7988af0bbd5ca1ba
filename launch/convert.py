"""Weights of one library for another, or a CLIP or SigLIP turned into a Llip.

    python launch/convert.py --from CLIP-ViT-B-32 --to llip --config.model.pooler=mixer --config.model.mixture_tokens=16
    python launch/convert.py --from runs/finetuned --to for_transformers --format huggingface

--from takes a folder or file of OpenCLIP, Hugging Face or big_vision, a folder that this program wrote, or a run
directory. Without --config.FIELD=VALUE the model stays what it is. Where the other library is installed, both are
compared on random inputs. Exit codes: 0 finished, 2 bad input, 1 the comparison failed or anything else.
"""

import argparse
import sys
from pathlib import Path

from llip_jax.command_line import run, split_overrides


def main(argv: list[str]) -> int:
    """Flags in, one call."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="source", type=Path, required=True, help="weights, or a run directory")
    parser.add_argument("--to", type=Path, required=True, help="folder to write (a file .npz for big_vision)")
    parser.add_argument("--format", default="llip_jax", help="llip_jax (default), open_clip, huggingface or big_vision")
    parser.add_argument("--overwrite", action="store_true", help="replace what is at --to")
    words, overrides = split_overrides(argv)
    args = parser.parse_args(words)
    from llip_jax.convert import convert

    return convert(args.source, args.to, args.format, overrides, overwrite=args.overwrite)


if __name__ == "__main__":
    sys.exit(run(main))
