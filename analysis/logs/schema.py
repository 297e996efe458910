"""The schema of the run log, one definition for its writer and its reader.

Units: losses in nats a token, seconds of wall clock, tokens cumulative over the run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # pyarrow costs up to a second, and `status` needs none of it
    import pyarrow as pa

SCHEMA = 1
STEP_COLUMNS = {
    "attempt": "int64",
    "step": "int64",
    "tokens": "int64",
    "loss": "float64",
    "gradient_norm": "float64",
    "learning_rate": "float64",
    "seconds": "float64",
}
EVAL_COLUMNS = {
    "attempt": "int64",
    "step": "int64",
    "tokens": "int64",
    "loss": "float64",
    "bits_per_byte": "float64",
    "seconds": "float64",
}
COLUMNS = {"steps": STEP_COLUMNS, "evals": EVAL_COLUMNS}
CLOCKS = ("queue", "startup", "compile", "train", "eval", "checkpoint", "lost")
ADDED_CLOCKS = ("queue", "startup", "compile", "checkpoint")  # the others are sums of rows
IDENTITY = {  # stored by the sweep in config.json, repeated in run.json; FLOPs pass 2^63, hence floats
    "run_id": "string",
    "sweep": "string",
    "arm": "string",
    "size": "string",
    "seed": "Int64",
    "baseline": "string",
    "parameters": "Int64",
    "parameters_nonembedding": "Int64",
    "tokens": "Int64",
    "flops_exact": "float64",
    "flops_6nd": "float64",
    "flops_6n_nonemb_d": "float64",
}
ARM_FACTS = {  # how the arm is declared: the keys of a sweep's [arm.NAME]; missing where its kind has none
    "kind": "string",
    "site": "string",  # as "qkv", or "all-linear"
    "width": "Int64",  # taps
    "rank": "Int64",
    "head_size": "Int64",
    "residual": "boolean",
    "static_filter": "boolean",
    "qk_norm": "boolean",
    "kv_heads": "Int64",
}
RUN_COLUMNS = {
    **IDENTITY,
    **ARM_FACTS,
    "loss": "float64",
    "bits_per_byte": "float64",
    "steps": "Int64",
    "attempts": "Int64",
    **{f"{clock}_seconds": "float64" for clock in CLOCKS},
    "tokens_per_second": "float64",
    "device": "string",
    "gpus": "Int64",
    "dtype": "string",
    "torch": "string",
    "code_commit": "string",
    "data_sha256": "string",
    "tokenizer_sha256": "string",
    "status": "string",
}

CONVENTIONS = {  # a way to count training FLOPs -> its column of the run table
    "exact": "flops_exact",
    "6ND": "flops_6nd",
    "6N_nonemb D": "flops_6n_nonemb_d",
    "given": "flops_given",  # column C of a table of points
}


def arrow_schema(kind: str) -> pa.Schema:
    import pyarrow as pa

    return pa.schema([(name, pa.type_for_alias(dtype)) for name, dtype in COLUMNS[kind].items()])
