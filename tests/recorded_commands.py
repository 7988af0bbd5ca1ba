"""Stand-ins for programs of a cloud: they write down how they are called and answer as told."""

import json
import os
import stat
import sys
from pathlib import Path
from typing import NamedTuple

_PROGRAM = f"""#!{sys.executable} -IS
import json, os, re, sys
folder, name = os.path.split(__file__)
words = [name, *sys.argv[1:]]
with open(folder + "/calls.jsonl", "a") as file:
    print(json.dumps(words), file=file)
with open(folder + "/answers.json") as file:
    answers = json.load(file)
for pattern, replies in answers:
    if re.search(pattern, " ".join(words)):
        code, out, err = replies.pop(0) if len(replies) > 1 else replies[0]
        with open(folder + "/answers.json", "w") as file:
            json.dump(answers, file)
        sys.stdout.write(out)
        sys.stderr.write(err)
        sys.exit(code)
"""


class Reply(NamedTuple):
    """What a stand-in does."""

    code: int = 0
    out: str = ""
    err: str = ""


class RecordedCommands:
    """A folder of stand-ins that goes first on the PATH.

    ``answer`` tells what is said to commands that match a pattern, earlier patterns first: the replies one after the
    other, the last one for ever. Other commands succeed and say nothing.
    """

    def __init__(self, folder: Path, *programs: str):
        self.folder = folder
        self._answers: list[tuple[str, tuple[Reply, ...]]] = []
        folder.mkdir()
        for program in programs:
            (folder / program).write_text(_PROGRAM)
            (folder / program).chmod(stat.S_IRWXU)
        self.answer("^$", Reply())

    @property
    def path(self) -> str:
        return f"{self.folder}{os.pathsep}{os.environ['PATH']}"

    def answer(self, pattern: str, *replies: Reply) -> None:
        self._answers.append((pattern, replies))
        (self.folder / "answers.json").write_text(json.dumps(self._answers))

    def calls(self, *programs: str) -> list[list[str]]:
        """Words of all calls, or of those of some programs."""
        file = self.folder / "calls.jsonl"
        calls = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return [words for words in calls if not programs or words[0] in programs]
