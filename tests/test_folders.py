"""Weights take their place whole or not at all, and nothing of others is overwritten."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llip_jax.config import ConfigError
from llip_jax.interop import formats
from llip_jax.interop.folders import replacing_folder


def write(path: Path, text: str, overwrite: bool = False) -> None:
    with replacing_folder(path, overwrite, {"a.txt", "b.txt"}) as temporary:
        temporary.mkdir()
        (temporary / "a.txt").write_text(text)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_new_folder_appears_with_its_parents_and_an_empty_one_is_used(tmp_path: Path) -> None:
    write(tmp_path / "x" / "y", "one")
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", "two")
    assert (tmp_path / "x" / "y" / "a.txt").read_text() == "one"
    assert (tmp_path / "empty" / "a.txt").read_text() == "two"
    assert names(tmp_path) == {"x", "empty"}


def test_a_file_appears_under_its_own_ending(tmp_path: Path) -> None:
    with replacing_folder(tmp_path / "weights.npz") as temporary:
        assert temporary.suffix == ".npz"
        temporary.write_text("one")
    with pytest.raises(ConfigError, match="there is something already"), replacing_folder(tmp_path / "weights.npz"):
        pass
    with replacing_folder(tmp_path / "weights.npz", overwrite=True) as temporary:
        temporary.write_text("two")
    assert (tmp_path / "weights.npz").read_text() == "two"
    assert names(tmp_path) == {"weights.npz"}


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    write(tmp_path / "x", "old")

    def fail() -> None:
        with replacing_folder(tmp_path / "x", overwrite=True, files={"a.txt"}) as temporary:
            temporary.mkdir()
            (temporary / "a.txt").write_text("half")
            raise RuntimeError("midway")

    with pytest.raises(RuntimeError, match="midway"):
        fail()
    assert (tmp_path / "x" / "a.txt").read_text() == "old"
    assert names(tmp_path) == {"x"}


def test_a_kill_leaves_what_was_there(tmp_path: Path) -> None:
    write(tmp_path / "x", "old")
    program = f"""
import os, signal
from pathlib import Path
from llip_jax.interop.folders import replacing_folder
with replacing_folder(Path({str(tmp_path / "x")!r}), overwrite=True, files=["a.txt"]) as temporary:
    temporary.mkdir()
    (temporary / "a.txt").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", program], check=False)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "x" / "a.txt").read_text() == "old"


def test_overwriting_has_to_be_asked_for_and_spares_what_is_not_weights(tmp_path: Path) -> None:
    write(tmp_path / "x", "old")
    with pytest.raises(ConfigError, match="there is something already"):
        write(tmp_path / "x", "new")
    write(tmp_path / "x", "new", overwrite=True)
    assert (tmp_path / "x" / "a.txt").read_text() == "new"
    with pytest.raises(ConfigError, match="is not overwritten, as it holds more than weights: x"):
        write(tmp_path, "new", overwrite=True)
    (tmp_path / "x" / "holiday.jpg").write_text("precious")
    with pytest.raises(ConfigError, match=r"holds more than weights: holiday\.jpg"):
        write(tmp_path / "x", "newer", overwrite=True)
    assert names(tmp_path) == {"x"} and names(tmp_path / "x") == {"a.txt", "holiday.jpg"}


def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path: Path) -> None:
    write(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write(tmp_path / "link", "new", overwrite=True)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "a.txt").read_text() == "new"
    assert names(tmp_path) == {"real", "link"}


def test_errors_name_the_place_and_not_what_lies_beside_it_meanwhile(tmp_path: Path) -> None:
    def fail() -> None:
        with replacing_folder(tmp_path / "x") as temporary:
            raise ConfigError(f"{temporary}: no")

    with pytest.raises(ConfigError, match=f"^{tmp_path / 'x'}: no$"):
        fail()


def test_a_place_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written: File exists"):
        write(tmp_path / "file" / "x", "one")


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("llip_jax_config.json", "llip_jax"),
        ("open_clip_config.json", "open_clip"),
        ("config.json", "huggingface"),
    ],
)
def test_folders_are_told_apart_by_their_configuration(tmp_path: Path, name: str, format: str) -> None:
    with pytest.raises(ConfigError, match="no weights that are known"):
        formats.detect(tmp_path)
    (tmp_path / name).write_text("{}")
    assert formats.detect(tmp_path) == format


def test_files_are_told_apart_by_their_ending(tmp_path: Path) -> None:
    for name, format in {"a.npz": "big_vision", "a.safetensors": "open_clip", "a.pt": "open_clip"}.items():
        (tmp_path / name).write_text("")
        assert formats.detect(tmp_path / name) == format
    with pytest.raises(ConfigError, match=r"a\.npzz: no such file or folder\. Did you mean 'a\.npz'\?"):
        formats.detect(tmp_path / "a.npzz")
