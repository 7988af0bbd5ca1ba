"""A source that worker processes can import quickly."""

import io
import random
from dataclasses import dataclass

from PIL import Image

from llip_jax.data.records import BadSample, Record

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"' & \u202e {title}"


@dataclass(frozen=True)
class Samples:
    """JPEG and PNG pictures of many sizes; about a third of the samples cannot be used. A function of the seed."""

    seed: int
    size: int

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Record:
        rng = random.Random(f"{self.seed} {index}")
        # So that some pictures and captions repeat.
        width, height, shade = *rng.choice([(20, 40), (64, 30), (90, 90)]), rng.randrange(20)
        stream = io.BytesIO()
        picture = Image.linear_gradient("L").resize((width, height)).point(lambda x: x ^ shade).convert("RGB")
        picture.save(stream, rng.choice(("JPEG", "PNG")))
        image = stream.getvalue()
        match rng.randrange(18):
            case 0:
                raise BadSample("missing_caption", f"{index}: no caption")
            case 1:
                raise OSError(f"{index}: gone")
            case 2:
                image = image[: len(image) // 2]
            case 3:
                image = b"<html>404</html>"
            case 4:
                image = _picture(1, 1)
        captions = tuple(f"{HOSTILE if rng.random() < 0.1 else ''}caption {rng.randrange(40)}" for _ in range(2))
        return Record(image, captions, ("txt", "alt"), 1, f"{shade}", f"sample/{index}", {"shade": shade})

    def identity(self) -> dict[str, str]:
        return {"samples": f"{self.size} of seed {self.seed}"}


def _picture(width: int, height: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(stream, "PNG")
    return stream.getvalue()
