"""Exported models given batches as those who fine-tune them make: padded, packed, recomputed, continued."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_export import EXPORTED
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorWithFlattening
from transformers.models.qwen3.modeling_qwen3 import Qwen3ForCausalLM
from transformers.utils.generic import find_labels

from experiments.evaluation.export import export
from experiments.evaluation.load import TrainedRun, load_run

NAMES = (
    "none",
    "static, no residual",
    "lowrank everywhere",
    "part input",
    "gated deltanet, headwise",
    "mamba2, lowrank",
    "experts",
)
TEXTS = ([5, 6, 7, 8, 9, 10, 11], [40, 41, 42], [77, 7, 70, 1, 17, 2])
Exported = tuple[TrainedRun, Any]
CACHE = "cache" if "cache" in inspect.signature(Qwen3ForCausalLM.forward).parameters else "past_key_values"


@pytest.fixture(scope="module", params=NAMES)
def exported(request: pytest.FixtureRequest, finished: Callable[..., Path], tmp_path_factory: Any) -> Exported:
    """A trained run, and its exported model as transformers loads it."""
    return _exported(request.param, finished, tmp_path_factory.mktemp("exported") / "model")


@pytest.fixture(scope="module")
def convolved(finished: Callable[..., Path], tmp_path_factory: Any) -> Any:
    return _exported("lowrank everywhere", finished, tmp_path_factory.mktemp("exported") / "model")[1]


def _exported(name: str, finished: Callable[..., Path], folder: Path) -> Exported:
    run = load_run(finished(**EXPORTED[name]))
    with torch.no_grad():  # away from special initial values
        generator = torch.Generator().manual_seed(0)
        for parameter in run.model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    export(run, folder)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).double()
    return run._replace(model=run.model.double()), model


def close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    assert (got - wanted).detach().norm() < 1e-5 * wanted.detach().norm()  # norms are in float32: measured up to 9.6e-7


def flattened() -> dict[str, Any]:
    return dict(DataCollatorWithFlattening(return_tensors="pt")([{"input_ids": text} for text in TEXTS]))


@pytest.mark.parametrize("training", [True, False])
def test_flattened_documents_are_as_each_by_itself(exported: Exported, training: bool) -> None:
    """As the batches of transformers' collator, which have no mask; with and without a cache by default."""
    run, model = exported
    model.train(training)
    batch = flattened()
    assert "attention_mask" not in batch
    output = model(**batch)
    apart = [model(torch.tensor([text])).logits[0] for text in TEXTS]
    close(output.logits[0], torch.cat(apart))
    losses = [F.cross_entropy(y[:-1], torch.tensor(t[1:]), reduction="sum") for y, t in zip(apart, TEXTS, strict=True)]
    close(output.loss, sum(losses) / sum(len(text) - 1 for text in TEXTS))
    starts = torch.tensor([[0, len(TEXTS[0]), len(TEXTS[0]) + len(TEXTS[1])]])
    close(output.logits, run.model(batch["input_ids"], starts=starts).logits)


def test_each_row_may_hold_documents_of_its_own(exported: Exported) -> None:
    _, model = exported
    rows, lengths = torch.randint(300, (2, 9), generator=torch.Generator().manual_seed(3)), ((4, 5), (9,))
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    logits = model(rows, position_ids=positions).logits
    for row, own in enumerate(lengths):
        apart = [model(document[None]).logits[0] for document in rows[row].split(own)]
        close(logits[row], torch.cat(apart))


def test_padding_on_either_side_is_as_no_text(exported: Exported) -> None:
    _, model = exported
    first, second = torch.tensor([TEXTS[0]]), torch.tensor([TEXTS[1]])
    for left in (True, False):
        more = (4, 0) if left else (0, 4)
        tokens = torch.cat([first, F.pad(second, more)])
        mask = torch.cat([torch.ones_like(first), F.pad(torch.ones_like(second), more)])
        positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)  # which restart, but only at the padding
        for options in ({}, {"position_ids": positions}, {"attention_mask": mask.bool()}):
            logits = model(tokens, **{"attention_mask": mask, **options}).logits
            close(logits[:1], model(first).logits)
            close(logits[1:, 4:] if left else logits[1:, :3], model(second).logits)


def test_the_loss_of_padded_rows_is_that_of_their_texts(exported: Exported) -> None:
    """The first token of a row has no target before it on either side, not even at the padding."""
    _, model = exported
    losses = [model(torch.tensor([text]), labels=torch.tensor([text])).loss * (len(text) - 1) for text in TEXTS]
    wanted = sum(losses) / sum(len(text) - 1 for text in TEXTS)
    longest = max(map(len, TEXTS))
    for left in (True, False):
        more = [(longest - len(text), 0) if left else (0, longest - len(text)) for text in TEXTS]
        rows = torch.stack([F.pad(torch.tensor(t), m, value=3) for t, m in zip(TEXTS, more, strict=True)])
        mask = torch.stack([F.pad(torch.ones(len(t), dtype=int), m) for t, m in zip(TEXTS, more, strict=True)])
        labels = rows.masked_fill(mask == 0, -100)
        close(model(rows, attention_mask=mask, labels=labels).loss, wanted)
        close(model(rows, mask, None, None, None, labels).loss, wanted)


