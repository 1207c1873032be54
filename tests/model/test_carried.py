import json

import pytest
import torch
from peft import PeftModel, get_peft_model

from peft_mask import MaskConfig, Masks, keep_scores
from peft_mask.model.carried import carry
from tests.tiny_models import tiny_model

FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def saved(folder, scores=False, **fields):
    model = get_peft_model(tiny_model("bert"), MaskConfig(task_type="SEQ_CLS", seed=0, init_weights=False, **fields))
    if scores:
        keep_scores(model)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("scores", [False, True])
def test_masks_with_the_head_carried_over_are_the_adapter_again(scores, tmp_path):
    model = saved(tmp_path / "a", scores)
    Masks.load(tmp_path / "a").save(tmp_path / "masks")
    assert carry(tmp_path / "a", tmp_path / "masks") == ["classifier.bias", "classifier.weight"]
    saved(tmp_path / "without")  # scores belong to the adapter's own masks, and stay behind
    assert (tmp_path / "masks" / FILE).read_bytes() == (tmp_path / "without" / FILE).read_bytes()
    made, own = (json.loads((tmp_path / name / CONFIG).read_text()) for name in ("masks", "without"))
    assert made == own
    loaded = PeftModel.from_pretrained(tiny_model("bert"), tmp_path / "masks")
    heads = [each.base_model.model.classifier.modules_to_save["default"].weight for each in (model, loaded)]
    assert torch.equal(*heads)


def test_a_head_is_checked_beside_masks_of_another_adapter(tmp_path):
    saved(tmp_path / "a")
    (~Masks.load(tmp_path / "a")).save(tmp_path / "masks")
    carry(tmp_path / "a", tmp_path / "masks")
    config = json.loads((tmp_path / "masks" / CONFIG).read_text())
    config["checksums"]["tensors"]["classifier.bias"] = "float32 00000000"
    (tmp_path / "masks" / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"cannot load 'classifier\.bias': it is not what was saved"):
        PeftModel.from_pretrained(tiny_model("bert"), tmp_path / "masks")


def test_where_nothing_stands_beside_the_masks_nothing_changes(tmp_path):
    masks = Masks({"layer": torch.tensor([[True, False]])})
    masks.save(tmp_path / "a")
    masks.save(tmp_path / "b")
    before = [(tmp_path / "b" / name).read_bytes() for name in (FILE, CONFIG)]
    assert carry(tmp_path / "a", tmp_path / "b") == []
    assert [(tmp_path / "b" / name).read_bytes() for name in (FILE, CONFIG)] == before
