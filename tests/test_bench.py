"""The kernel bench: what it counts, compares, writes and refuses; on a GPU, what it measures."""

import argparse
import functools
import json
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from experiments.bench import cases as kernels
from experiments.bench import kernels as bench
from experiments.cli import bench as bench_verb
from experiments.cli.main import main

COPY = 4.25e6  # bytes a microsecond: the H200 of the table below


@pytest.mark.parametrize(
    ("case", "floor"),  # microseconds, worked out by hand for B=4 T=4096 D=2048 W=4 bf16 on an H200
    [
        (kernels.Case("lowrank", R=16), 79.0),
        (kernels.Case("static"), 79.0),
        (kernels.Case("headwise", H=2048), 268.4),
        (kernels.Case("headwise", H=512), 126.3),
        (kernels.Case("headwise", H=128), 90.8),
    ],
)
def test_the_bytes_are_every_input_and_output_once(case: kernels.Case, floor: float) -> None:
    assert case.bytes(backward=True) / COPY == pytest.approx(floor, rel=0.01)


def _rows() -> pd.DataFrame:
    """As `bench.table` makes them, at half the copy bandwidth."""
    rows = []
    for case in kernels.cases(quick=True):
        shape = {key: value for key, value in asdict(case).items() if key != "segments"}
        for name in ("fwd", "fwd+bwd", "host"):
            count = case.bytes(backward=name != "fwd")
            row = {"pass": name, "us": count / COPY / 0.5, "bytes": count, "provider": "dynconv"}
            row |= {"fraction": None if name == "host" else 0.5, "case": str(case), "transient": 0.25}
            rows.append(shape | row | {"device": "a GPU", "versions": "1", "commit": None})
    return pd.DataFrame(rows)


def test_the_text_has_a_table_a_shape_and_a_line_a_kernel() -> None:
    device, first, second = bench.render(_rows()).split("\n\n")
    assert device == "a GPU, 1"
    assert [table.splitlines()[0] for table in (first, second)] == [
        "B=4 T=4096 D=2048 W=4 bfloat16",
        "B=4 T=4096 D=6144 W=4 bfloat16",
    ]
    lines = first.splitlines()[2:] + second.splitlines()[2:]
    assert [line.split("  ")[0] for line in lines] == [str(case) for case in kernels.cases(quick=True)]
    # static, by hand: 2 and 5 times 67.1 MB and filters of 33 and 98 KB, at half of 4.25 TB/s
    (static,) = (line for line in lines if line.startswith("static "))
    assert static.split() == ["static", "dynconv", "63.2", "134", "50%", "157.9", "336", "50%", "158", "0.25"]


@pytest.mark.parametrize("name", ["kernels.parquet", "kernels.csv"])
def test_rows_survive_a_file(tmp_path: Path, name: str) -> None:
    bench.check_target("-o", tmp_path / "new" / name, (".parquet", ".csv"))
    bench._save(_rows()[bench.COLUMNS], tmp_path / "new" / name)
    read = {".parquet": pd.read_parquet, ".csv": pd.read_csv}[Path(name).suffix](tmp_path / "new" / name)
    assert list(read.columns) == bench.COLUMNS
    assert read["us"].tolist() == pytest.approx(_rows()["us"].tolist())


def _arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench_verb.register(parser.add_subparsers(dest="verb"))
    return parser.parse_args(["bench", "kernels", *words])


def test_without_a_gpu_the_request_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["bench", "kernels", "--quick"]) == 2
    assert "bench kernels times a GPU; torch sees no GPU here; run it where" in capsys.readouterr().err


def test_a_rival_names_its_op() -> None:
    *_, rival = kernels.providers(False, ["dynconv.ops:lowrank_dynamic_convolution"])
    assert list(rival.functions) == ["lowrank"]
    with pytest.raises(ValueError, match="--against wants module:function"):
        kernels.providers(False, ["math:sqrt"])


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("no_such_module:static", r"no_such_module.*; correct no_such_module, or put its folder on PYTHONPATH"),
        ("./mine.py:static", "--against wants module:function"),
        (".mine:static", "--against wants module:function"),
        (":static", "--against wants module:function"),
        ("mine:static", "mine:static: unexpected indent"),
        ("raising:static", "raising:static: AssertionError; correct raising"),
        ("lacking:static_convolution", "lacking has no function static_convolution; see .*lacking.py"),
        ("sys:static", "sys has no function static; see sys"),
        ("lacking:static_value", "lacking has no function static_value"),
    ],
)
def test_a_rival_that_is_none_is_refused(
    target: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text("  x = 1")
    (tmp_path / "raising.py").write_text("assert False")
    (tmp_path / "lacking.py").write_text("static_value = 1")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=message):
        kernels.providers(False, [target])


SMALL = [
    kernels.Case("static", B=1, T=9, D=8),
    kernels.Case("headwise", B=2, T=9, D=8, H=2, static=True),
    kernels.Case("lowrank", B=2, T=9, D=12, R=3, segments=3),
]


