"""Multi-token prediction against equations 21 to 23, position by position."""

import pytest
import torch
from torch import Tensor

from whalefall.config.model import ModelConfig
from whalefall.model.attention import Context
from whalefall.model.block import Block
from whalefall.model.transformer import Transformer
from whalefall.ops.rms_norm import add_up

SEQ = 9
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def network(config: ModelConfig, depths: int) -> Transformer:
    """In float64, with norms that are not one, so that a missing or misplaced one shows."""
    changed = config.model_copy(update={"num_nextn_predict_layers": depths})
    model = Transformer.create(changed, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.uniform_(0.5, 1.5, generator=generator)
    return model


def tokens(batch: int = 2, seq: int = SEQ) -> Tensor:
    return torch.randint(128, (batch, seq), generator=torch.Generator().manual_seed(0))


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean() + 1e-6).sqrt() * weight


def by_equations(model: Transformer, row: Tensor) -> list[Tensor]:
    """Logits of every depth for one row; the block itself is tested in ``test_block.py``.

    h^0 and what a depth hands to the next are the representations the output head reads, behind
    their norms, and ``eh_proj`` is the checkpoint's: the embedding's half comes first.
    """
    embedding = model.model.embed_tokens.weight
    previous = model.hidden_states(row.unsqueeze(0), with_mtp=False).main[0]
    logits = []
    for k, module in enumerate(model.mtp_modules, start=1):
        joined = []
        for i in range(len(row) - k):
            emb = normed(embedding[row[i + k]], module.enorm.weight)
            joined.append(
                module.eh_proj.weight @ torch.cat([emb, normed(previous[i], module.hnorm.weight)])
            )  # eq. 21
        x = torch.stack(joined).unsqueeze(0)
        context = Context(model.rotation(torch.arange(len(joined)).unsqueeze(0)))
        h = add_up(*Block.forward(module, (x,), context)[0])[0]  # eq. 22
        previous = torch.stack([normed(x, module.shared_head.norm.weight) for x in h])
        logits.append(previous @ model.lm_head.weight.T)  # eq. 23: the main model's head
    return logits


@pytest.mark.parametrize("depths", [1, 2, 3])
def test_equals_the_equations(tiny_config: ModelConfig, depths: int) -> None:
    model = network(tiny_config, depths)
    rows = tokens()
    own = model(rows).mtp_logits
    assert [part.shape[1] for part in own] == [SEQ - k for k in range(1, depths + 1)]
    for index, row in enumerate(rows):
        for logits, expected in zip(own, by_equations(model, row), strict=True):
            torch.testing.assert_close(logits[index].double(), expected, **CLOSE)


def test_embedding_and_head_are_shared(tiny_config: ModelConfig) -> None:
    model = network(tiny_config, 2)
    own = {name.split(".")[0] for name, _ in model.mtp_modules[0].named_parameters()}
    assert own == {
        "enorm", "hnorm", "eh_proj", "shared_head",
        "input_layernorm", "self_attn", "post_attention_layernorm", "mlp",
    }  # fmt: skip
    shape = model.lm_head.weight.shape
    matrices = [name for name, p in model.named_parameters() if p.shape == shape]
    assert matrices == ["model.embed_tokens.weight", "lm_head.weight"]


@pytest.mark.parametrize("changed", [3, 5, SEQ - 1])
def test_depth_k_sees_k_tokens_more_and_no_further(tiny_config: ModelConfig, changed: int) -> None:
    model = network(tiny_config, 2)
    rows = tokens(1)
    other = rows.clone()
    other[:, changed] = (other[:, changed] + 1) % 128
    for k, (one, two) in enumerate(
        zip(model(rows).mtp_logits, model(other).mtp_logits, strict=True), start=1
    ):
        moved = (one - two).abs().amax(-1)[0]
        first = changed - k  # the position whose token i + k is the changed one
        assert (moved[:first] < 1e-9).all()
        assert moved[first] > 1e-5


@pytest.mark.parametrize("seq", [1, 2])
def test_a_row_shorter_than_a_depth_has_no_prediction_there(
    tiny_config: ModelConfig, seq: int
) -> None:
    output = network(tiny_config, 2)(tokens(2, seq))
    assert [tuple(part.shape) for part in output.mtp_logits] == [(2, seq - 1, 128), (2, 0, 128)]
    assert (output.expert_loads.sum(1) == torch.tensor([seq, seq, seq - 1, 0]) * 2 * 3).all()


@pytest.mark.parametrize("depths", [1, 2])
def test_lookahead_gives_every_depth_a_whole_row(tiny_config: ModelConfig, depths: int) -> None:
    """Rows of S + D tokens: the same states as the plain forward where both have them."""
    model = network(tiny_config, depths)
    rows = tokens(2, SEQ + depths)
    ahead = model.hidden_states(rows, lookahead=depths)
    plain = model.hidden_states(rows)
    assert ahead.main.shape[1] == SEQ
    torch.testing.assert_close(ahead.main, plain.main[:, :SEQ], **CLOSE)
    assert len(ahead.mtp) == depths
    for own, right in zip(ahead.mtp, plain.mtp, strict=True):
        assert own.shape[1] == SEQ
        torch.testing.assert_close(own, right[:, :SEQ], **CLOSE)
    assert all(routing.scores.shape[0] == 2 * SEQ for routing in ahead.routings)


def test_the_main_model_does_not_notice(tiny_config: ModelConfig) -> None:
    model = network(tiny_config, 1)
    rows = tokens()
    without = model.hidden_states(rows, with_mtp=False)
    assert without.mtp == [] and len(without.routings) == len(model.blocks) - 1  # one is dense
    assert torch.equal(without.main, model.hidden_states(rows).main)


def test_a_masked_document_is_as_if_alone(tiny_config: ModelConfig) -> None:
    """Up to the last k positions, whose token i + k lies in the next document."""
    model = network(tiny_config, 2)
    rows, lengths = tokens(1), [4, 5]
    documents = torch.repeat_interleave(torch.arange(2), torch.tensor(lengths)).unsqueeze(0)
    packed = model(rows, documents=documents).mtp_logits
    for start, alone in zip((0, 4), rows.split(lengths, 1), strict=True):
        for part, expected in zip(packed, model(alone).mtp_logits, strict=True):
            own = part[:, start : start + expected.shape[1]]
            torch.testing.assert_close(own, expected, **CLOSE)
