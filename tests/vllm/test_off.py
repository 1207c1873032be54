"""Adapters read for a base checkpoint: positions, and what is refused."""

import json
import shutil

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from peft_mask import MaskConfig, Masks
from peft_mask.vllm.checkpoint import Checkpoint
from peft_mask.vllm.off import read_off
from tests.tiny_models import tiny_model

FILE = "adapter_model.safetensors"


def base(seed=0):
    return tiny_model("llama", "lm", seed=seed)


def write(folder, seed=0, base_seed=0, **fields):
    settings = {"task_type": "CAUSAL_LM", "init_weights": False, "seed": seed, "target_sparsity": 0.1}
    get_peft_model(base(base_seed), MaskConfig(**settings | fields)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("off")
    base().save_pretrained(root / "base")
    write(root / "a")
    return root


@pytest.fixture(scope="module")
def checkpoint(folder):
    return Checkpoint(folder / "base")


def positions_of(masks):
    return {f"{name}.weight": (~masks[name]).flatten().nonzero().squeeze(1).tolist() for name in masks}


def as_lists(off):
    return {name: own.tolist() for name, own in off.positions.items()}


@pytest.mark.parametrize("portable", [True, False])
def test_positions_are_those_of_the_masks_in_checkpoint_coordinates(tmp_path, folder, checkpoint, portable):
    path = write(tmp_path / "a", portable=portable)
    off, masks = read_off(path, checkpoint), Masks.load(path, base=base())
    assert as_lists(off) == positions_of(masks)
    assert off.zeros == sum(masks.zeros.values()) > 0
    assert (off.adapter, off.digest == read_off(str(folder / "a"), checkpoint).digest) == (path, portable)


def test_masked_biases_are_found_by_the_name_they_have_in_the_checkpoint(tmp_path):
    model = nn.ModuleDict({"layer": nn.Linear(8, 4)})
    save_file(
        {"model.layer.weight": model["layer"].weight.data, "model.layer.bias": model["layer"].bias.data},
        tmp_path / "m.safetensors",
    )
    masks = {"layer": torch.rand(4, 8) > 0.5, "layer.bias_mask": torch.tensor([True, False, True, False])}
    Masks(masks).save(tmp_path / "a")
    found = as_lists(read_off(str(tmp_path / "a"), Checkpoint(tmp_path)))
    assert found["model.layer.bias"] == [1, 3]
    assert found["model.layer.weight"] == positions_of({"layer": masks["layer"]})["layer.weight"]


def test_embeddings_that_are_saved_beside_their_masks_are_no_obstacle_unless_they_are_others(tmp_path, checkpoint):
    path = write(tmp_path / "a", target_modules=["embed_tokens", "lm_head"])
    tensors = load_file(tmp_path / "a" / FILE)
    (beside, *_) = [name for name in tensors if not name.endswith("peft_mask_bits")]
    assert read_off(path, checkpoint).positions.keys() == {"model.embed_tokens.weight", "lm_head.weight"}
    tensors[beside] += 1
    save_file(tensors, tmp_path / "a" / FILE)
    with pytest.raises(ValueError, match=r"brings .* beside its masks"):
        read_off(path, checkpoint)


def damage(path):
    data = bytearray((path / FILE).read_bytes())
    data[-20] ^= 1
    (path / FILE).write_bytes(data)


def reword(path, **fields):
    said = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(said | fields))


def retensor(path, change):
    tensors = load_file(path / FILE)
    change(tensors)
    save_file(tensors, path / FILE)


def twice(tensors):
    (first, *_) = tensors
    tensors[first.replace("model.layers", "layers")] = tensors[first].clone()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (damage, "its checksum is wrong"),
        (lambda path: (path / FILE).write_bytes(b"no"), "is not a whole safetensors file"),
        (lambda path: (path / FILE).unlink(), "does not exist"),
        (lambda path: reword(path, peft_type="LORA"), "is not a mask, but of type LORA"),
        (lambda path: reword(path, record_bytes=[1, 2]), "holds other masks than the 2"),
        (lambda path: retensor(path, lambda all_: all_.update(head=torch.ones(2))), r"brings \['head'\] beside"),
        (lambda path: retensor(path, lambda all_: (all_.clear(), all_.update(x=torch.ones(1)))), "brings"),
        (lambda path: (retensor(path, twice), reword(path, record_bytes=None)), "two of its masks are for the weight"),
    ],
)
def test_what_is_no_whole_mask_is_refused(tmp_path, folder, checkpoint, spoil, reason):
    shutil.copytree(folder / "a", tmp_path / "a")
    spoil(tmp_path / "a")
    with pytest.raises(ValueError, match=reason):
        read_off(str(tmp_path / "a"), checkpoint)


@pytest.mark.parametrize("portable", [True, False])
def test_masks_of_another_base_are_refused(tmp_path, checkpoint, portable):
    with pytest.raises(ValueError, match=r"not the one it was trained on|coded against its base"):
        read_off(write(tmp_path / "a", base_seed=1, portable=portable), checkpoint)


def test_masks_of_another_shape_are_refused(tmp_path, checkpoint):
    Masks({"model.layers.0.self_attn.q_proj": torch.rand(3, 5) > 0.5}).save(tmp_path / "a")
    with pytest.raises(ValueError, match="its shape is 3x5"):
        read_off(str(tmp_path / "a"), checkpoint)


def test_a_mask_of_a_weight_that_is_not_there_names_it(tmp_path, checkpoint):
    Masks({"model.experts.gate_up_proj": torch.rand(3, 5) > 0.5}).save(tmp_path / "a")
    with pytest.raises(ValueError, match=r"has no weight 'model.experts.gate_up_proj.weight'"):
        read_off(str(tmp_path / "a"), checkpoint)


def test_a_name_that_may_be_of_several_weights_is_refused(tmp_path):
    save_file(
        {"text.layer.weight": torch.ones(2, 2), "image.layer.weight": torch.ones(2, 2)}, tmp_path / "m.safetensors"
    )
    with pytest.raises(ValueError, match=r"has several weights 'layer.weight'"):
        Checkpoint(tmp_path).weight_name("layer")


def test_a_checkpoint_of_several_files_is_read_by_its_index(folder, checkpoint, tmp_path):
    base().save_pretrained(tmp_path, max_shard_size="20kB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    several = Checkpoint(tmp_path)
    for name, weight in base().state_dict().items():
        assert torch.equal(several.weight(name), weight)
    assert as_lists(read_off(str(folder / "a"), several)) == as_lists(read_off(str(folder / "a"), checkpoint))


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("pytorch_model.bin", b"", "has no safetensors files"),
        ("model.safetensors", b"no", "cannot be read"),
        ("model.safetensors.index.json", b"{}", "cannot be read"),
    ],
)
def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path, file, content, reason):
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        Checkpoint(tmp_path)