def test_positions_that_begin_above_zero_go_on_after_a_cache_and_are_as_zero_without_one(exported: Exported) -> None:
    _, model = exported
    tokens = torch.tensor([TEXTS[0]])
    wanted = model(tokens).logits
    close(model(tokens, position_ids=torch.arange(30, 37)[None]).logits, wanted)
    output = model(tokens[:, :3], use_cache=True)
    for start, end in ((3, 4), (4, 7)):
        cache, positions = output[CACHE], torch.arange(start, end)[None]
        output = model(tokens[:, start:end], position_ids=positions, use_cache=True, **{CACHE: cache})
        close(output.logits, wanted[:, start:end])


def gradients(model: Any, *batches: dict[str, Any]) -> torch.Tensor:
    """Of the sum of the batches' losses, whose backward passes come after all forward passes."""
    model.zero_grad()
    sum(model(**batch).loss for batch in batches).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_.*able. is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_with_checkpointing_are_those_without(exported: Exported, reentrant: bool) -> None:
    """Each layer is computed again with the padding and the documents that it was given, not with the last ones."""
    _, model = exported
    model.train()
    tokens = torch.randint(300, (2, 8), generator=torch.Generator().manual_seed(4))
    padded = []
    for most in (3, 6):
        mask = (torch.arange(8) >= torch.tensor([[0], [most]])).long()
        padded.append({"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)})
    whole = {"input_ids": tokens, "labels": tokens}
    batches = (*padded, flattened(), whole)
    wanted = sum(gradients(model, batch) for batch in batches)
    options = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    model.gradient_checkpointing_enable(**options)
    model.get_input_embeddings().requires_grad_(True)
    try:
        got = gradients(model, *batches)
    finally:
        model.gradient_checkpointing_disable()
    assert (got - wanted).norm() / wanted.norm() < 1e-5


ONES = torch.ones(1, 6, dtype=torch.long)
RESTARTED = torch.tensor([[0, 1, 2, 0, 1, 2]])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"position_ids": RESTARTED, "attention_mask": ONES}, "which attention_mask does not tell apart; leave atten"),
        ({"position_ids": RESTARTED, "use_cache": True}, "which one cache cannot continue; pass use_cache=False"),
        ({"attention_mask": torch.tensor([[1, 1, 0, 0, 1, 1]])}, "must have its zeros at the ends of a row"),
        ({"attention_mask": torch.ones(1, 1, 6, 6)}, r"must be \[B, tokens\].*got 4 dimensions; for packed documents"),
        ({"attention_mask": {"full_attention": ONES}}, "got a dict"),
        (
            {"attention_mask": torch.ones(1, 9)},
            r"must be \[B, tokens\], here \[1, 6\] with those in the cache; got \[1, 9",
        ),
        (
            {"attention_mask": torch.tensor([[1, 1, 1, 2, 2, 2]])},
            "must be 1 at tokens and 0 at padding; got 2; for packed documents give position_ids that restart",
        ),
        ({"attention_mask": torch.tensor([[0, 0.5, 1, 1, 1, 1]])}, "got 0.5"),
        ({"attention_mask": torch.tensor([[-1, 1, 1, 1, 1, 1]])}, "got -1"),
        ({"attention_mask": torch.tensor([[float("nan"), 1, 1, 1, 1, 1]])}, "got nan"),
        ({"attention_mask": torch.ones(1, 5)}, r"got \[1, 5\]; give each token one"),
        ({"attention_mask": torch.ones(2, 6)}, r"got \[2, 6\]; give each token one"),
        ({"position_ids": torch.arange(6)}, r"position_ids must be \[B, T\], here \[1, 6\]; got \[6\]; give each"),
        ({"position_ids": torch.arange(5)[None]}, r"here \[1, 6\]; got \[1, 5\]; give each token one"),
        ({"seq_idx": RESTARTED}, "seq_idx says where documents begin; give position_ids that restart there"),
    ],
)
def test_rows_that_only_attention_would_tell_apart_are_refused(
    arguments: dict[str, Any], said: str, convolved: Any
) -> None:
    with pytest.raises(ValueError, match=said):
        convolved.eval()(torch.arange(6)[None], **arguments)


