"""Law: an export reloads in transformers with equal outputs, and comes back to us unchanged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from torch.testing import assert_close

from data.errors import UserError
from data.tokenizer import load, train
from pretrain.encoders.modernbert import export_files, from_modernbert, to_modernbert
from pretrain.encoders.text import TextConfig, TextEncoder
from pretrain.objectives.next_token import NextToken, NextTokenConfig

TEXT = "Colourless green ideas <|eos|> sleep furiously; naïve façade, 東京 🚂\n\tdef f(x): return x"
TOKENIZER = train([TEXT, Path(__file__).read_text()], 400)
SHAPES = {
    "global": TextConfig(width=48, depth=3, heads=3, intermediate_size=80, context=64, rope_theta=1000.0),
    "local": TextConfig(
        width=32, depth=5, heads=2, intermediate_size=40, context=96, global_every=2, local_attention=10
    ),
}


@pytest.fixture(params=SHAPES)
def objective(request: pytest.FixtureRequest) -> NextToken:
    torch.manual_seed(0)
    config = SHAPES[request.param].model_copy(update={"vocab_size": TOKENIZER.get_vocab_size()})
    objective = NextToken(TextEncoder(config), NextTokenConfig())
    for parameter in objective.parameters():
        # Every weight away from its start, biases and norms too, so that none can be lost unseen.
        torch.nn.init.normal_(parameter, mean=float(parameter.detach().mean()), std=0.2)
    return objective.eval()


@pytest.fixture
def folder(objective: NextToken, tmp_path: Path) -> Path:
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    export = tmp_path / "export"
    export.mkdir()
    for name, payload in export_files(
        objective.state_dict(), objective.encoder.config, tmp_path / "tokenizer.json", True
    ).items():
        (export / name).write_bytes(payload)
    return export


def test_logits_equal_in_transformers(objective: NextToken, folder: Path) -> None:
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="sdpa", output_loading_info=True
    )
    assert type(theirs).__name__ == "ModernBertDecoderForCausalLM"
    assert not [key for key in report["missing_keys"] if key != "decoder.weight"]
    assert not report["unexpected_keys"]
    tokens = torch.randint(3, TOKENIZER.get_vocab_size(), (3, 40))
    with torch.no_grad():
        ours, expected = objective.logits(tokens), theirs.eval()(tokens).logits
    assert_close(ours, expected, rtol=0, atol=1e-4)
    assert torch.equal(ours.argmax(-1), expected.argmax(-1))


def test_greedy_generation_with_their_cache_equals_ours(objective: NextToken, folder: Path) -> None:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    row = torch.tensor([[1, *TOKENIZER.encode("Colourless").ids]])
    generated = theirs.generate(row, max_new_tokens=30, do_sample=False, eos_token_id=None)
    for _ in range(30):
        row = torch.cat([row, objective.logits(row, last=1).argmax(-1)], dim=1)
    assert generated.tolist() == row.tolist()


def test_the_export_comes_back_exactly(objective: NextToken, folder: Path) -> None:
    config, causal, encoder, head = from_modernbert(folder)
    assert causal
    assert config == objective.encoder.config
    again = NextToken(TextEncoder(config), NextTokenConfig())
    again.encoder.load_state_dict(encoder)
    again.head.load_state_dict(head)
    for name, tensor in objective.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_what_transformers_saves_comes_back_too(objective: NextToken, folder: Path, tmp_path: Path) -> None:
    transformers.AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "again")
    if transformers.__version__.startswith("4."):
        pytest.skip("transformers 4.57 drops local_attention when it saves")
    config, _, encoder, _ = from_modernbert(tmp_path / "again")
    assert config == objective.encoder.config
    assert torch.equal(
        encoder["layers.1.attn.Wqkv.weight"], objective.state_dict()["encoder.layers.1.attn.Wqkv.weight"]
    )


def test_the_tokenizer_loads_and_encodes_alike(folder: Path) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = load(folder)
    assert theirs(TEXT)["input_ids"] == [1, *ours.encode(TEXT).ids]
    assert theirs.decode(ours.encode(TEXT).ids) == TEXT
    assert (theirs.pad_token_id, theirs.bos_token_id, theirs.eos_token_id, theirs.mask_token_id) == (
        0,
        1,
        2,
        3,
    )
    assert theirs.decode([1, *ours.encode("a b").ids, 2], skip_special_tokens=True) == "a b"
    padded = theirs(["a", TEXT], padding=True, return_tensors="pt")
    assert set(padded) == {"input_ids", "attention_mask"}
    assert padded["attention_mask"].sum() == 2 + 1 + len(ours.encode(TEXT).ids)


def test_padding_does_not_change_a_text(objective: NextToken, folder: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        padded = model(**tokenizer(["Colour", TEXT[:25]], padding=True, return_tensors="pt")).logits[0, -1]
        alone = objective.logits(torch.tensor([[1, *TOKENIZER.encode("Colour").ids]]))[0, -1]
    assert_close(padded, alone, rtol=0, atol=1e-4)


def test_all_special_ids_are_written(folder: Path) -> None:
    described = json.loads((folder / "config.json").read_text())
    ids = [described[f"{name}_token_id"] for name in ("pad", "bos", "eos", "cls", "sep")]
    assert ids == [0, 1, 2, 1, 2]


def test_two_rotary_bases_are_refused() -> None:
    config = SHAPES["local"].model_copy(update={"vocab_size": 300, "local_rope_theta": 500.0})
    objective = NextToken(TextEncoder(config), NextTokenConfig())
    special = {"pad": 0, "bos": 1, "eos": 2, "mask": 3}
    with pytest.raises(UserError, match=r"local_rope_theta 500\.0 differs"):
        to_modernbert(objective.state_dict(), config, special, True)


def test_unusable_folders_are_refused(folder: Path) -> None:
    described = json.loads((folder / "config.json").read_text())
    for change, message in [
        ({"model_type": "gpt2"}, "'gpt2' model"),
        ({"num_attention_heads": 5}, "multiple of 2"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "scales its rotary"),
        ({"layer_types": ["sliding_attention"] * described["num_hidden_layers"]}, "irregularly"),
    ]:
        (folder / "config.json").write_text(json.dumps(described | change))
        with pytest.raises(UserError, match=message):
            from_modernbert(folder)
    (folder / "config.json").write_text(json.dumps(described))
    (folder / "model.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match="is damaged"):
        from_modernbert(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no model\.safetensors"):
        from_modernbert(folder)


def test_a_larger_tokenizer_is_refused(tmp_path: Path) -> None:
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    config = SHAPES["global"].model_copy(update={"vocab_size": 300})
    with pytest.raises(UserError, match="400 tokens, the model 300"):
        export_files({}, config, tmp_path, True)
