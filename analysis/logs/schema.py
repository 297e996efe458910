"""The schema of the run log, one definition for its writer and its reader.

Units: losses in nats a token, seconds of wall clock, tokens cumulative over the run.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # importing pyarrow takes up to a second, and `status` does not need it
    import pyarrow as pa

SCHEMA = 2
STEP_COLUMNS = {
    "attempt": "int64",
    "step": "int64",
    "tokens": "int64",
    "loss": "float64",
    "gradient_norm": "float64",
    "learning_rate": "float64",
    "seconds": "float64",
}
EVAL_COLUMNS = {  # one row for each metric, so that a new task needs no new column
    "attempt": "int64",
    "step": "int64",
    "tokens": "int64",
    "task": "string",
    "metric": "string",
    "value": "float64",
    "seconds": "float64",  # of the whole evaluation, in the row of its first metric; null in the others
}
COLUMNS = {"steps": STEP_COLUMNS, "evals": EVAL_COLUMNS}
CLOCKS = ("queue", "startup", "compile", "train", "eval", "checkpoint", "lost")
ADDED_CLOCKS = ("queue", "startup", "compile", "checkpoint")  # logged directly; the others are sums over rows
IDENTITY = {  # written by the sweep into config.json, repeated in run.json; FLOPs are floats, as they can exceed 2^63
    "run_id": "string",
    "sweep": "string",
    "arm": "string",
    "size": "string",
    "budget": "string",
    "seed": "Int64",
    "baseline": "string",
    "task": "string",
    "trunk": "string",
    "parameters": "Int64",
    "parameters_nonembedding": "Int64",
    "parameters_active": "Int64",
    "tokens": "Int64",
    "flops_exact": "float64",
    "flops_6nd": "float64",
    "flops_6n_nonemb_d": "float64",
    "flops_6nactive_d": "float64",
}
RECORDED = {
    **IDENTITY,
    "vocabulary": "Int64",
    "code_commit": "string",
    "code_sha256": "string",
    "data_sha256": "string",
    "tokenizer_sha256": "string",
}
TRUNK = "trunk"  # the budget of a run that only trains what its branches share
RUN_COLUMNS = {  # of every run table; the facts and the varied axes of the runs follow, typed by `type_of`
    **IDENTITY,
    "vocabulary": "Int64",
    "loss": "float64",
    "bits_per_byte": "float64",
    "gradient_norm": "float64",
    "did_not_learn": "string",
    "steps": "Int64",
    "attempts": "Int64",
    **{f"{clock}_seconds": "float64" for clock in CLOCKS},
    "tokens_per_second": "float64",
    "device": "string",
    "gpus": "Int64",
    "sharing": "Int64",
    "dtype": "string",
    "execution": "string",
    "fused": "string",
    "torch": "string",
    "clock": "string",
    "code_commit": "string",
    "code_sha256": "string",
    "data_sha256": "string",
    "tokenizer_sha256": "string",
    "status": "string",
}
OF_LEARNING = ("vocabulary", "gradient_norm", "did_not_learn")
LATER_COLUMNS = (*OF_LEARNING, "execution", "fused", "code_sha256")  # which stores frozen before they existed lack

CONVENTIONS = {  # a way to count training FLOPs -> its column of the run table
    "exact": "flops_exact",
    "6ND": "flops_6nd",
    "6N_nonemb D": "flops_6n_nonemb_d",
    "6N_active D": "flops_6nactive_d",
    "given": "flops_given",  # column C of a table of points
}

AXIS_PREFIX = "vary."  # of the columns that hold a sweep's declared [vary] axes


def fact_columns(columns: Iterable[str]) -> list[str]:
    """The columns that hold facts of a run's configuration, such as "conv.width": names with a dot, but not [vary]
    axes."""
    return [name for name in columns if "." in name and not name.startswith(AXIS_PREFIX)]


def axis_columns(columns: Iterable[str]) -> list[str]:
    """The columns of the sweep's declared [vary] axes, such as "vary.learning_rate_factor"."""
    return [name for name in columns if name.startswith(AXIS_PREFIX)]


def type_of(values: Iterable[Any]) -> str:
    """The type of a column with these values, where None is missing: "string", "Int64", "float64" or "boolean".

    Integers and floats together give "float64". Other mixtures, such as text and numbers, give "string".
    """
    kinds = {type(value) for value in values if value is not None}
    if kinds == {bool}:
        return "boolean"
    if kinds == {int}:
        return "Int64"
    return "float64" if kinds and kinds <= {int, float} else "string"


def arrow_schema(kind: str) -> pa.Schema:
    import pyarrow as pa

    return pa.schema([(name, pa.type_for_alias(dtype)) for name, dtype in COLUMNS[kind].items()])