def test_a_mask_that_is_not_read_scales_nothing(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    """While torch.compile traces, no value can be refused: as attention does, all take what is not zero as a token."""
    _, model = exported
    tokens, mask = torch.tensor([TEXTS[0]]), torch.tensor([[0, 0, 1, 1, 1, 1, 1]])
    wanted = model.eval()(tokens, attention_mask=mask, use_cache=False).logits
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    close(model(tokens, attention_mask=3 * mask, use_cache=False).logits[:, 2:], wanted[:, 2:])


@pytest.mark.parametrize("shape", [(1, 0), (0, 6)])
def test_an_input_without_tokens_is_refused(exported: Exported, shape: tuple[int, int]) -> None:
    tokens = torch.empty(shape, dtype=torch.long)
    said = rf"the input \[B, T\] must have tokens; got \[{shape[0]}, {shape[1]}\]"
    for given in ({"input_ids": tokens}, {"inputs_embeds": torch.empty(*shape, 16)}):
        with pytest.raises(ValueError, match=said):
            exported[1](**given)


def test_documents_and_padding_that_a_cache_cannot_continue_are_refused(convolved: Any) -> None:
    tokens = torch.arange(6)[None]
    cache = convolved.eval()(tokens, use_cache=True)[CACHE]
    with pytest.raises(ValueError, match="which a cache does not tell apart; leave a cache out"):
        convolved(tokens, position_ids=RESTARTED, **{CACHE: cache})
    with pytest.raises(ValueError, match=r"here \[1, 12\] with those in the cache; got \[1, 6\]"):
        convolved(tokens, attention_mask=ONES, **{CACHE: cache})
    padded = torch.tensor([[1, 1, 1, 1, 0, 0]])
    with pytest.raises(ValueError, match="to generate, pad on the left"):
        convolved.generate(tokens, attention_mask=padded, max_new_tokens=2, eos_token_id=None, pad_token_id=0)


@pytest.mark.parametrize("masked", [False, True])
def test_positions_that_do_not_go_on_after_the_cache_are_refused(exported: Exported, masked: bool) -> None:
    """They are of another text than the cached one, or would leave a gap: also where the cache's own began above 0."""
    _, model = exported
    first, more = torch.tensor([TEXTS[0]] * 2), torch.tensor([TEXTS[2][:5]] * 2)
    options = {"attention_mask": torch.ones(2, 12)} if masked else {}
    for begin, start in ((0, 0), (0, 6), (0, 8), (30, 7)):
        cache = model.eval()(first, position_ids=torch.arange(begin, begin + 7)[None], use_cache=True)[CACHE]
        positions = torch.stack([torch.arange(begin + 7, begin + 12), torch.arange(start, start + 5)])
        said = rf"must go on after the cached tokens, here at {begin + 7}; got {start} in row 1; give those that follow"
        with pytest.raises(ValueError, match=said):
            model(more, position_ids=positions, **options, **{CACHE: cache})


def test_positions_go_on_in_each_row_after_its_own_padding(exported: Exported) -> None:
    """In chunks as generate's prefill_chunk_size makes, the first of which is padding alone in the second row."""
    _, model = exported
    first, second = torch.tensor([TEXTS[0]]), torch.tensor([TEXTS[1]])
    tokens, mask = torch.cat([first, F.pad(second, (4, 0))]), torch.ones(2, 7)
    mask[1, :4] = 0
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 0).long()
    cache, logits = None, []
    for start, end in ((0, 3), (3, 5), (5, 6)):
        given = {"attention_mask": mask[:, :end], "position_ids": positions[:, start:end], CACHE: cache}
        output = model.eval()(tokens[:, start:end], use_cache=True, **given)
        cache = output[CACHE]
        logits.append(output.logits)
    for _ in range(2):  # a cache that was refused remains as it was
        with pytest.raises(ValueError, match="here at 2; got 6 in row 1"):  # as without position_ids
            model(tokens[:, 6:], attention_mask=mask, **{CACHE: cache})
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([0, 2, 3]))
    rows = torch.tensor([0, 1, 1])
    given = {"attention_mask": mask[rows], "position_ids": positions[rows, 6:], CACHE: cache}
    last = model(tokens[rows, 6:], **given).logits
    close(torch.cat([*logits, last[:2]], 1)[0], model(first).logits[0])
    close(torch.cat([*logits, last[:2]], 1)[1, 4:], model(second).logits[0])
    close(last[2], last[1])


@pytest.mark.parametrize("beams", [1, 3])
def test_a_prompt_in_chunks_is_as_a_whole_one(convolved: Any, beams: int) -> None:
    tokens = torch.tensor([TEXTS[0], [0, 0, 0, 0, *TEXTS[1]]])
    settings = {"max_new_tokens": 5, "num_beams": beams, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    settings["attention_mask"] = torch.tensor([[1] * 7, [0] * 4 + [1] * 3])
    whole = convolved.eval().generate(tokens, **settings)
    assert torch.equal(convolved.generate(tokens, prefill_chunk_size=3, **settings), whole)


def test_packed_rows_that_an_attention_would_mix_are_refused(convolved: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashAttention in transformers reads position_ids only of a single row."""
    monkeypatch.setattr(convolved.config, "_attn_implementation_internal", "flash_attention_2")
    with pytest.raises(ValueError, match="flash_attention_2 tells packed documents apart in batches of one row alone"):
        convolved(torch.arange(12).view(2, 6), position_ids=RESTARTED)


def test_trainers_find_the_labels_and_the_tokenizer_pads_for_generation(
    convolved: Any, finished: Callable[..., Path], tmp_path: Path
) -> None:
    """transformers' Trainer reads the arguments of `forward`: without labels among them it evaluates no loss."""
    assert find_labels(type(convolved)) == ["labels"]
    export(load_run(finished()), tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model", trust_remote_code=True)
    assert tokenizer(["x = 1\n", "x"], padding=True)["attention_mask"][1][0] == 0
