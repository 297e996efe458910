"""The kernel bench without a GPU: what it counts, what it writes, and what it refuses."""

import argparse
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import pytest

from analysis import figures
from analysis.errors import WorkFailed
from experiments import bench

COPY = 4.25e6  # bytes a microsecond: the H200 of the table below


@pytest.mark.parametrize(
    ("case", "floor"),  # microseconds, worked out by hand for B=4 T=4096 D=2048 W=4 bf16 on an H200
    [
        (bench.Case("lowrank", R=16), 79.0),
        (bench.Case("static"), 79.0),
        (bench.Case("headwise", H=2048), 268.4),
        (bench.Case("headwise", H=512), 126.3),
        (bench.Case("headwise", H=128), 90.8),
    ],
)
def test_the_bytes_are_every_input_and_output_once(case: bench.Case, floor: float) -> None:
    assert case.bytes(backward=True) / COPY == pytest.approx(floor, rel=0.01)


def _rows() -> pd.DataFrame:
    rows = []
    for case in bench.cases(quick=True):
        count = case.bytes(backward=True)
        shape = {key: value for key, value in asdict(case).items() if key != "segments"}
        row = {"pass": "fwd+bwd", "us": count / COPY / 0.5, "bytes": count, "fraction": 0.5, "provider": "dynconv"}
        rows.append(shape | row | {"device": "a GPU", "versions": "1", "commit": None})
    return pd.DataFrame(rows)[bench.COLUMNS]


@pytest.mark.parametrize("name", ["kernels.parquet", "kernels.csv"])
def test_rows_survive_a_file(tmp_path: Path, name: str) -> None:
    bench._write(_rows(), tmp_path / "new" / name)
    read = {".parquet": pd.read_parquet, ".csv": pd.read_csv}[Path(name).suffix](tmp_path / "new" / name)
    assert list(read.columns) == bench.COLUMNS
    assert read["us"].tolist() == pytest.approx(_rows()["us"].tolist())


def test_the_floor_is_drawn_where_the_bytes_put_it(tmp_path: Path) -> None:
    figure = bench.bars(_rows())
    (floor,) = figure.axes[0].collections
    drawn = [segment[0][0] for segment in floor.get_segments()]
    assert drawn[0] == pytest.approx(79.0, rel=0.01)
    assert drawn[3] == pytest.approx(268.4, rel=0.01)
    figures.save(figure, tmp_path / "kernels.png")


def _arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench.register(parser.add_subparsers(dest="verb"))
    return parser.parse_args(["bench", "kernels", *words])


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(WorkFailed, match="none is visible"):
        bench.run(_arguments("--quick"))


def test_a_rival_names_its_op() -> None:
    found = bench.providers(False, ["dynconv.ops:lowrank_dynamic_convolution"])
    assert list(found["dynconv.ops:lowrank_dynamic_convolution"]) == ["lowrank"]
    with pytest.raises(ValueError, match="--against wants module:function"):
        bench.providers(False, ["math:sqrt"])


def test_an_output_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"-o wants a .parquet or .csv; got"):
        bench._write(_rows(), tmp_path / "kernels.xlsx")
