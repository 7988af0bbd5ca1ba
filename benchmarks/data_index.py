"""Start-up time and resident memory of very large data: 10,000 tar shards, up to a billion samples, shuffle included.

    python benchmarks/data_index.py [--shards 10000] [--samples 1000000000] [--folder DIR]

The index of the tars is synthetic: a sparse file of the size that indexing such shards would give, with the positions
of the samples that are visited filled in and their bytes in sparse shards, so that they are really read. Prints one
JSON line.
"""

import argparse
import datetime
import io
import json
import os
import platform
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import grain
import numpy as np
import psutil

from llip_jax.config import CaptionConfig, DataConfig, FieldsConfig
from llip_jax.data.fields import RowsSource
from llip_jax.data.files import find_files
from llip_jax.data.formats import tars
from llip_jax.data.sources import HeldOut, Mixture, Part

VISITED = 1000


def sample_bytes() -> bytes:
    """One sample's members."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, data in (("7.jpg", b"\xff\xd8" + bytes(20_000)), ("7.txt", b"a dog on the beach")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()[: 512 * (1 + 40 + 1 + 1)]


def resident_mib() -> float:
    return psutil.Process().memory_info().rss / 2**20


def opened(pattern: str, index_dir: Path) -> Mixture:
    rows = tars.TarRows(find_files(pattern, "data.path"), index_dir)
    fields = FieldsConfig(image=("jpg",), captions=("txt",))
    source = HeldOut(RowsSource(rows, fields, DataConfig().limits), samples=5000, split="train")
    return Mixture((Part("", source, 1.0, CaptionConfig()),))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--samples", type=int, default=10**9)
    parser.add_argument("--folder", type=Path, help="where about 1 GB of sparse files go; default: a temporary folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder, each, data = Path(name), args.samples // args.shards, sample_bytes()
        for shard in range(args.shards):
            with (folder / f"{shard:05d}.tar").open("wb") as stream:
                stream.truncate(each * len(data))
        pattern = f"{folder}/{{00000..{args.shards - 1:05d}}}.tar"
        files = find_files(pattern, "data.path")
        index = tars._index_file(files, folder / "index")
        index.parent.mkdir()
        with index.open("wb") as stream:
            stream.truncate(8 * args.shards * (each + 1))
        shards = [tars._Shard(each, f"{number:016x}", "") for number in range(args.shards)]
        index.with_suffix(".json").write_bytes(tars._SHARDS.dump_json(tuple(shards)))

        before, begun = resident_mib(), time.perf_counter()
        mixture = opened(pattern, folder / "index")
        order = mixture.order(seed=0)
        order[0]
        opened_s, opened_mib = time.perf_counter() - begun, resident_mib() - before

        positions = np.memmap(index, "<i8", "r+")
        begun = time.perf_counter()
        visits = [order[position][1] for position in range(VISITED)]
        order_us = (time.perf_counter() - begun) / VISITED * 1e6
        source = mixture.parts[0].source
        for visit in visits:  # what indexing would have written
            sample = visit + visit // (source.every - 1) + 1
            shard, place = divmod(sample, each)
            positions[sample + shard : sample + shard + 2] = place * len(data), (place + 1) * len(data)
            with (folder / f"{shard:05d}.tar").open("r+b") as stream:
                stream.seek(place * len(data))
                stream.write(data)
        positions.flush()
        del positions
        begun = time.perf_counter()
        for visit in visits:
            assert source[visit].captions == ("a dog on the beach",)
        read_us = (time.perf_counter() - begun) / VISITED * 1e6
        line = {
            "shards": args.shards,
            "samples": len(source),
            "open_s": round(opened_s, 2),
            "open_mib": round(opened_mib, 1),
            "order_us": round(order_us, 1),
            "read_us": round(read_us, 1),
            "mib_after_reading": round(resident_mib() - before, 1),
            "index_gb": round(8 * args.shards * (each + 1) / 1e9, 2),
            "device": f"{os.cpu_count()} x {platform.processor() or platform.machine()}",
            "grain": grain.__version__,
            "python": platform.python_version(),
            "date": str(datetime.date.today()),
            "command": " ".join(["python", *sys.argv]),
        }
        print(json.dumps(line))
    return 0


if __name__ == "__main__":
    sys.exit(main())
