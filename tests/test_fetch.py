"""Fetching pinned text, without a network: from wheels that pip finds in a folder and a git repository on disk."""

import hashlib
import random
import subprocess
import zipfile
from pathlib import Path

import pytest
from pyarrow import parquet

from analysis.errors import WorkFailed
from experiments.cli.main import main
from experiments.data.copies import NearCopies
from experiments.data.corpus import find_files
from experiments.data.fetch import LISTS, NOTE, Sources, fetch
from experiments.data.formats import read_documents
from experiments.design import strict
from experiments.design.data import DataConfig


def lines(seed: int, count: int = 40) -> list[str]:
    rng = random.Random(seed)
    return [f"value_{rng.randrange(10**9)} = {rng.randrange(10**9)}" for _ in range(count)]


def text(seed: int) -> str:
    return "\n".join(lines(seed)) + "\n"


KEPT = {"pkg/a.py": text(0), "pkg/café.py": text(1)}
LEFT_OUT = {
    "pkg/_vendor/b.py": text(2),
    "pkg/small.py": "x = 1\n",
    "pkg/large.py": text(3) * 20,
    "pkg/wide.py": text(4) + "#" * 200 + "\n",
    "pkg/a_again.py": text(0),
    "pkg/near.py": "\n".join([*lines(1), *lines(5, 10)]),
}
RULES = 'suffixes = [".py"]\nomit = ["_vendor"]\nsmallest_bytes = 10\nlargest_bytes = 10_000\nlongest_line = 100\n'


