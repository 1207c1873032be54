"""A base with its tokenizer and adapters of it, in folders as users have them, and what each adapter answers alone."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    pipeline,
)

from peft_mask import MaskConfig, MaskLayer
from peft_mask.server import ServerSettings
from tests.tiny_models import EOS, tiny_config, tiny_tokenizer

TEXTS = ["w5 w6 w7 w8", "w9 w40 w41 w42 w43 w44 w45", "w46", "w47 w48 w49 w50 w51 w52 w53 w54 w55"]
# no word begins with w0 to w3, which the tokenizer would find in it


@dataclass(frozen=True)
class Kind:
    """One task of a server, and the model it is made with."""

    name: str
    task_type: str
    family: str
    auto: type
    labels: tuple[int, ...]  # of each adapter; 0 where there are none


KINDS = {
    "classify": Kind("classify", "SEQ_CLS", "bert", AutoModelForSequenceClassification, (2, 5, 3)),
    "tag": Kind("tag", "TOKEN_CLS", "bert", AutoModelForTokenClassification, (3, 5, 5)),
    "embed": Kind("embed", "FEATURE_EXTRACTION", "bert", AutoModel, (0, 0, 0)),
    "generate": Kind("generate", "CAUSAL_LM", "llama", AutoModelForCausalLM, (0, 0, 0)),
}
NAMES = ("a", "b", "c")
TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]


class Place:
    """Folders of one kind."""

    def __init__(self, root: Path, kind: Kind, names=NAMES) -> None:
        self.kind, self.names = kind, names
        self.base, self.adapters = root / "base", root / "adapters"
        torch.manual_seed(0)
        config = tiny_config(kind.family)
        config.initializer_range = 0.3  # so that masks make a difference
        model = (kind.auto if kind.name == "generate" else AutoModel).from_config(config)  # heads are the adapters'
        for weight in model.parameters():
            if weight.dim() > 1:
                nn.init.normal_(weight, std=0.3)
        model.save_pretrained(self.base)
        tokenizer = tiny_tokenizer()
        tokenizer.model_max_length = 64
        tokenizer.save_pretrained(self.base)
        for number, name in enumerate(names):
            self.save(name, number)

    def labels(self, number):
        count = self.kind.labels[number % len(self.kind.labels)]
        if self.kind.name == "tag":
            return TAGS[:count]
        return [f"label {number}.{place}" for place in range(count)]

    def load(self, labels=0):
        return self.kind.auto.from_pretrained(self.base, **({"num_labels": labels} if labels else {}))

    def save(self, name, number, **fields):
        """Write an adapter with random masks and a random head."""
        torch.manual_seed(number + 1)
        labels = self.labels(number)
        settings = {"task_type": self.kind.task_type, "target_sparsity": 0.2, "candidates": None} | fields
        model = get_peft_model(self.load(len(labels)), MaskConfig(**settings))
        for module in model.modules():
            for own in [*getattr(module, "peft_mask_scores", {}).values()] if isinstance(module, MaskLayer) else ():
                nn.init.normal_(own)
            for own in module.modules_to_save.parameters() if isinstance(module, ModulesToSaveWrapper) else ():
                nn.init.normal_(own)
        model.save_pretrained(self.adapters / name)
        if labels:
            (self.adapters / name / "labels.json").write_text(json.dumps(labels))

    def settings(self, **fields):
        return replace(ServerSettings(base=str(self.base), adapters=str(self.adapters)), **fields)

    def alone(self, name, number):
        """Return what answers for one adapter by transformers alone, its mask merged: text -> answer."""
        labels = self.labels(number)
        model = PeftModel.from_pretrained(self.load(len(labels)), self.adapters / name).merge_and_unload().eval()
        if labels:
            model.config.id2label = dict(enumerate(labels))
        return _ALONE[self.kind.name](model, AutoTokenizer.from_pretrained(self.base))


def _classified(model, tokenizer):
    pipe = pipeline("text-classification", model=model, tokenizer=tokenizer, top_k=None)
    return lambda text: pipe(text)[0] if isinstance(pipe(text)[0], list) else pipe(text)


def _tagged(model, tokenizer):
    pipe = pipeline("token-classification", model=model, tokenizer=tokenizer, ignore_labels=[])
    return lambda text: [(each["start"], each["end"], each["entity"], float(each["score"])) for each in pipe(text)]


@torch.no_grad()
def _embedded(model, tokenizer):
    def embed(text):
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        return nn.functional.normalize(states.mean(0), dim=0).tolist()

    return embed


def _generated(model, tokenizer):
    def generate(text):
        inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
        ids = inputs.input_ids
        with torch.no_grad():
            tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=1)[
                0, ids.shape[1] :
            ].tolist()
        return tokenizer.decode([token for token in tokens if token != EOS], skip_special_tokens=True)

    return generate


_ALONE = {"classify": _classified, "tag": _tagged, "embed": _embedded, "generate": _generated}
