"""The model card: what an export is, and code that loads it."""

from __future__ import annotations

from typing import Any

from pretrain.encoders import resnet_cifar
from pretrain.encoders.vision import VisionConfig
from pretrain.recipe import Recipe

_IMAGES = """```python
import timm, torch
{imports}
encoder = timm.create_model("local-dir:.", pretrained=True).eval()   # "." is this folder
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(encoder))
features = encoder(torch.zeros(1, 3, {image_size}, {image_size}))
print(tuple(features.shape))   # (1, {features})
```

The same folder loads with `transformers.AutoModel.from_pretrained(".")`."""

_TEXT = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")   # "." is this folder
model = AutoModelForCausalLM.from_pretrained(".").eval()
prompt = tokenizer("The", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=20)[0]))
```"""

_MASKED = """```python
from transformers import AutoModelForMaskedLM, AutoTokenizer, pipeline

tokenizer = AutoTokenizer.from_pretrained(".")   # "." is this folder
model = AutoModelForMaskedLM.from_pretrained(".").eval()
for guess in pipeline("fill-mask", model=model, tokenizer=tokenizer)("The<|mask|> of"):
    print(guess["token_str"], round(guess["score"], 3))
```

`AutoModel.from_pretrained(".")` gives the encoder alone, `SentenceTransformer(".")` the mean of its vectors."""

_BARE = """```python
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")   # "." is this folder
model = AutoModel.from_pretrained(".").eval()
hidden = model(**tokenizer("The", return_tensors="pt")).last_hidden_state
print(tuple(hidden.shape))   # (1, tokens, {features})
```

`SentenceTransformer(".")` gives the mean of its vectors. No head predicts words."""


def model_card(recipe: Recipe, about: dict[str, Any]) -> str:
    """Markdown with front matter for a model hub; its code runs inside the export's folder."""
    images = about["kind"] == "images"
    if images:
        ours = isinstance(recipe.encoder, VisionConfig) and recipe.encoder.model in resnet_cifar.__all__
        imports = "import pretrain.encoders.resnet_cifar   # of headwater: tells timm of this model\n" if ours else ""
        code, library, task = _IMAGES.format(**about, imports=imports), "timm", "image-feature-extraction"
    elif about["objective"] == "replaced_token":
        code, library, task = _BARE.format(**about), "transformers", "feature-extraction"
    elif about["causal"]:
        code, library, task = _TEXT, "transformers", "text-generation"
    else:
        code, library, task = _MASKED, "transformers", "fill-mask"
    front = ["---", f"library_name: {library}", f"pipeline_tag: {task}", "---"]
    facts = [
        ("objective", about["objective"]),
        ("steps", f"{about['step']:,}"),
        ("samples seen", f"{about['samples']:,}"),
        ("samples in the dataset", f"{about['dataset']['size']:,}"),
        ("dataset fingerprint", f"`{about['dataset']['fingerprint'][:16]}`"),
        ("features", str(about["features"])),
    ]
    if images:
        facts.append(
            (
                "input",
                f"{about['image_size']} x {about['image_size']} RGB, mean {about['mean']}, std {about['std']}",
            )
        )
    table = "\n".join(["| | |", "|---|---|"] + [f"| {name} | {value} |" for name, value in facts])
    return "\n".join(front) + (
        f"\n\n# {recipe.name}\n\nPre-trained with headwater {about['headwater']}.\n\n{table}\n\n## Use\n\n{code}\n\n"
        "## Fine-tune, continue\n\n"
        "```bash\nheadwater finetune . TRAIN_DATA --test TEST_DATA --strategy full\n```\n\n"
        "`headwater/objective.safetensors` keeps the whole objective, heads included, and "
        "`headwater/golden.safetensors` a few inputs and outputs that are compared at load.\n"
    )
