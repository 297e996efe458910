"""Tokens of other projects: in each format the same tokens are the same data, and what does not fit is refused."""

import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from texts import all_tokens, make_texts, specify, write_txt

from experiments.cli.main import main
from experiments.data import dataset as dataset_module
from experiments.data import pretokenized
from experiments.data.batches import Batches
from experiments.data.build import build
from experiments.data.dataset import Dataset
from experiments.data.inspect import inspect
from experiments.design.data import SPLITS, DataConfig, relative_to
from experiments.design.sweep import load_sweep


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """The oracle: a dataset that was built here, whose tokens the other formats hold."""
    folder = tmp_path_factory.mktemp("text")
    return Dataset.open(build(specify(write_txt(folder / "txt", make_texts())), folder / "cache"))


def specify_tokens(text: Dataset, source: Path, kind: str, **changes: Any) -> DataConfig:
    settings = {"pretokenized": kind, "tokenizer": str(text.path / "tokenizer.json"), **changes}
    return specify(source, **settings)


def documents_of(text: Dataset, split: str) -> list[NDArray[np.int64]]:
    return np.split(all_tokens(text, split), text.document_starts(split)[1:].astype(np.int64))


def write_plain(path: Path, documents: list[NDArray[np.int64]], kind: str = "<u2") -> None:
    path.write_bytes(np.concatenate(documents).astype(kind).tobytes())


def write_llm_c(path: Path, documents: list[NDArray[np.int64]], kind: str = "<u2") -> None:
    header = np.zeros(256, "<i4")
    header[:3] = *{"<u2": (20240520, 1), "<u4": (20240801, 7)}[kind], sum(map(len, documents))
    path.write_bytes(header.tobytes() + np.concatenate(documents).astype(kind).tobytes())


