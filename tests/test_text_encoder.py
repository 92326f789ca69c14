"""Laws of the text transformer: documents do not see each other, causality, windows, positions."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor
from torch.testing import assert_close

from pretrain.encoders.text import TextConfig, TextEncoder, positions

SHAPES = {
    "global": TextConfig(vocab_size=50, width=32, depth=3, heads=2, intermediate_size=48),
    "local": TextConfig(
        vocab_size=50, width=32, depth=4, heads=2, intermediate_size=48, global_every=3, local_attention=8
    ),
    "two bases": TextConfig(
        vocab_size=50,
        width=32,
        depth=2,
        heads=4,
        intermediate_size=48,
        global_every=2,
        local_rope_theta=100.0,
    ),
}
DOCUMENTS = torch.tensor([[0] * 7 + [1] * 12 + [2] * 5, [3] * 1 + [4] * 23])


def build(config: TextConfig) -> TextEncoder:
    torch.manual_seed(0)
    encoder = TextEncoder(config)
    for parameter in encoder.parameters():
        # Larger than at initialisation, so that a leak would show.
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
        else:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return encoder


@pytest.fixture(params=SHAPES)
def encoder(request: pytest.FixtureRequest) -> TextEncoder:
    return build(SHAPES[request.param])


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, 50, DOCUMENTS.shape, generator=torch.Generator().manual_seed(1))


def test_positions_restart_with_each_document() -> None:
    documents = torch.tensor([[0, 0, 0, 1, 1, 2], [5, 5, 5, 5, 5, 5], [0, 1, 2, 3, 4, -1]])
    expected = [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5], [0, 0, 0, 0, 0, 0]]
    assert positions(documents).tolist() == expected


@pytest.mark.parametrize("causal", [True, False])
def test_packed_documents_equal_documents_alone(encoder: TextEncoder, tokens: Tensor, causal: bool) -> None:
    packed = encoder(tokens, DOCUMENTS, causal)
    for row, document in [(0, 0), (0, 1), (0, 2), (1, 3), (1, 4)]:
        own = DOCUMENTS[row] == document
        alone = encoder(tokens[row, own][None], None, causal)[0]
        assert_close(packed[row, own], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_no_gradient_crosses_a_document(encoder: TextEncoder, tokens: Tensor, causal: bool) -> None:
    leaves: list[Tensor] = []

    def keep(_module: torch.nn.Module, _inputs: object, output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[-1]

    encoder.embeddings.register_forward_hook(keep)
    hidden = encoder(tokens, DOCUMENTS, causal)
    own = DOCUMENTS == 1
    hidden[own].sum().backward()
    size = leaves[0].grad.abs().sum(-1)  # type: ignore[union-attr]
    assert (size[~own] == 0).all()
    assert (size[own] > 0).all()


@pytest.mark.parametrize("documents", [None, DOCUMENTS])
def test_no_token_sees_a_later_one(encoder: TextEncoder, tokens: Tensor, documents: Tensor | None) -> None:
    before = encoder(tokens, documents, causal=True)
    changed = tokens.clone()
    changed[:, 12] = (changed[:, 12] + 1) % 50
    after = encoder(changed, documents, causal=True)
    assert torch.equal(before[:, :12], after[:, :12])
    assert not torch.isclose(before[:, 12], after[:, 12]).all()


@pytest.mark.parametrize("causal", [True, False])
def test_one_document_needs_no_numbers(encoder: TextEncoder, tokens: Tensor, causal: bool) -> None:
    assert_close(encoder(tokens, torch.zeros_like(tokens), causal), encoder(tokens, None, causal), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("causal", "seen"), [(True, range(9, 13)), (False, range(8, 17))])
def test_a_local_layer_sees_its_window(causal: bool, seen: range) -> None:
    encoder, leaves = build(SHAPES["local"].model_copy(update={"depth": 2, "global_every": 2})), []
    # The first layer is global: cut its attention off, so that only the second, local one moves anything.
    torch.nn.init.zeros_(encoder.layers[0].attn.Wo.weight)
    encoder.embeddings.register_forward_hook(
        lambda _m, _i, out: leaves.append(out.detach().requires_grad_()) or leaves[-1]
    )
    encoder(torch.zeros(1, 24, dtype=torch.long), None, causal)[0, 12].sum().backward()
    assert leaves[0].grad[0].abs().sum(-1).nonzero().flatten().tolist() == list(seen)


def test_parameter_names_are_modernberts() -> None:
    theirs = transformers.ModernBertModel(
        transformers.ModernBertConfig(
            vocab_size=50, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2,
        )
    )  # fmt: skip
    ours = build(SHAPES["global"])
    assert {n: p.shape for n, p in ours.state_dict().items()} == {n: p.shape for n, p in theirs.state_dict().items()}


@pytest.mark.parametrize("every", [1, 3])
def test_outputs_are_modernberts(tokens: Tensor, every: int) -> None:
    config = SHAPES["local"].model_copy(update={"global_every": every})
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    theirs = transformers.ModernBertModel(
        transformers.ModernBertConfig(
            vocab_size=50, hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=48,
            local_attention=8, global_attn_every_n_layers=every, attn_implementation="sdpa",
            global_rope_theta=config.rope_theta, local_rope_theta=config.rope_theta,
            rope_parameters={"full_attention": dict(rope), "sliding_attention": dict(rope)},
            pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2,
        )
    ).eval()  # fmt: skip
    ours = build(config)
    theirs.load_state_dict(ours.state_dict())
    expected = theirs(tokens, attention_mask=torch.ones_like(tokens)).last_hidden_state
    assert_close(ours(tokens, None, causal=False), expected, rtol=0, atol=1e-4)


def test_builds_on_the_meta_device() -> None:
    with torch.device("meta"):
        encoder = TextEncoder(SHAPES["local"])
        hidden = encoder(torch.zeros(2, 24, dtype=torch.long), torch.zeros(2, 24, dtype=torch.long))
    assert hidden.is_meta
    assert hidden.shape == (2, 24, 32)


def test_output_projections_start_small() -> None:
    torch.manual_seed(0)
    encoder = TextEncoder(TextConfig(vocab_size=100, width=128, depth=8, heads=2, intermediate_size=256))
    state = encoder.state_dict()
    wide, narrow = (state[f"layers.3.{name}.weight"].std() for name in ("attn.Wqkv", "mlp.Wo"))
    assert_close(wide / narrow, torch.tensor(4.0), rtol=0.03, atol=0)


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match=r"multiple of 2 \* heads"):
        TextConfig(width=36, heads=8)
