"""The encoders with a head."""

from pathlib import Path

import pytest
import torch
from transformers import DistilBertConfig, MPNetConfig, MPNetModel

from benchmarks.accuracy.model import model_class


def test_the_classifier_reads_the_mean_of_what_is_no_padding(tmp_path: Path) -> None:
    config = MPNetConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_labels=3
    )
    torch.manual_seed(0)
    MPNetModel(config).save_pretrained(tmp_path / "mpnet")
    model = model_class("SEQ_CLS", str(tmp_path / "mpnet")).from_pretrained(tmp_path / "mpnet", num_labels=3).eval()
    texts = torch.tensor([[0, 5, 6, 2], [0, 7, 2, 1]])  # 1 is padding
    kept = texts != 1
    states = model.mpnet(texts, attention_mask=kept).last_hidden_state
    means = torch.stack([states[0].mean(0), states[1, :3].mean(0)])
    outputs = model(texts, kept, torch.tensor([0, 2]))
    torch.testing.assert_close(outputs.logits, model.classifier(means))
    torch.testing.assert_close(outputs.loss, -outputs.logits.log_softmax(-1)[[0, 1], [0, 2]].mean())


def test_an_encoder_without_a_pooled_class_is_refused(tmp_path: Path) -> None:
    DistilBertConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="it is of type distilbert, pooled are bert, mpnet"):
        model_class("SEQ_CLS", str(tmp_path))
