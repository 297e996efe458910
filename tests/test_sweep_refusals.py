"""Sweep files: what each mistake says."""

from pathlib import Path

import pytest
from test_sweep import TEXT, write

from experiments.design.sweep import load_sweep

BAD = {
    "unknown key": (
        "seeds =",
        "sedes =",
        r"sweep.toml: unknown key 'sedes'; did you mean 'seeds'\? legal: name, ladder",
    ),
    "unknown arm": ('"lowrank-qkv"', '"lowrank-qvk"', r"arms: got 'lowrank-qvk'; did you mean 'lowrank-qkv'\?"),
    "unknown size": ('"110k"', '"100k"', r"sizes of ladder 'nano': got '100k'; did you mean '110k'\? legal: 25k"),
    "unknown ladder": ('"nano"', '"nanno"', r"ladder: got 'nanno'; did you mean 'nano'\? legal: paper, mini, nano"),
    "wrong type": ("seeds = [0, 1]", 'seeds = ["0"]', r"seeds\[0\]: got '0'; wanted a whole number"),
    "not an array": ("seeds = [0, 1]", "seeds = 3", r"seeds: got 3; wanted an array"),
    "boolean as a number": ("seeds = [0, 1]", "seeds = [true]", r"seeds\[0\]: got True; wanted a whole number"),
    "illegal choice": ('"flops"', '"flop"', r"match: got 'flop'; did you mean 'flops'\? legal: tokens, flops"),
    "unknown site": (
        '["v"]',
        '["gat"]',
        r"arm.mine at 25k: conv.sites: got 'gat'; did you mean 'gate'\? legal: mixer_input, q, k, v, o, ffn_input, ga",
    ),
    "sites without a kind": (
        'kind = "static", ',
        "",
        r"arm.mine.conv: missing key 'kind'; legal: none, static, headwise",
    ),
    "sites of none": (
        'kind = "static"',
        'kind = "none"',
        r"arm.mine.conv: 'sites' is no key of kind 'none', but of 'static' and 'headwise' and 'lowrank'; remove it or",
    ),
    "unknown kind": (
        '"static"',
        '"statik"',
        r"arm.mine.conv.kind: got 'statik'; did you mean 'static'\? legal: none, st",
    ),
    "no sites": (', sites = ["v"]', "", r"arm.mine.conv: missing key 'sites'; add it"),
    "empty sites": ('["v"]', "[]", r"arm.mine.conv: sites is empty; name some of the model's linear maps"),
    "site twice": ('["v"]', '["v", "v"]', r"arm.mine.conv: sites must name each linear map once; got \['v', 'v'\]"),
    "rank of static": (
        "width = 2",
        "rank = 2",
        r"arm.mine.conv: 'rank' is no key of kind 'static', but of 'lowrank'; rem",
    ),
    "head size of static": ("width = 2", "head_size = 8", r"'head_size' is no key of kind 'static', but of 'headwise'"),
    "filter of static": ("width = 2", "static_filter = false", r"'static_filter' is no key of kind 'static', but of "),
    "no such mixer": ('"attention"', '"atention"', r"arm.mine.mixer.kind: got 'atention'; did you mean 'attention'\?"),
    "a key of another part": (
        "kv_heads = 1",
        "hidden = 3",
        r"arm.mine.mixer: unknown key 'hidden'; legal: heads, kv_hea",
    ),
    "a schedule without its keys": (
        "[data]",
        '[train]\nschedule = { kind = "wsd" }\n[data]',
        r"train.schedule: missing key 'decay_fraction'; add it",
    ),
    "a rate of an arm below zero": (
        "[arm.mine]",
        "[arm.mine.train]\nlearning_rate = -1.0\n[arm.mine]",
        r"arm.mine.train: learning_rate must be above zero and finite; got -1.0; correct it",
    ),
    "a factor without an end": (
        "[data]",
        "[train]\nlearning_rate_factor = inf\n[data]",
        r"train: learning_rate_factor must be above zero and finite; got inf; correct it",
    ),
    "an axis without an end": (
        "[data]",
        "[vary]\nlearning_rate_factor = [1.0, inf]\n[data]",
        r"vary.learning_rate_factor must hold finite numbers above zero; got inf; correct it",
    ),
    "a weight decay without an end": (
        "[data]",
        "[train]\nweight_decay = inf\n[data]",
        r"train: weight_decay must be at least zero and finite; got inf; correct it",
    ),
    "an axis that is not the run's": (
        "[data]",
        "[vary]\nmicro_batch = [1, 2]\n[data]",
        r"vary: an axis must be a setting of the runs: got 'micro_batch'; .*legal: learning_rate, learning_rate_factor",
    ),
    "an axis that is set as well": (
        "[data]",
        "[vary]\nclip_norm = [1, 2]\n[arm.mine.train]\nclip_norm = 1\n[data]",
        r"clip_norm is in \[vary\] and in \[arm.mine.train\]; remove one of the two",
    ),
    "an axis of one value twice": (
        "[data]",
        "[vary]\nclip_norm = [1, 1.0]\n[data]",
        r"vary.clip_norm must list different",
    ),
    "an axis of fractions": (
        "[data]",
        "[vary]\nbatch_sequences = [1.5]\n[data]",
        r"vary.batch_sequences must hold whole",
    ),
    "budgets twice": (
        "[data]",
        "[vary]\ntokens_per_parameter = [1, 2]\n[data]",
        r"tokens_per_parameter is given twice",
    ),
    "no budget": (
        "tokens_per_parameter = 20\n",
        "",
        r"tokens_per_parameter is given nowhere; give a number, or a list",
    ),
    "arm left out": (
        "width = 2 }\n",
        'width = 2 }\n[arm.rest]\nmixer = { kind = "attention", kv_heads = 3 }\n',
        r"arm.rest at 25k: kv_heads must divide heads; got 3 and 2",
    ),
    "arm with a path": (
        "[arm.mine]",
        '[arm."../x/y"]\n[arm.mine]',
        r"arm must be letters, .*; got '../x/y'; rename it",
    ),
    "no name": ('name = "test"', 'name = ""', r"name must be letters, .*; got ''; rename it"),
    "infinitely many tokens": (
        "tokens_per_parameter = 20",
        "tokens_per_parameter = inf",
        r"at most 1e\+09; got inf",
    ),
    "too many tokens": ("tokens_per_parameter = 20", "tokens_per_parameter = 1e308", r"at most 1e\+09; got 1e\+308"),
    "not a number": ("tokens_per_parameter = 20", "tokens_per_parameter = nan", r"at most 1e\+09; got nan"),
    "validation without a sequence": (
        "validation_tokens = 65_536",
        "validation_tokens = 128",
        r"25k: data.validation_tokens must be above the sequence length, 128; got 128; raise it",
    ),
    "training without a sequence": (
        "train_tokens = 2_000_000",
        "train_tokens = 100",
        r"25k: data.train_tokens must be above the sequence length, 128; got 100; raise it",
    ),
    "baseline not an arm": ('baseline = "transformer"', 'baseline = "static-qkv"', r"baseline.*got 'static-qkv'"),
    "missing key": ('match = "flops"', "", r"missing key 'match'"),
    "nested unknown key": ("vocabulary", "vocabluary", r"data: unknown key 'vocabluary'; did you mean 'vocabulary'"),
    "too many epochs": ("train_tokens = 2_000_000", "train_tokens = 200_000", r"would read the data 10\.\d times"),
    "coarse matching": ("tokens_per_parameter = 20", "tokens_per_parameter = 1.2", r"match the baseline's only within"),
    "less than a batch": ("tokens_per_parameter = 20", "tokens_per_parameter = 0.01", r"one batch takes 8; raise it"),
    "negative": ("tokens_per_parameter = 20", "tokens_per_parameter = -1", r"must be above zero, .*; got -1"),
    "built-in redefined": ("[arm.mine]", "[arm.transformer]\n[arm.mine]", r"'transformer' is built in"),
    "heads that do not divide": ("kv_heads = 1", "kv_heads = 3", r"kv_heads must divide heads; got 3 and 2"),
    "name with a slash": ('name = "test"', 'name = "../test"', r"name must be letters, .*; got '../test'; rename it"),
    "not TOML": ("seeds = [0, 1]", "seeds = [0, 1", r"sweep.toml: not valid TOML"),
    "seed too large": (
        "seeds = [0, 1]",
        f"seeds = [{2**63}]",
        r"seeds must be 0 to 2\*\*63 - 1; got 9223372036854775808",
    ),
    "seed twice": ("seeds = [0, 1]", "seeds = [1, 1]", r"seeds must not list a value twice; got \[1, 1\]; remove"),
    "a weight of an average above one": (
        "[data]",
        '[train]\noptimizer = { kind = "adamw", beta1 = 1.5 }\n[data]',
        r"train.optimizer: beta1 must be at least 0 and below 1; got 1.5; correct it",
    ),
    "an epsilon that is not a number": (
        "[data]",
        '[train]\noptimizer = { kind = "muon", epsilon = nan }\n[data]',
        r"train.optimizer: epsilon must be at least 0 and finite; got nan; correct it",
    ),
    "a rate that overflows": (
        "[data]",
        "[train]\nlearning_rate = 1e308\nlearning_rate_factor = 1e10\n[data]",
        r"learning_rate times learning_rate_factor must be above zero and finite; got 1e\+308 times 1e\+10",
    ),
    "a base of RoPE": ("kv_heads = 1", "rope_theta = inf", r"arm.mine.mixer: rope_theta must be above zero and finite"),
    "a number beyond 64 bits": (
        "vocabulary = 512",
        f"vocabulary = 1{'0' * 400}",
        r"data.vocabulary: whole numbers must fit in 64 bits; got one of 401 digits",
    ),
    "a fraction beyond 64 bits": (
        "tokens_per_parameter = 20",
        f"tokens_per_parameter = 1{'0' * 400}",
        r"tokens_per_parameter: whole numbers must fit in 64 bits; got one of 401 digits",
    ),
    "a head size that does not divide": (
        "width = 2 }\n",
        'width = 2 }\n[arm.rest]\nconv = { kind = "headwise", sites = ["q"], head_size = 7 }\n',
        r"arm.rest at 25k: head_size must divide the 24 channels of 'q'; got 7; choose another",
    ),
    "more experts of a token than there are": (
        "width = 2 }\n",
        'width = 2 }\n[arm.rest]\nffn = { kind = "moe", experts = 4, top_k = 8 }\n',
        r"arm.rest.ffn: top_k must be 1 to the number of experts; got 8 of 4; lower it",
    ),
    "odd heads": ("kv_heads = 1", "heads = 8", r"even number of channels, .*; got 8 heads and width 24"),
    "two points that are one run": (
        "[data]",
        "[vary]\nwarmup_fraction = [0.1, 0.1001]\n[data]",
        r"transformer 25k: the points {'warmup_fraction': 0.1} and {'warmup_fraction': 0.1001} of \[vary\]",
    ),
    "a decay that begins in the warm-up": (
        "[data]",
        "[train]\nwarmup_fraction = 0.5\nschedule = { kind = 'wsd', decay_fraction = 0.9 }\n[data]",
        r"begins to decay after step 49, and the warm-up takes 245; lower warmup_fraction or decay_fraction",
    ),
    "the default spelt otherwise": (
        '"static", sites = ["v"], width = 2',
        '"lowrank", sites = ["v", "gate", "mixer_input"], generator_input = "part"',
        r"arm.mine at 25k: generator_input = \"part\" changes nothing at the sites v, gate, mixer_input, whose",
    ),
    "small vocabulary": ("vocabulary = 512", "vocabulary = 100", r"vocabulary must be at least 257"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_mistake_is_one_line_that_names_it(tmp_path: Path, name: str) -> None:
    before, after, message = BAD[name]
    assert before in TEXT
    path = write(tmp_path, TEXT.replace(before, after))
    with pytest.raises(ValueError, match=message) as caught:
        load_sweep(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing\.toml: no such file"):
        load_sweep(tmp_path / "nothing.toml")
    with pytest.raises(ValueError, match=r"a folder; give the path of a \.toml file in it"):
        load_sweep(tmp_path)


def test_a_file_that_cannot_be_read_is_named() -> None:
    with pytest.raises(ValueError, match=r"/proc/self/mem: must be readable; got Input/output error; give"):
        load_sweep(Path("/proc/self/mem"))
