"""What `dynconv data inspect` prints about a built dataset."""

from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from experiments.data.corpus import describe
from experiments.data.dataset import TOKENIZER, Dataset, manifest_errors
from experiments.design.data import SPLITS

SAMPLE_TOKENS = 48
LEFT_OUT = {
    "held_out": "for training that are held out",
    "near_copies": "near copies of training text",
}


def to_dict(path: Path | str) -> dict[str, Any]:
    """The dataset's specification, counts and hashes, and the text that its train split starts with."""
    dataset = Dataset.open(path)
    first = dataset.windows("train", np.zeros(1, np.int64), min(SAMPLE_TOKENS, dataset.tokens("train")))
    with manifest_errors(dataset.path):
        tokenizer = Tokenizer.from_file(str(dataset.path / TOKENIZER))
        return {
            "path": str(dataset.path),
            "sha256": dataset.sha256,
            "tokenizer_sha256": dataset.tokenizer_sha256,
            "bytes_per_token": dataset.bytes_per_token,
            "sample": tokenizer.decode(first[0].tolist(), skip_special_tokens=False),
            "not_read": dataset.manifest.get("not_read", {}),
            "origins": dataset.manifest.get("origins", {}),
            **{key: dataset.manifest[key] for key in ("spec", "python", "corpus", "splits")},
        }


def inspect(path: Path | str) -> str:
    """`to_dict` as text. The sample is a Python literal, so that no control characters reach the terminal."""
    facts = to_dict(path)
    with manifest_errors(Path(path)):
        return _render(facts)


def _render(facts: dict[str, Any]) -> str:
    spec = facts["spec"]
    lines = _source_of_tokens(facts) if spec.get("pretokenized") else _source_of_text(facts)
    return "\n".join(
        [
            facts["path"],
            *lines,
            *(
                f"{key} of the hub: {origin['repository']} at {origin['commit']}, licence "
                f"{origin['licence'] or 'not stated'}"
                for key, origin in facts["origins"].items()
            ),
            f"vocabulary   {spec['vocabulary']:,}, {facts['bytes_per_token']:.3f} bytes a token",
            f"starts with  {facts['sample']!r}",
            f"manifest     {facts['sha256']}",
            f"tokenizer    {facts['tokenizer_sha256']}",
        ]
    )


def _source_of_text(facts: dict[str, Any]) -> list[str]:
    corpus, spec = facts["corpus"], facts["spec"]
    python = f" of Python {facts['python']}" if facts["python"] else ""
    lines = [
        f"source       {spec['source']}{python}{' with site-packages' if spec['site_packages'] else ''}",
        f"corpus       {corpus['files']:,} files, {corpus['documents']:,} documents, {corpus['bytes']:,} bytes",
        f"dropped      {corpus['duplicates']:,} duplicates, {corpus['undecodable']:,} not UTF-8, "
        f"{corpus['empty']:,} empty"
        + "".join(f", {corpus[key]:,} {text}" for key, text in LEFT_OUT.items() if key in corpus),
        *([f"not read     {describe(facts['not_read'])}"] if facts["not_read"] else []),
    ]
    for split in SPLITS:
        counts = facts["splits"][split]
        lines.append(
            f"{split:12} {counts['tokens']:,} tokens, {counts['bytes']:,} bytes, "
            f"{counts['documents']:,} of {counts['distinct']:,} documents"
        )
    return lines


def _source_of_tokens(facts: dict[str, Any]) -> list[str]:
    """Tokens of another project: where they lie, what is held out, and how many documents end as ours do."""
    spec, corpus = facts["spec"], facts["corpus"]
    held_out = spec["validation_source"] or f"the last {spec['validation_tokens']:,} tokens of the source"
    lines = [
        f"source       {spec['source']}, {spec['pretokenized']}, read where it lies: {corpus['files']:,} files, "
        f"{corpus['bytes']:,} bytes used",
        f"held out     {held_out}",
    ]
    for split in SPLITS:
        counts = facts["splits"][split]
        lines.append(
            f"{split:12} {counts['tokens']:,} tokens, {counts['bytes']:,} bytes, {counts['documents']:,} documents, "
            f"{counts['ends_of_text']:,} ends of text"
        )
    return lines
