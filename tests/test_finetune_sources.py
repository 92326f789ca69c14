"""Encoders that other libraries wrote: outputs equal theirs, saved ones reload, and unfit ones are refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerFast

from data.errors import UserError
from finetune.encoder import fresh, load_encoder
from finetune.run import finetune
from finetune.settings import Settings
from finetune.text_encoder import DocumentEncoder
from finetune.transformers_text import TransformersText

pytest_plugins = ["test_finetune_kit"]
WORDS = ["the", "film", "and", "a", "that", "was", "of", "it", "bad", "dull", "awful", "good", "fine", "great"]
SIZES = {
    "vocab_size": 24,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 20,
    "pad_token_id": 0,
}
TEXTS = ["the film was good", "it was a dull and awful film of that", "fine", "the " * 40]


def tokenizer(folder: Path, marks: bool) -> None:
    """Whole words; begin and end marks where the model is an encoder."""
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    if marks:
        special = [("[CLS]", 2), ("[SEP]", 3)]
        inner.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=special)
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]"} | (
        {"cls_token": "[CLS]", "sep_token": "[SEP]"} if marks else {}
    )
    PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=64, **names).save_pretrained(folder)


def write_transformers(folder: Path, kind: str) -> Path:
    """A small random model of transformers with a tokenizer."""
    import transformers

    config_name, model_name, extra = {
        "bert": ("BertConfig", "BertForMaskedLM", {}),
        "roberta": ("RobertaConfig", "RobertaModel", {}),
        "distilbert": (
            "DistilBertConfig",
            "DistilBertModel",
            {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48},
        ),
        "modernbert": ("ModernBertConfig", "ModernBertModel", {"attention_bias": True, "cls_token_id": 2}),
        "gpt2": ("GPT2Config", "GPT2LMHeadModel", {}),
        "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    }[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        config = getattr(transformers, config_name)(**SIZES, **extra)
        for name in ("bos_token_id", "eos_token_id", "sep_token_id"):
            setattr(config, name, 3)
        model = getattr(transformers, model_name)(config)
        model.save_pretrained(folder)
    tokenizer(folder, marks=kind not in ("gpt2", "llama"))
    return folder


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "modernbert", "gpt2", "llama"])
def test_features_are_those_of_transformers_itself(kind: str, tmp_path: Path) -> None:
    folder = write_transformers(tmp_path / kind, kind)
    encoder = load_encoder(folder).eval()
    assert isinstance(encoder, TransformersText)
    assert encoder.pooling == ("last" if kind in ("gpt2", "llama") else "mean")
    theirs, words = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    assert encoder.context == (19 if kind == "roberta" else 20)
    rows = encoder.tokenize(TEXTS)
    ids = torch.arange(len(rows))
    with torch.no_grad():
        pooled = encoder(encoder.batch(rows, ids, ids))
        for text, row, found in zip(TEXTS, rows, pooled, strict=True):
            expected = words(text, truncation=True, max_length=encoder.context, return_tensors="pt")
            assert row.tolist() == expected["input_ids"][0].tolist()
            hidden = theirs(input_ids=expected["input_ids"]).last_hidden_state[0]
            wanted = hidden[-1] if encoder.pooling == "last" else hidden.mean(dim=0)
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    untrained = fresh(encoder, 1)
    name = next(name for name, parameter in encoder.named_parameters() if parameter.ndim == 2)
    assert not torch.equal(dict(untrained.named_parameters())[name], dict(encoder.named_parameters())[name])
    depths, head = encoder.layers()
    assert {0, 1, 2} <= set(depths.values()) <= set(range(head))


def test_our_layout_stays_ours_and_saved_models_of_theirs_reload(
    text_export: Path, sentiment: tuple[Path, Path], tmp_path: Path
) -> None:
    assert type(load_encoder(text_export)) is DocumentEncoder
    folder = write_transformers(tmp_path / "bert", "bert")
    options = {"cpu": True, "min_steps": 60, "lr": 3e-3, "report": lambda _: None}
    results = finetune(folder, *sentiment, strategy="full", output=tmp_path / "model", **options)
    assert results["interval"][0] > 0.7
    from finetune.model import load_model
    from finetune.tasks import load_test

    one = load_model(tmp_path / "model")
    one.save(tmp_path / "again")
    two = load_model(tmp_path / "again")
    samples, _ = load_test(sentiment[1], one.encoder, one.classes)
    settings = Settings(cpu=True)
    assert torch.equal(one.probabilities(samples, settings), two.probabilities(samples, settings))
    assert (
        float((one.probabilities(samples, settings).argmax(1).numpy() == samples.labels).mean()) == results["accuracy"]
    )
    AutoModel.from_pretrained(tmp_path / "model" / "encoder")


def test_unfit_folders_of_transformers_are_one_sentence(tmp_path: Path) -> None:
    folder = write_transformers(tmp_path / "bert", "bert")
    config = json.loads((folder / "config.json").read_text())

    def refused(changed: dict, message: str) -> None:
        (folder / "config.json").write_text(json.dumps(config | changed))
        with pytest.raises(UserError, match=message):
            load_encoder(folder)

    refused({"num_hidden_layers": 3}, r"lack .*of the model's")
    refused({"hidden_size": 64}, "does not load as a text model")
    refused({"model_type": "of_my_own", "auto_map": {"AutoModel": "mine.Model"}}, "does not load as a text model")
    refused({"model_type": "vit", "image_size": 8}, "preprocessor_config.json")
    refused({"model_type": "t5", "is_encoder_decoder": True}, "encoder and decoder|no model of text|does not load")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="only safetensors"):
        load_encoder(folder)


def test_timm_by_name_untrained_equals_timm_and_saves(tmp_path: Path) -> None:
    encoder = load_encoder("untrained:test_vit").eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = timm.create_model("test_vit", num_classes=0).eval()
    view = torch.from_numpy(np.random.Generator(np.random.Philox(1)).normal(size=(2, 3, 160, 160))).float()
    with torch.no_grad():
        torch.testing.assert_close(encoder.pool(view), theirs(view))
        grid = encoder.tokens(view)
        assert grid.shape == (2, 10, 10, encoder.token_features)
        sequence = theirs.forward_features(view)
        torch.testing.assert_close(grid.flatten(1, 2), sequence[:, -100:])
    encoder.save(tmp_path / "saved")
    again = load_encoder(tmp_path / "saved").eval()
    with torch.no_grad():
        torch.testing.assert_close(again.pool(view), theirs(view))


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_mambaout", "test_vit2"])
def test_grids_of_other_architectures(name: str) -> None:
    encoder = load_encoder(f"untrained:{name}").eval()
    size = encoder.image_size
    with torch.no_grad():
        view = torch.zeros(1, 3, size, size)
        grid, pooled = encoder.tokens(view), encoder.pool(view)
    assert grid.ndim == 4
    assert grid.shape[0] == 1
    assert grid.shape[1] == grid.shape[2] < size
    assert grid.shape[3] == encoder.token_features
    assert pooled.shape == (1, encoder.features)


def test_names_that_lead_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="did you mean resnet18"):
        load_encoder("resnet118")

    def offline(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("timm.create_model", offline)
    with pytest.raises(UserError, match=r"could not be had \(no route to host\)"):
        load_encoder("resnet26")