def write_megatron(path: Path, documents: list[NDArray[np.int64]], kind: str = "<u2") -> None:
    """Each document in sequences of a hundred tokens, as of sentences."""
    write_plain(path, documents, kind)
    sequences = [len(document[at : at + 100]) for document in documents for at in range(0, len(document), 100)]
    entries = np.cumsum([0, *(-(-len(document) // 100) for document in documents)])
    offsets = np.cumsum([0, *sequences[:-1]]) * np.dtype(kind).itemsize
    code = {"<u2": 8, "<i4": 4}[kind]
    path.with_suffix(".idx").write_bytes(
        b"MMIDIDX\0\0"
        + struct.pack("<QBQQ", 1, code, len(sequences), len(entries))
        + np.array(sequences, "<i4").tobytes()
        + offsets.astype("<i8").tobytes()
        + entries.astype("<i8").tobytes()
    )


WRITERS: dict[str, tuple[str, Callable[..., None], str]] = {
    "nanoGPT": ("uint16", write_plain, "<u2"),
    "of 32 bits": ("uint32", write_plain, "<u4"),
    "GPT-2 for llm.c": ("llm.c", write_llm_c, "<u2"),
    "Llama 3 for llm.c": ("llm.c", write_llm_c, "<u4"),
    "Megatron": ("megatron", write_megatron, "<u2"),
    "Megatron, int32": ("megatron", write_megatron, "<i4"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_tokens_are_read_where_they_lie(text: Dataset, tmp_path: Path, name: str) -> None:
    """Over the borders of three files, from which no token is copied."""
    kind, write, of_type = WRITERS[name]
    (tmp_path / "tokens").mkdir()
    train = documents_of(text, "train")
    cuts = [0, 20, 21, len(train)]
    for number in range(3):
        write(tmp_path / "tokens" / f"train_{number}.bin", train[cuts[number] : cuts[number + 1]], of_type)
    write(tmp_path / "tokens" / "val.bin", documents_of(text, "validation"), of_type)
    spec = specify_tokens(text, tmp_path / "tokens", kind, validation_source=str(tmp_path / "tokens" / "val.bin"))
    path = build(spec, tmp_path / "cache")
    data = Dataset.open(path)
    data.verify()
    data.spot_check("a run")
    for split in SPLITS:
        assert (all_tokens(data, split) == all_tokens(text, split)).all()
        assert (data.document_starts(split) == text.document_starts(split)).all()
        assert data.manifest["splits"][split]["bytes"] == text.manifest["splits"][split]["bytes"]
    assert data.bytes_per_token == text.bytes_per_token
    assert not list(path.glob("train-0*"))
    ours, theirs = (
        Batches(each, sequence_length=33, batch_sequences=8, seed=1, most_documents=9) for each in (text, data)
    )
    for step in (0, 11, 10**6):
        mine, other = ours.batch(step), theirs.batch(step)
        assert all(np.array_equal(a, b) for a, b in zip(mine, other, strict=True) if a is not None)
    for part in (kind, "read where it lies: 4 files", "held out     ", "val.bin", "ends of text"):
        assert part in inspect(path)


def test_the_identity_is_of_the_tokens_that_are_used(text: Dataset, tmp_path: Path) -> None:
    """Not of a place, a header, or of tokens that come after."""
    documents = documents_of(text, "train")
    hashes = []
    for name, write, kind, tail in [
        ("a", write_plain, "uint16", 7),
        ("b", write_llm_c, "llm.c", 0),
        ("c", write_megatron, "megatron", 99),
    ]:
        (tmp_path / name).mkdir()
        write(tmp_path / name / "train.bin", [*documents, np.ones(tail, np.int64)])
        write(tmp_path / name / "val.bin", documents_of(text, "validation"))
        spec = specify_tokens(
            text, tmp_path / name / "train.bin", kind, validation_source=str(tmp_path / name / "val.bin")
        )
        hashes.append(Dataset.open(build(spec, tmp_path / "cache")).sha256)
    assert len(set(hashes)) == 1
    shorter = Dataset.open(build(replace(spec, train_tokens=11_999), tmp_path / "cache"))
    assert shorter.sha256 not in hashes


def test_without_held_out_text_of_its_own_the_end_is_held_out(text: Dataset, tmp_path: Path) -> None:
    tokens = all_tokens(text, "train")
    write_plain(tmp_path / "a.bin", [tokens[:7000]])
    write_plain(tmp_path / "b.bin", [tokens[7000:]])
    spec = specify_tokens(text, tmp_path, "uint16", train_tokens=11_600)
    data = Dataset.open(build(spec, tmp_path / "cache"))
    assert (all_tokens(data, "train") == tokens[:11_600]).all()
    assert (all_tokens(data, "validation") == tokens[-400:]).all()
    assert "the last 400 tokens of the source" in inspect(data.path)
    with pytest.raises(ValueError, match=r"beside the validation_tokens at its end; got 11601, .* has 11600; lower"):
        build(replace(spec, train_tokens=11_601), tmp_path / "cache")


def test_ends_of_text_may_stand_before_the_documents(text: Dataset, tmp_path: Path) -> None:
    """As llm.c and modded-nanogpt have it."""
    end = text.token_bytes().tolist().index(0)
    documents = [np.concatenate([[end], each[:-1]]) for each in documents_of(text, "train")[:-1]]
    write_llm_c(tmp_path / "a.bin", documents)
    spec = specify_tokens(text, tmp_path, "llm.c", train_tokens=11_000, validation_tokens=50)
    data = Dataset.open(build(spec, tmp_path / "cache"))
    expected = np.cumsum([0, *map(len, documents)])
    assert (data.document_starts("train") == expected[expected < 11_000]).all()


def test_two_processes_that_index_the_same_at_once_both_have_it(
    text: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_plain(tmp_path / "a.bin", documents_of(text, "train"))
    spec = specify_tokens(text, tmp_path / "a.bin", "uint16", train_tokens=11_000)
    replace, others = Path.replace, iter([build])

    def replace_late(self: Path, target: Path) -> Path:
        for other in others if self.name == "dataset" else ():
            other(spec, tmp_path / "cache")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", replace_late)
    path = build(spec, tmp_path / "cache")
    assert [each for each in (tmp_path / "cache").iterdir() if each.is_dir()] == [path]


def test_tokens_that_nobody_wrote_to_are_not_read_again(
    text: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "a.bin"
    write_plain(source, documents_of(text, "train"))
    spec = specify_tokens(text, source, "uint16", train_tokens=11_000)
    path = build(spec, tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(pretokenized, "_check", lambda *_: pytest.fail("read again"))
        assert build(spec, tmp_path / "cache") == path
    source.touch()
    assert build(spec, tmp_path / "cache") == path
    with source.open("r+b") as file:
        file.write(b"\x05\x00")
    changed = build(spec, tmp_path / "cache")
    assert Dataset.open(changed).sha256 != Dataset.open(path).sha256
    with pytest.raises(ValueError, match=r"a.bin must have SHA-256"):
        Dataset.open(path).verify()
    monkeypatch.setattr(dataset_module, "BLOCKS_CHECKED", 10**6)
    with pytest.raises(ValueError, match=r"a.bin must be as it was built; got other content in bytes 0 to"):
        Dataset.open(path).spot_check("a run")
    source.write_bytes(source.read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"a.bin must have \d+ bytes; got \d+ bytes"):
        Dataset.open(path)


def as_llm_c(path: Path) -> None:
    content = np.frombuffer(path.read_bytes(), "<u2")
    write_llm_c(path, [content])


def as_megatron(path: Path) -> None:
    write_megatron(path, [np.frombuffer(path.read_bytes(), "<u2")])


def of_32_bits(path: Path) -> None:
    write_plain(path, [np.frombuffer(path.read_bytes(), "<u2")], "<u4")


def with_a_byte_more(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0")


def with_index(change: Callable[[bytearray], object]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        as_megatron(path)
        content = bytearray(path.with_suffix(".idx").read_bytes())
        change(content)
        path.with_suffix(".idx").write_bytes(content)

    return damage


def with_shorter_llm_c(path: Path) -> None:
    as_llm_c(path)
    path.write_bytes(path.read_bytes()[:-2])


@pytest.mark.parametrize(
    ("kind", "damage", "message"),
    [
        ("uint16", as_llm_c, 'must hold tokens only; got a header of llm.c; set pretokenized = "llm.c"'),
        ("uint16", as_megatron, 'got an index beside it; set pretokenized = "megatron"'),
        ("uint16", of_32_bits, 'got zero as every second one; set pretokenized = "uint32"'),
        ("uint16", with_a_byte_more, "must hold whole tokens of 2 bytes; got 24001 bytes"),
        ("uint32", lambda _: None, "must hold tokens below the vocabulary, 300; got .* or pretokenized to the format"),
        ("llm.c", lambda _: None, r"must begin with a header of llm.c .*; got [0-9a-f ]+; give other files"),
        ("llm.c", Path.unlink, "must be .bin files; got none at"),
        ("llm.c", lambda path: path.write_bytes(b""), "must begin with a header of llm.c .*; got nothing"),
        ("llm.c", with_shorter_llm_c, "must have the 12000 tokens of its header, 25024 bytes; got 25022; copy"),
        ("megatron", lambda _: None, "must have its index beside it; got no train.idx"),
        ("megatron", with_index(bytearray.clear), "must be a whole index of Megatron-LM, version 1"),
        ("megatron", with_index(lambda raw: raw.pop()), "must be a whole index of Megatron-LM, version 1"),
        ("megatron", with_index(lambda raw: raw.__setitem__(17, 7)), "must hold uint16 or int32 .*; got code 7"),
        ("megatron", with_index(lambda raw: raw.__setitem__(34, 99)), "must hold the sequences of its index one after"),
        ("megatron", with_index(lambda raw: raw.__setitem__(-7, 99)), "must hold the sequences of its index one after"),
    ],
)
def test_files_of_another_format_are_refused(
    text: Dataset, tmp_path: Path, kind: str, damage: Callable[[Path], object], message: str
) -> None:
    path = tmp_path / "train.bin"
    write_plain(path, documents_of(text, "train"))
    damage(path)
    with pytest.raises(ValueError, match=message):
        build(specify_tokens(text, path, kind, train_tokens=5000), tmp_path / "cache")
    assert not (tmp_path / "cache").exists() or not list((tmp_path / "cache").iterdir())


def test_a_token_outside_the_vocabulary_is_refused(text: Dataset, tmp_path: Path) -> None:
    tokens = all_tokens(text, "train")
    tokens[10_000] = 300
    write_plain(tmp_path / "a.bin", [tokens])
    with pytest.raises(ValueError, match=r"a.bin must hold tokens below the vocabulary, 300; got 300; set vocabulary"):
        build(specify_tokens(text, tmp_path, "uint16", train_tokens=11_000), tmp_path / "cache")
    build(specify_tokens(text, tmp_path, "uint16", train_tokens=10_000), tmp_path / "cache")  # which are not used


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "python"}, r'needs a source of .bin files; got "python"'),
        ({"tokenizer": None}, "needs the tokenizer that made the tokens.*; got none; set tokenizer"),
        ({"separator": "\n"}, "takes tokens as they are; got separator, drop_near_copies or read_all = false"),
        ({"read_all": False}, "takes tokens as they are; got separator, drop_near_copies or read_all = false"),
        ({"drop_near_copies": True}, "takes tokens as they are; got separator, drop_near_copies or read_all = false"),
    ],
)
def test_settings_of_text_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        specify(**({"source": "x", "pretokenized": "uint16", "tokenizer": "t.json"} | changes))


def test_a_sweep_on_tokens_of_another_project(
    text: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a pattern beside the sweep file; planned, built and inspected by command."""
    (tmp_path / "tokens").mkdir()
    tokens = all_tokens(text, "train")
    for number in range(20):
        write_llm_c(tmp_path / "tokens" / f"x_train_{number:02d}.bin", [tokens])
    write_llm_c(tmp_path / "tokens" / "x_val_0.bin", [tokens])
    shutil.copyfile(text.path / "tokenizer.json", tmp_path / "t.json")
    (tmp_path / "sweep.toml").write_text(
        'name = "tokens"\nladder = "nano"\nsizes = ["25k"]\narms = ["transformer"]\nbaseline = "transformer"\n'
        'seeds = [0]\ntokens_per_parameter = 1\nmatch = "flops"\nevaluations = 1\n'
        '[data]\nsource = "tokens/x_train_*.bin"\nvalidation_source = "tokens/x_val_*.bin"\npretokenized = "llm.c"\n'
        'tokenizer = "t.json"\nvocabulary = 300\ntrain_tokens = 200_000\nvalidation_tokens = 4_000\n'
    )
    monkeypatch.setenv("DYNCONV_CACHE", str(tmp_path / "cache"))
    assert main(["plan", str(tmp_path / "sweep.toml")]) == 0
    assert "is not there" not in capsys.readouterr().err
    assert main(["data", "build", str(tmp_path / "sweep.toml"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["corpus"] == {"files": 18, "bytes": 2 * 204_000}  # it reads no further than it needs
    assert facts["splits"]["train"]["tokens"] == 200_000
    (run,) = load_sweep(tmp_path / "sweep.toml")
    assert run.data is not None
    assert replace(run.data, pretokenized="megatron") != run.data
    assert replace(run, data=replace(run.data, pretokenized="megatron")).run_id == run.run_id
    assert relative_to(specify_tokens(text, Path("tokens/nothing"), "uint16"), tmp_path).source == "tokens/nothing"
