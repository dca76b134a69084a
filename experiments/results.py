"""Measure every result in the documents again: `python experiments/results.py --natural FOLDER`.

The documents say what is measured. A block from `<!-- results: COMMAND -->` to `<!-- end -->` is replaced by the tables
that COMMAND prints; in it, OUTPUT stands for --output, and NATURAL for --natural. The image of a line that follows
`<!-- copy: OUTPUT/FILE -->` is replaced by this file.
"""

import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path

from dae import cli
from dae.errors import RunError, UsageError
from dae.files import atomic_path

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"(<!-- results: (.*?) -->\n).*?(?=<!-- end -->)", re.DOTALL)
PICTURE = re.compile(r"<!-- copy: OUTPUT/(.*?) -->\n!\[.*?\]\((.*?)\)", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class ResultsArguments:
    """Run the commands of all documents, and write their tables and pictures there; repeat the command to resume.

    Takes some hours. dae/ and experiments/ must be as they were committed.
    """

    natural: str | None = None
    """Folder with the standard photographs in Train400, Set12, BSD68 and CBSD68, which are not part of this project;
    None: leave the tables that need them as they are, with the commit of their last measurement."""
    only: str = ""
    """Run only the commands that contain this text, even if they were run before; other blocks stay as they are."""
    output: str = "runs/results"
    """Folder of results.json, and of what the commands write."""
    pages: tuple[str, ...] = ("README.md", "docs/*.md")
    """Documents, relative to the top folder of this repository."""


def measure(command: str, output: Path, natural: str | None) -> str:
    """Run a shell command in the top folder; return the tables that it prints, or else the last line.

    Raises RunError if it fails.
    """
    paths = {"OUTPUT": str(output), "NATURAL": str(natural)}
    text = re.sub(r"\b(OUTPUT|NATURAL)\b", lambda match: shlex.quote(paths[match[0]]), command)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", text], cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RunError(f"{command}: ended with {done.returncode}: {(done.stderr.strip().splitlines() or ['-'])[-1]}")
    tables = re.findall(r"(?:^\|.*\n)+", done.stdout, re.MULTILINE)
    return "\n".join(tables or done.stdout.splitlines()[-1:])


def replaced(page: str, results: dict[str, dict[str, str]], machine: str) -> str:
    """Return the text of a page with new results in the blocks whose commands are in `results`."""

    def block(match: re.Match[str]) -> str:
        start, command = match.groups()
        if command == "machine":
            return f"{start}{machine}\n"
        if command not in results:
            return match[0]
        result = results[command]
        return f"{start}`{command}` ({result['stamp']})\n\n{result['tables'].rstrip()}\n\n"

    return BLOCK.sub(block, page)


def commands(pages: list[Path]) -> Iterator[str]:
    """Yield each command of the pages once, in their order."""
    found = [match[2] for page in pages for match in BLOCK.finditer(page.read_text(encoding="utf-8"))]
    yield from (command for command in dict.fromkeys(found) if command != "machine")


def main() -> None:
    arguments = cli.parse(ResultsArguments)
    cli.import_tensorflow()
    from dae.workdir.workdir import environment

    known, output = environment(), Path(arguments.output).resolve()
    if known["git_commit"] is None:
        raise UsageError(f"{ROOT}: not a git checkout; results need a commit to name")
    for path in (line.split()[-1] for line in known["git_changed_files"]):
        if path != "README.md" and not path.startswith("docs/"):
            raise UsageError(f"{path}: differs from what was committed; results need a commit to name")
    commit = known["git_commit"][:7]
    pages = sorted({path for pattern in arguments.pages for path in ROOT.glob(pattern)})
    record = output / "results.json"
    results: dict[str, dict[str, str]] = json.loads(record.read_text()) if record.exists() else {}
    for command in commands(pages):
        is_chosen = arguments.only in command
        if not is_chosen or (not arguments.only and results.get(command, {}).get("commit") == commit):
            continue
        if "NATURAL" in command and arguments.natural is None:
            print(f"left out, without --natural: {command}")
            continue
        print(command, flush=True)
        started = time.monotonic()
        tables = measure(command, output, arguments.natural)
        minutes = (time.monotonic() - started) / 60
        stamp = f"commit {commit}, {date.today().isoformat()}, {minutes:.1f} minutes"
        results[command] = {"commit": commit, "stamp": stamp, "tables": tables}
        with atomic_path(record) as path:
            path.write_text(json.dumps(results, indent=2), encoding="utf-8")
    versions = ", ".join(f"{name} {version}" for name, version in known["versions"].items())
    machine = f"{known['cpu_cores']} cores of {known['cpu']}; {versions}"
    for page in pages:
        text = replaced(page.read_text(encoding="utf-8"), results, machine)
        page.write_text(text, encoding="utf-8")
        for source, target in PICTURE.findall(text):
            if (output / source).exists():
                shutil.copyfile(output / source, page.parent / target)


if __name__ == "__main__":
    cli.run(main)
