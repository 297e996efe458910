"""Data of the Hugging Face hub, from a stand-in for it on loopback that serves files as the hub does."""

import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest
from pyarrow import parquet
from texts import CHEAP_SWEEP, all_tokens, make_texts, specify, visible, write_txt

from experiments.cli.main import main
from experiments.data import hub
from experiments.data.build import build
from experiments.data.corpus import find_files
from experiments.data.dataset import Dataset

pytest.importorskip("huggingface_hub")

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CARD = """---
license: cc-by-4.0
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*
  - split: test
    path: [data/test-0.parquet]
- config_name: small
  data_files: small/**/*.parquet
---
A card.
"""


class Hub(http.server.ThreadingHTTPServer):
    """Serves repositories, KIND/OWNER/NAME, from folders; `asked` are the paths of its requests."""

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.root, self.asked, self.missing = root, list[str](), set[str]()


class Handler(http.server.BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urllib.parse.unquote(self.path.partition("?")[0])
        self.server.asked.append(path)
        parts = path.strip("/").split("/")
        if parts[0] == "api":
            root = self.server.root / "/".join(parts[1:4])
            files = sorted(each for each in root.rglob("*") if each.is_file())
            names = [each.relative_to(root).as_posix() for each in files]
            if not root.exists() or parts[5] != COMMIT:
                self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            elif parts[4] == "tree":
                tree = [
                    {"type": "file", "path": name, "size": each.stat().st_size, "oid": _sha(each)}
                    for name, each in zip(names, files, strict=True)
                ]
                self._answer(200, json.dumps(tree).encode())
            else:
                about = {"id": "/".join(parts[2:4]), "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
                self._answer(200, json.dumps(about).encode())
            return
        kind = parts.pop(0) if parts[0] == "datasets" else "models"
        file = self.server.root / kind / parts[0] / parts[1] / "/".join(parts[4:])
        if not file.exists() or file.name in self.server.missing:
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        self._answer(200, file.read_bytes(), {"ETag": f'"{_sha(file)}"', "X-Repo-Commit": COMMIT})

    def _answer(self, code: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


def _sha(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return make_texts()


@pytest.fixture
def served(texts: list[str], tmp_path: Path) -> Iterator[Hub]:
    """A data set of three files of text, and others; a tokenizer."""
    data = tmp_path / "hub" / "datasets" / "someone" / "text"
    for name, part in {
        "data/train-0.parquet": texts[:70],
        "data/train-1.parquet": texts[70:],
        "data/test-0.parquet": ["held out, and not to be trained on " * 30] * 3,
        "small/a/0.parquet": texts[:100],
        "small/b/c/0.parquet": texts[100:],
        "other/train-0.parquet": ["of no configuration " * 200],
    }.items():
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pa.table({"text": part}), data / name)
    (data / "README.md").write_text(CARD)
    model = tmp_path / "hub" / "models" / "someone" / "model"
    model.mkdir(parents=True)
    local = build(specify(write_txt(tmp_path / "txt", texts)), tmp_path / "local")
    shutil.copyfile(local / "tokenizer.json", model / "tokenizer.json")
    (model / "weights.bin").write_bytes(b"0" * 100)
    server = Hub(tmp_path / "hub")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def run(served: Hub, tmp_path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, as the library reads the address of the hub when it is imported."""
    own = {
        "HF_ENDPOINT": f"http://127.0.0.1:{served.server_address[1]}",
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DYNCONV_CACHE": str(tmp_path / "cache"),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = [sys.executable, "-m", "experiments.cli.main", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **own, **environment}
    )


def write_sweep(tmp_path: Path, source: str, extra: str = "") -> str:
    sweep = CHEAP_SWEEP.format(source=source).replace("200_000", "12_000").replace("4_000", "400")
    sweep = sweep.replace("tokens_per_parameter = 1", "tokens_per_parameter = 1\nmax_epochs = 100")
    (tmp_path / "sweep.toml").write_text(sweep + extra)
    return str(tmp_path / "sweep.toml")


@pytest.mark.parametrize("query", ["", "?split=train", "?config=small", "?files=data/train-*.parquet"])
def test_a_split_of_the_hub_is_as_its_files_are(served: Hub, tmp_path: Path, query: str) -> None:
    """By its card or by a pattern, with its licence and commit; the second time without the hub."""
    sweep = write_sweep(tmp_path, f"hub:someone/text@{COMMIT}{query}")
    done = run(served, tmp_path, "data", "build", sweep, "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    local = Dataset.open(next((tmp_path / "local").glob("text-*")))
    assert (all_tokens(Dataset.open(facts["path"]), "train") == all_tokens(local, "train")).all()
    assert facts["origins"]["source"] == {
        "place": f"hub:someone/text@{COMMIT}{query}",
        "repository": "someone/text",
        "commit": COMMIT,
        "licence": "cc-by-4.0",
        "files": 2,
    }
    assert not [path for path in served.asked if "test-0" in path or "other" in path]
    asked = len(served.asked)
    again = run(served, tmp_path, "data", "build", sweep)
    assert again.returncode == 0, again.stderr
    assert f"source of the hub: someone/text at {COMMIT}, licence cc-by-4.0" in again.stdout
    assert len(served.asked) == asked


def test_two_processes_that_fetch_the_same_at_once_both_have_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "a.txt").write_text("text")
    listed = SimpleNamespace(siblings=[SimpleNamespace(rfilename="a.txt")])
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", lambda *_, **__: listed)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path / "snapshot"))
    place, replace, others = f"hub:someone/text@{COMMIT}?files=*.txt", Path.replace, iter([hub._fetch])

    def replace_late(self: Path, target: Path) -> Path:
        for fetch in others if self.name == "new" else ():
            fetch("source", place, tmp_path / "cache")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", replace_late)
    files = hub._fetch("source", place, tmp_path / "cache")
    assert [path.read_text() for path in files.iterdir()] == ["text"]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [files.parent.name]


def test_a_tokenizer_and_held_out_text_of_the_hub(served: Hub, tmp_path: Path) -> None:
    sweep = write_sweep(
        tmp_path,
        f"hub:someone/text@{COMMIT}?config=small",
        f'validation_source = "hub:someone/text@{COMMIT}?split=test"\ntokenizer = "hub:someone/model@{COMMIT}"\n',
    )
    done = run(served, tmp_path, "data", "build", sweep, "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    tokenizer = tmp_path / "hub" / "models" / "someone" / "model" / "tokenizer.json"
    assert facts["tokenizer_sha256"] == hashlib.sha256(tokenizer.read_bytes()).hexdigest()
    assert set(facts["origins"]) == {"source", "validation_source", "tokenizer"}
    assert facts["origins"]["tokenizer"]["licence"] is None
    assert not [path for path in served.asked if "weights" in path]


def test_what_the_hub_does_not_give_is_an_error_and_leaves_nothing(served: Hub, tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path, f"hub:someone/text@{COMMIT}")
    served.missing.add("train-1.parquet")
    done = run(served, tmp_path, "data", "build", sweep)
    assert done.returncode == 1
    assert f"dynconv data: the hub must give hub:someone/text@{COMMIT}; got " in done.stderr
    assert "Traceback" not in done.stderr
    assert visible(tmp_path / "cache") == []
    served.missing.clear()
    assert run(served, tmp_path, "data", "build", sweep).returncode == 0
    shutil.rmtree(tmp_path / "hf")  # as `hf cache prune` might
    done = run(served, tmp_path, "data", "build", sweep)
    assert done.returncode == 0, done.stderr
    other = write_sweep(tmp_path, f"hub:nobody/text@{COMMIT}")
    assert run(served, tmp_path, "data", "build", other).returncode == 1


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("?split=validation", "must name a split of config default; got validation; it has test, train"),
        ("?config=large", "must name a config of the card; got large; it has default, small"),
        ("?files=*.parquet", r"must have files that fit \*.parquet; got README.md, data/test-0.parquet"),
        ("?files=a&split=test", "must name one split, or files; got more"),
        ("?config=a&config=b", "must name one config, or files; got more"),
        ("?revision=main", "must be named as hub:OWNER/NAME@COMMIT.*perhaps with"),
    ],
)
def test_it_must_be_clear_which_files_are_meant(query: str, message: str) -> None:
    place = f"hub:someone/text@{COMMIT}{query}"
    names = ["README.md", "data/test-0.parquet", "data/train-0.parquet", "small/a/0.parquet"]
    about = {
        "configs": [
            {"config_name": "default", "data_files": [{"split": s, "path": f"data/{s}-*"} for s in ("train", "test")]},
            {"config_name": "small", "data_files": "small/**"},
        ]
    }
    with pytest.raises(ValueError, match=message):
        hub._chosen(place, hub.parse(place), names, about)
    with pytest.raises(ValueError, match=r"the card of .* got no configs; name them, .files=PATTERN, among README.md"):
        hub._chosen(place, hub.parse(f"hub:someone/text@{COMMIT}"), names, {})


@pytest.mark.parametrize(
    "place", ["hub:someone/text", "hub:someone/text@main", f"hub:text@{COMMIT}", "hub:a/b@0123456"]
)
def test_a_place_without_a_whole_commit_is_refused(tmp_path: Path, place: str) -> None:
    with pytest.raises(ValueError, match=r"must be named as hub:OWNER/NAME@COMMIT, with all 40 digits.*; got 'hub:"):
        build(specify(place), tmp_path)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*.parquet", ["a.parquet"]),
        ("**/*.parquet", ["a.parquet", "x/a.parquet", "x/y/a.parquet"]),
        ("x/**", ["x/a.parquet", "x/y/a.parquet"]),
        ("x/?.parquet", ["x/a.parquet"]),
        ("./x/a.parquet", ["x/a.parquet"]),
        ("x/a+.parquet", []),
    ],
)
def test_patterns_stay_within_folders(pattern: str, names: list[str]) -> None:
    place = hub.parse(f"hub:a/b@{COMMIT}?files={urllib.parse.quote(pattern)}")
    every = ["a.parquet", "x/a.parquet", "x/y/a.parquet"]
    if names:
        assert hub._chosen("", place, every, {}) == names
    else:
        with pytest.raises(ValueError, match="must have files that fit"):
            hub._chosen("", place, every, {})


def test_planning_asks_no_hub(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = write_sweep(tmp_path, f"hub:someone/text@{COMMIT}")
    assert main(["plan", sweep]) == 0
    assert "is not there" not in capsys.readouterr().err
    with pytest.raises(ValueError, match="must be downloaded from the hub; got no copy; `dynconv data build` does it"):
        find_files(specify(f"hub:someone/text@{COMMIT}"))


def test_without_the_extra_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # type: ignore[arg-type]  # which makes its import fail
    with pytest.raises(
        ValueError, match=r"source lies on the .* hub and needs huggingface_hub; .* pip install '.\[hub\]'"
    ):
        build(specify(f"hub:someone/text@{COMMIT}"), tmp_path)
