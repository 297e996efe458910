"""Where pinned public text comes from: wheels of the Python package index, and commits of git repositories.

Both are read as archives in memory: nothing is installed, nothing is unpacked to disk, and no code in them runs. What
arrives is what was pinned: pip compares each wheel with its SHA-256, and git each object with its own hash.
"""

import email
import functools
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from analysis.errors import WorkFailed

# One Python version and platform for everybody, so that pip chooses the same wheel everywhere. Only the text in them
# is read.
PYTHON_VERSION = "3.12"
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")

REQUIREMENT = re.compile(
    r"(?P<name>[A-Za-z0-9._-]+)==(?P<version>[A-Za-z0-9._+!-]+) --hash=sha256:(?P<sha256>[0-9a-f]{64})"
)
FILE_MODES = ("100644", "100755")  # of git, for files; not links, nor other repositories
COMMIT = re.compile(r"[0-9a-f]{40}")
URL = re.compile(r"https://[A-Za-z0-9._/-]+")  # git runs a program for other forms, such as ext::


class Package(NamedTuple):
    name: str
    version: str
    licence: str
    files: Iterator[tuple[str, Callable[[], bytes]]]  # path in the archive and a function that reads it, by path


@dataclass(frozen=True, kw_only=True)
class Repository:
    """A git repository at one commit."""

    url: str
    commit: str
    licence: str  # of its text, by SPDX identifier
    under: str = "."  # the folder that holds the text

    def __post_init__(self) -> None:
        if not URL.fullmatch(self.url):
            raise ValueError(f"url must be https://HOST/PATH; got {self.url!r}; mend it")
        if not COMMIT.fullmatch(self.commit):
            raise ValueError(f"commit must be the 40 hexadecimal digits of a commit; got {self.commit!r}; mend it")
        if self.under.startswith(("/", "-", ":")):
            raise ValueError(f"under must be a folder in the repository; got {self.under!r}; mend it")


def check_requirement(requirement: str) -> None:
    """Raise ValueError unless it is one pinned package; pip would take options and addresses here, too."""
    if not REQUIREMENT.fullmatch(requirement):
        raise ValueError(
            f"a wheel must be given as NAME==VERSION --hash=sha256:HEX; got {requirement!r}; mend the line"
        )


def wheels(requirements: tuple[str, ...]) -> Iterator[Package]:
    """The packages of `requirements`, in their order, as pip downloads them.

    Raises WorkFailed if pip does: without a network, say, or where a file is not the pinned one.
    """
    with tempfile.TemporaryDirectory(prefix="dynconv-wheels-") as name:
        folder = Path(name)
        (folder / "requirements.txt").write_text("\n".join(requirements) + "\n")
        _run(
            [
                sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--only-binary=:all:",
                "--disable-pip-version-check", "--python-version", PYTHON_VERSION,
                *(part for platform in PLATFORMS for part in ("--platform", platform)),
                "--dest", str(folder), "--requirement", str(folder / "requirements.txt"),
            ],
            "the wheels must download",
        )  # fmt: skip
        paths = {_sha256(path): path for path in folder.glob("*.whl")}
        for requirement in requirements:
            pinned = REQUIREMENT.fullmatch(requirement)
            assert pinned is not None
            with zipfile.ZipFile(paths[pinned["sha256"]]) as archive:
                yield Package(pinned["name"], pinned["version"], _licence(archive), _members(archive))


def repositories(pinned: tuple[Repository, ...], suffixes: tuple[str, ...]) -> Iterator[Package]:
    """The repositories in their order, with files of these suffixes. Raises WorkFailed if git cannot fetch a commit."""
    for repository in pinned:
        with tempfile.TemporaryDirectory(prefix="dynconv-git-") as folder:
            git = ["git", "-C", folder]
            _run(["git", "init", "--quiet", "--bare", folder], "git must work")
            fetch = [*git, "fetch", "--quiet", "--depth=1", repository.url, repository.commit]
            _run(fetch, f"{repository.url} must be fetched")
            tree = [*git, "ls-tree", "-r", "-z", repository.commit, "--", repository.under]
            listed = _run(tree, f"{repository.url} must list its files", output=subprocess.PIPE)
            objects = {}
            for entry in filter(None, listed.decode(errors="surrogateescape").split("\0")):
                facts, path = entry.split("\t", 1)
                mode, _, name = facts.split()
                if mode in FILE_MODES and path.endswith(suffixes):
                    objects[path] = name
            name = repository.url.removesuffix("/").removesuffix(".git").split("/", 3)[-1]
            yield Package(name, repository.commit, repository.licence, _objects(git, objects))


def _members(archive: zipfile.ZipFile) -> Iterator[tuple[str, Callable[[], bytes]]]:
    for name in sorted(archive.namelist()):
        yield name, functools.partial(archive.read, name)


def _objects(git: list[str], objects: dict[str, str]) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """The files at these paths, whose objects' names git gives their content for, one after another."""
    with subprocess.Popen([*git, "cat-file", "--batch"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for path, name in sorted(objects.items()):
            process.stdin.write(f"{name}\n".encode())
            process.stdin.flush()
            answer = process.stdout.readline().split()  # name, "blob", length; the content and a newline follow
            if answer[1:2] != [b"blob"]:
                raise WorkFailed(f"git must give the content of {path}; got {answer!r}")
            content = process.stdout.read(int(answer[2]) + 1)[:-1]
            yield path, functools.partial(bytes, content)


def _licence(archive: zipfile.ZipFile) -> str:
    """What a wheel's metadata says of its licence: an expression, else classifiers, else free text's first line."""
    (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA") and n.count("/") == 1]
    metadata = email.message_from_string(archive.read(name).decode())
    if expression := metadata["License-Expression"]:
        return str(expression)
    classifiers = [c.split(" :: ")[-1] for c in metadata.get_all("Classifier", []) if c.startswith("License ::")]
    text = str(metadata["License"] or "").strip()
    return ", ".join(classifiers) or (text.splitlines()[0].strip() if text else "see the package")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


STDERR = 2  # its file descriptor


def _run(command: list[str], wanted: str, *, output: int = STDERR) -> bytes:
    """Run a program; returns its output if that is PIPE. It says on standard error what goes wrong.

    Raises WorkFailed if it fails, ValueError if it is missing.
    """
    if shutil.which(command[0]) is None:
        raise ValueError(f"{wanted}; got no program {command[0]}; install it")
    done = subprocess.run(command, stdout=output, check=False)
    if done.returncode:
        raise WorkFailed(f"{wanted}; {Path(command[0]).name} exited with {done.returncode}, for the reason above")
    return done.stdout or b""