def own_provider() -> kernels.Provider:
    (ours,) = (provider for provider in kernels.providers(False, []) if provider.name == "dynconv")
    return ours


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_what_is_timed_computes_the_same(case: kernels.Case) -> None:
    ours = own_provider()
    assert ours.error(case, device="cpu") < bench.LARGEST_ERROR
    scaled = kernels.Provider("another", {case.op: lambda **given: 1.05 * ours.functions[case.op](**given)})
    assert scaled.error(case, device="cpu") > bench.LARGEST_ERROR
    assert case.options()["residual"], "the bars are of convolutions with the residual"
    broken = {case.op: lambda x, **given: ours.functions[case.op](x, **given) + 0 * (x - x.detach()).sqrt()}
    assert not kernels.Provider("another", broken).error(case, device="cpu") < bench.LARGEST_ERROR
    without_gradient = {case.op: lambda x, **given: ours.functions[case.op](x.detach() + 0 * x, **given)}
    assert kernels.Provider("another", without_gradient).error(case, device="cpu") > bench.LARGEST_ERROR


def test_published_static_convolutions_get_the_filter_their_way() -> None:
    def conv1d(x: Tensor, weight: Tensor, residual: bool) -> Tensor:
        """As PyTorch has it: filters [D, W], the last tap on the current input."""
        padded = nn.functional.pad(x.transpose(1, 2), (weight.shape[1] - 1, 0))
        y = nn.functional.conv1d(padded, weight[:, None].to(x.dtype), groups=x.shape[2]).transpose(1, 2)
        return y + x if residual else y

    assert (
        kernels.Provider("conv1d", {"static": conv1d}, taps_last=True).error(SMALL[0], device="cpu")
        < bench.LARGEST_ERROR
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    "case",
    [
        *kernels.cases(quick=True),
        kernels.Case("lowrank", R=64, static=True),
        kernels.Case("lowrank", R=16, static=True, B=128, T=128),
        kernels.Case("lowrank", R=16, B=96, T=100),
    ],
    ids=str,
)
def test_what_is_kept_and_allocated_on_the_way_is_bounded(case: kernels.Case) -> None:
    """The bar: nothing but outputs, and transient partials of at most 65% of x."""
    ours = own_provider()
    assert bench.transient_memory(case, ours) <= 0.65


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    ("case", "bound"),
    [
        (kernels.Case("static"), 0.65),
        (kernels.Case("static", dtype="float32"), 1.65),  # PyTorch's silu is in place, of a sum made again for backward
        (kernels.Case("headwise", H=128, static=True), 0.65),
        (kernels.Case("lowrank", R=16, static=True), 0.65),
        (kernels.Case("lowrank", R=20), 2),  # the sum again, in float32, until its gradient is in 16 bits
    ],
    ids=str,
)
def test_silu_allocates_no_more_than_the_sum_that_it_is_of(case: kernels.Case, bound: float) -> None:
    ours = own_provider()
    silu = {case.op: functools.partial(ours.functions[case.op], activation="silu")}
    assert bench.transient_memory(case, kernels.Provider("silu", silu)) <= bound


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_verb_times_what_it_finds(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "cases", lambda quick: SMALL)  # noqa: ARG005 - the signature of what it stands for
    assert bench.run(_arguments("--json")) == 0
    printed = capsys.readouterr()
    rows = json.loads(printed.out)
    assert {row["op"] for row in rows if row["provider"] == "torch.compile"} == set(kernels.OPS), printed.err
    assert all(row["us"] > 0 for row in rows)
    assert list(rows[0]) == bench.COLUMNS


@pytest.mark.parametrize(
    ("option", "name", "message"),
    [
        ("-o", "kernels.xlsx", "-o wants a file .parquet, .csv; got .*kernels.xlsx"),
        ("-o", "folder.csv", "got a folder"),
        ("-o", "taken/kernels.csv", "taken/kernels.csv cannot be written .Not a directory.; name a place"),
        ("-o", "/proc/kernels.csv", "/proc/kernels.csv cannot be written .*; name a place that you can write to"),
        ("--figure", "kernels.jpg", "--figure wants a file .svg, .pdf, .png; got"),
    ],
)
def test_what_cannot_be_written_is_refused_before_measuring(
    option: str, name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "taken").touch()
    with pytest.raises(ValueError, match=message):
        bench.run(_arguments("--no-compiled", option, str(tmp_path / name)))


def test_a_rival_that_raises_costs_its_own_rows_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def raising() -> float:
        raise AssertionError

    monkeypatch.setattr(bench, "copy_bandwidth", lambda: COPY)
    monkeypatch.setattr(bench, "measure", lambda *_: [("fwd", 1.0), ("fwd+bwd", 2.0), ("host", 3.0)])
    monkeypatch.setattr(bench, "transient_memory", lambda *_: 0.5)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "a device")
    monkeypatch.setattr(kernels.Provider, "error", lambda self, case: self.functions[case.op]())
    found = [kernels.Provider("ours", {"static": lambda: 0.0}), kernels.Provider("rival", {"static": raising})]
    rows = bench.table(SMALL[:1], found, lambda _: None)
    assert set(rows["provider"]) == {"ours"}
    assert "rival, static: AssertionError" in capsys.readouterr().err