def make_wheel(folder: Path, files: dict[str, str], name: str = "pkg") -> str:
    """Write a wheel; returns the line of a list that pins it."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for inner, content in files.items():
            archive.writestr(inner, content)
        archive.writestr("pkg/binary.py", b"\xff\xfe" * 50)
        archive.writestr("pkg/data.json", "{}")
        dist = f"{name}-1.0.dist-info"
        archive.writestr(
            f"{dist}/METADATA", f"Metadata-Version: 2.4\nName: {name}\nVersion: 1.0\nLicense-Expression: MIT\n"
        )
        archive.writestr(f"{dist}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{dist}/RECORD", "")
    return f"{name}==1.0 --hash=sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"


@pytest.fixture
def pinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    line = make_wheel(tmp_path / "index", KEPT | LEFT_OUT)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return line


def write_list(path: Path, *more: str) -> Path:
    path.write_text(RULES + "\n".join(more) + "\n")
    return path


def test_wheels_become_a_corpus_that_says_what_it_left_out(
    pinned: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    listed = write_list(tmp_path / "mine.toml", f'wheels = ["{pinned}"]')
    assert main(["data", "fetch", str(listed), "-o", str(tmp_path / "out")]) == 0
    note = capfd.readouterr().out
    assert note.strip() == (tmp_path / "out" / NOTE).read_text().strip()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index", "mine.toml", "out"]
    table = parquet.read_table(tmp_path / "out" / "pkg-1.0.parquet").to_pydict()
    assert dict(zip(table["path"], table["text"], strict=True)) == KEPT
    spec = DataConfig(source=str(tmp_path / "out"), vocabulary=300, train_tokens=2, validation_tokens=2)
    (file,), not_read = find_files(spec)
    assert not_read == {".md": 1}  # the note
    assert [raw and raw.decode() for raw in read_documents(file.path, spec)] == list(KEPT.values())

    size = sum(len(content.encode()) for content in KEPT.values())
    assert f"| pkg | 1.0 | MIT | 2 | {size:,} |" in note
    for reason in (
        "a copy of another", "a near copy: most runs of 5 lines in others", "a line over 100 characters",
        "in a folder left out", "not UTF-8", "over 10,000 bytes", "under 10 bytes",
    ):  # fmt: skip
        assert f"- 1 {reason}\n" in note
    digests = sorted(hashlib.sha256(content.encode()).digest() for content in KEPT.values())
    assert hashlib.sha256(b"".join(digests)).hexdigest() in note


def test_other_files_or_documents_than_the_pinned_are_refused(pinned: str, tmp_path: Path) -> None:
    other = pinned[:-64] + "0" * 64
    with pytest.raises(WorkFailed, match=r"the wheels must download; python.* exited with 1"):
        fetch(str(write_list(tmp_path / "a.toml", f'wheels = ["{other}"]')), tmp_path / "out")
    listed = write_list(tmp_path / "b.toml", f'wheels = ["{pinned}"]', f'documents_sha256 = "{"0" * 64}"')
    with pytest.raises(ValueError, match=r"must have SHA-256 0000.*; got .*; remove documents_sha256"):
        fetch(str(listed), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.toml", "b.toml", "index"]
    with pytest.raises(ValueError, match=r"must be a new folder; got .*index"):
        fetch(str(listed), tmp_path / "index")


def test_a_repository_at_a_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    origin = tmp_path / "someone" / "docs"
    (origin / "text").mkdir(parents=True)

    def git(*arguments: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-C", str(origin)]
        return subprocess.run(["git", *who, *arguments], check=True, capture_output=True, text=True).stdout.strip()

    git("init", "--quiet", ".")
    (origin / "text" / "a.py").write_text(text(0))
    (origin / "elsewhere.py").write_text(text(1))
    (origin / "text" / "link.py").symlink_to("/etc/passwd")
    git("add", ".")
    git("commit", "--quiet", "-m", "one")
    commit = git("rev-parse", "HEAD")
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
    monkeypatch.setenv("GIT_CONFIG_KEY_0", f"url.file://{tmp_path}/.insteadOf")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", "https://example.invalid/")
    table = [
        "[[repositories]]", 'url = "https://example.invalid/someone/docs"', f'commit = "{commit}"',
        'licence = "CC-BY-4.0"', 'under = "text"',
    ]  # fmt: skip
    note = fetch(str(write_list(tmp_path / "a.toml", *table)), tmp_path / "out")
    assert f"| someone/docs | {commit} | CC-BY-4.0 | 1 | {len(text(0)):,} |" in note
    (file,) = (tmp_path / "out").glob("*.parquet")
    assert parquet.read_table(file).to_pylist() == [{"path": "text/a.py", "text": text(0)}]

    table[2] = f'commit = "{"0" * 40}"'
    with pytest.raises(WorkFailed, match=r"https://example.invalid/someone/docs must be fetched; git exited with"):
        fetch(str(write_list(tmp_path / "a.toml", *table)), tmp_path / "again")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ('wheels = ["numpy"]', "NAME==VERSION --hash=sha256:HEX; got 'numpy'"),
        (f'wheels = ["--pre x==1 --hash=sha256:{"0" * 64}"]', "a wheel must be given as"),
        ("wheels = []", "must name wheels or repositories"),
        ('[[repositories]]\nurl = "ext::sh -c x"\ncommit = "1"\nlicence = "MIT"', "url must be https://"),
        ('[[repositories]]\nurl = "https://a/b"\ncommit = "main"\nlicence = "MIT"', "40 hexadecimal digits"),
        (f'[[repositories]]\nurl = "https://a/b"\ncommit = "{"0" * 40}"\nlicence = ""\nunder = "--x"', "under must be"),
    ],
)
def test_lists_that_are_refused(entry: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        fetch(str(write_list(tmp_path / "list.toml", entry)), tmp_path / "out")


def test_the_lists_that_ship_are_whole(capsys: pytest.CaptureFixture[str]) -> None:
    names = sorted(path.stem for path in LISTS.glob("*.toml"))
    for name in names:
        assert strict.load(LISTS / f"{name}.toml", Sources).documents_sha256
    assert main(["data", "fetch", "pyhton", "-o", "x"]) == 2
    assert "did you mean 'python'? legal: " + ", ".join(names) in capsys.readouterr().err
    assert main(["data", "fetch", "python"]) == 2
    assert "-o DIR" in capsys.readouterr().err


@pytest.mark.parametrize(("changed", "near"), [(0, True), (1, True), (2, True), (10, False), (40, False)])
def test_near_copies(changed: int, near: bool) -> None:
    """A changed line breaks the five runs it is in; the expected fraction of the others is what the threshold cuts."""
    original = lines(7, 400)
    edited = list(original)
    for i in range(changed * 10):
        edited[i * 400 // (changed * 10)] = f"edited {i}"
    copies = NearCopies()
    assert not copies.add("\n".join(original).encode())
    assert copies.add("\r\n\n".join(f"   {line}" for line in edited).encode()) is near
    assert not copies.add(b"x = 1\n" * 4)  # too short to tell
    assert not copies.add(b"x = 1\n" * 4)
