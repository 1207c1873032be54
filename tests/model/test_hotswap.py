"""Hot-swapping: another adapter in the same tensors, also in a compiled model."""

import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from peft_mask import MaskConfig, Masks, hotswap_adapter
from peft_mask.layers.mask_layer import MaskLayer
from tests.tiny_models import tiny_inputs, tiny_model

HEAD = "base_model.model.classifier.weight"


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Three adapters of one model with heads of their own, and what they compute."""
    folders, logits = [], []
    for seed in range(3):
        folders.append(tmp_path_factory.mktemp(f"adapter{seed}"))
        config = MaskConfig(task_type="SEQ_CLS", target_sparsity=0.1, candidates=0.5, init_weights=False, seed=seed)
        torch.manual_seed(seed)
        model = get_peft_model(tiny_model("bert"), config).eval()
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "modules_to_save" in name:
                    p.normal_()
            logits.append(model(**tiny_inputs(model.get_base_model())).logits)
        model.save_pretrained(folders[-1])
    assert Masks.load(folders[0]) != Masks.load(folders[1]) != Masks.load(folders[2])
    return folders, logits


def addresses(model):
    return {name: t.data_ptr() for name, t in model.state_dict().items()}


def test_masks_and_head_are_exchanged_in_place(adapters):
    folders, logits = adapters
    model = PeftModel.from_pretrained(tiny_model("bert"), folders[0])
    inputs, before = tiny_inputs(model.get_base_model()), addresses(model)
    with torch.no_grad():
        for folder, expected in zip(folders[::-1], logits[::-1], strict=True):
            hotswap_adapter(model, folder, "default")
            assert torch.equal(model(**inputs).logits, expected)
            assert model.peft_config["default"].seed == folders.index(folder)
    assert addresses(model) == before
    model.merge_adapter()
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, logits[0])


@pytest.mark.filterwarnings("ignore")  # of torch.compile
def test_a_compiled_model_is_not_compiled_again(adapters):
    folders, logits = adapters
    model = PeftModel.from_pretrained(tiny_model("bert"), folders[0])
    inputs = tiny_inputs(model.get_base_model())
    torch._dynamo.reset()
    compilations = []

    def backend(graph, example_inputs):
        compilations.append(graph)
        return graph.forward

    compiled = torch.compile(model.base_model.model, fullgraph=True, backend=backend)
    with torch.no_grad():
        for folder, expected in zip(folders + folders[:1], logits + logits[:1], strict=True):
            hotswap_adapter(model, folder, "default")
            torch.testing.assert_close(compiled(**inputs).logits, expected)
    assert len(compilations) == 1


def refuse(model, folder, message, name="default"):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        hotswap_adapter(model, folder, name)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_what_cannot_be_exchanged_is_refused_and_nothing_changes(adapters, tmp_path):
    folders, _ = adapters
    model = PeftModel.from_pretrained(tiny_model("bert"), folders[0])
    refuse(model, folders[1], r"no mask named 'other' is loaded; loaded are \['default'\]", name="other")

    base = tiny_model("bert")
    fewer = get_peft_model(base, MaskConfig(task_type="SEQ_CLS", layers_to_transform=[0], target_sparsity=0.1))
    fewer.save_pretrained(tmp_path / "fewer")
    refuse(model, tmp_path / "fewer", "its file and the model do not mask the same layers")

    headless = get_peft_model(tiny_model("bert"), MaskConfig(target_sparsity=0.1, modules_to_save=[]))
    headless.save_pretrained(tmp_path / "headless")
    refuse(model, tmp_path / "headless", r"has trained \[\] beside its masks, the loaded one \['classifier', 'score'\]")

    get_peft_model(tiny_model("bert"), LoraConfig(task_type="SEQ_CLS")).save_pretrained(tmp_path / "lora")
    refuse(model, tmp_path / "lora", "is not a mask, but of type")

    for what, change in {
        r"expected the shape \(3, 32\), the file has \(2, 32\)": lambda t: t.update({HEAD: t[HEAD][:2].clone()}),
        r"expected the shape \(3, 32\), the file has nothing of that name": lambda t: t.pop(HEAD),
        r"cannot load 'classifier\S+weight': 96 of its 96 values are NaN": lambda t: t[HEAD].fill_(float("nan")),
    }.items():
        shutil.copytree(folders[1], tmp_path / "head", dirs_exist_ok=True)
        tensors = load_file(tmp_path / "head/adapter_model.safetensors")
        change(tensors)
        save_file(tensors, tmp_path / "head/adapter_model.safetensors", metadata={"format": "pt"})
        refuse(model, tmp_path / "head", what)

    model.merge_adapter()
    refuse(model, folders[1], "'default' is merged: call unmerge_adapter first")
    trained = get_peft_model(tiny_model("bert"), MaskConfig(task_type="SEQ_CLS"))
    refuse(trained, folders[1], "'default' is in training")
    assert any(isinstance(module, MaskLayer) for module in trained.modules())


def test_rows_of_other_tokens_are_not_exchanged(tmp_path):
    for name, tokens in (("one", [1, 2]), ("other", [7, 8])):
        config = MaskConfig(task_type="CAUSAL_LM", trainable_token_indices=tokens)
        get_peft_model(tiny_model("llama", "lm"), config).save_pretrained(tmp_path / name)
    model = PeftModel.from_pretrained(tiny_model("llama", "lm"), tmp_path / "one")
    refuse(model, tmp_path / "other", r"has trained the tokens \[7, 8\], the loaded one \[1, 2\]")
