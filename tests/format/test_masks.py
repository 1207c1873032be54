"""`Masks`: a mapping, an algebra and a file, without a model."""

import itertools
import math
import shutil
import struct
import zlib
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from peft_mask import MaskConfig, Masks
from tests.golden.make import MASKS, adapter
from tests.tiny_models import tiny_model

GOLDEN = Path(__file__).parents[1] / "golden" / "adapter"
FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"
SHAPES = {"narrow": (3, 5), "wide": (2, 17), "vector": (9,), "deep": (2, 3, 4), "none": (0, 3)}


def masks(sparsity=0.5):
    return Masks({name: torch.rand(shape) >= sparsity for name, shape in SHAPES.items()})


def everywhere(value):
    return Masks({name: torch.full(shape, value) for name, shape in SHAPES.items()})


def trained(tmp_path, name, seed, base_seed=0, **fields):
    """Path of the adapter of a small base model, saved by PEFT."""
    torch.manual_seed(seed)
    config = MaskConfig(target_modules=["0", "2"], binarizer="threshold", candidates=None, init_weights=False, **fields)
    get_peft_model(base(base_seed), config).save_pretrained(tmp_path / name)
    return tmp_path / name


def base(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 5))


# ---- a mapping ----


def test_it_maps_names_to_the_masks_it_was_given():
    given = {name: torch.rand(shape) < 0.5 for name, shape in SHAPES.items()}
    value = Masks(given)
    assert list(value) == list(given)
    assert len(value) == 5
    assert all(torch.equal(value[name], mask) for name, mask in given.items())
    with pytest.raises(KeyError, match="other"):
        value["other"]


def test_nothing_done_to_a_mask_changes_the_value():
    given = torch.ones(3, 3, dtype=torch.bool)
    value = Masks({"layer": given})
    given.zero_()
    value["layer"].zero_()
    assert value["layer"].all()


@pytest.mark.parametrize("mask", [torch.ones(2, 2), torch.ones(2, 2, dtype=torch.uint8), torch.tensor(True)], ids=str)
def test_what_is_no_mask_is_refused(mask):
    with pytest.raises(ValueError, match="mask of 'layer' must be a bool tensor of at least one dimension, got torch"):
        Masks({"layer": mask})


def test_repr_tells_size_and_sparsity():
    off = torch.arange(2000).view(40, 50) % 50 == 0
    assert repr(Masks({"a": ~off, "b": ~off})) == "Masks(2 masks of 4,000 weights, sparsity 2.00%)"


# ---- an algebra ----


def test_operations_are_those_of_the_masks():
    a, b = masks(), masks()
    for name in SHAPES:
        assert torch.equal((a & b)[name], a[name] & b[name])
        assert torch.equal((a | b)[name], a[name] | b[name])
        assert torch.equal((a ^ b)[name], a[name] ^ b[name])
        assert torch.equal((~a)[name], ~a[name])


@pytest.mark.parametrize(("p", "q", "r"), [*itertools.product((0.1, 0.5), repeat=3)])
def test_the_laws_of_sets_hold(p, q, r):
    a, b, c = masks(p), masks(q), masks(r)
    ones, zeros = everywhere(True), everywhere(False)
    assert a & b == b & a
    assert a | b == b | a
    assert (a & b) & c == a & (b & c)
    assert a & (b | c) == (a & b) | (a & c)
    assert ~(a & b) == ~a | ~b
    assert ~~a == a
    assert a ^ b == (a | b) & ~(a & b)
    assert a & ones == a | zeros == a ^ zeros == a
    assert a ^ a == a & ~a == ~ones == zeros


def test_equality_needs_the_same_modules_shapes_and_masks():
    a = masks()
    assert a == Masks(dict(a))
    assert a != ~a
    assert a != Masks({name: a[name] for name in list(a)[1:]})
    assert a != dict(a)
    assert Masks({"x": torch.ones(2, 8, dtype=torch.bool)}) != Masks({"x": torch.ones(2, 2, 4, dtype=torch.bool)})


def test_a_function_makes_other_masks_of_the_same_weights(tmp_path):
    value = Masks.load(trained(tmp_path, "a", seed=1))
    flipped = value.map(lambda name, mask: mask.flip(0) if name == "0" else mask)
    assert torch.equal(flipped["0"], value["0"].flip(0))
    assert torch.equal(flipped["2"], value["2"])
    with pytest.raises(ValueError, match="different base weights"):  # it knows its base as the first did
        flipped & Masks.load(trained(tmp_path, "b", seed=1, base_seed=7))
    for wrong in (lambda name, mask: mask.float(), lambda name, mask: mask.T):
        with pytest.raises(ValueError, match=r"the new mask of '0' must be a bool tensor of shape \(20, 12\)"):
            value.map(wrong)


def test_operands_of_different_modules_are_refused_with_both_differences():
    a, b = masks(), masks()
    left = Masks({"only.a": a["wide"], "both": a["wide"]})
    right = Masks({"both": b["wide"], "only.b": b["wide"]})
    with pytest.raises(ValueError, match=r"(?s)only on the left: \['only.a'\].*only on the right: \['only.b'\]"):
        left & right
    with pytest.raises(ValueError, match=r"(?s)only on the left: \['only.a'\].*only on the right: none"):
        left | Masks({"both": a["wide"]})


def test_operands_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match=r"cannot combine the masks of 'x': their shapes are \(2, 3\) and \(3, 2\)"):
        Masks({"x": torch.ones(2, 3, dtype=torch.bool)}) ^ Masks({"x": torch.ones(3, 2, dtype=torch.bool)})


def test_something_else_than_masks_is_no_operand():
    with pytest.raises(TypeError, match="unsupported operand"):
        masks() & {}  # type: ignore[operator]


# ---- measures ----


def test_sparsity_is_the_fraction_that_is_off():
    value = Masks({"a": torch.tensor([[True, False, False, True]]), "b": torch.ones(4, 3, dtype=torch.bool)})
    assert value.sparsity == 2 / 16
    assert value.sparsities == {"a": 0.5, "b": 0.0}
    assert value.weights == 16
    assert value.entropy == 4 / 16


def test_zeros_are_counted_in_each_mask():
    value = masks()
    assert value.zeros == {name: int((~mask).sum()) for name, mask in value.items()}


def test_measures_of_no_weights_are_zero():
    for value in (Masks({}), Masks({"none": torch.ones(0, 3, dtype=torch.bool)})):
        assert value.weights == value.sparsity == value.entropy == 0


@pytest.mark.parametrize("sparsity", [0.01, 0.03, 0.2])
def test_bits_per_weight_are_close_to_the_entropy(sparsity):
    value = Masks({name: torch.rand(600, 700) >= sparsity for name in "ab"})
    p = value.sparsity
    assert math.isclose(value.entropy, -p * math.log2(p) - (1 - p) * math.log2(1 - p), rel_tol=1e-3)
    assert value.entropy < value.bits_per_weight < 1.03 * value.entropy


def test_bits_per_weight_are_those_of_the_file(tmp_path):
    value = masks()
    value.save(tmp_path)
    records = sum(tensor.numel() for tensor in load_file(tmp_path / FILE).values())
    assert value.bits_per_weight == 8 * records / value.weights


# ---- files ----


def test_loading_restores_what_was_saved(tmp_path):
    value = masks()
    value.save(tmp_path / "new" / "folder")
    assert Masks.load(tmp_path / "new" / "folder") == value
    assert Masks.load(str(tmp_path / "new" / "folder" / FILE)) == value
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == [CONFIG, FILE]


def test_the_golden_adapter_is_read_and_written_to_the_byte(tmp_path):
    assert adapter() == Masks.load(GOLDEN)
    assert all(torch.equal(mask, MASKS[name.removeprefix("encoder.")]) for name, mask in Masks.load(GOLDEN).items())
    adapter().save(tmp_path / "made")
    Masks.load(GOLDEN).save(tmp_path / "loaded")
    for name in (FILE, CONFIG):
        golden = (GOLDEN / name).read_bytes()
        assert (tmp_path / "made" / name).read_bytes() == golden
        assert (tmp_path / "loaded" / name).read_bytes() == golden


def test_it_loads_the_masks_of_a_trained_adapter(tmp_path):
    folder = trained(tmp_path, "a", seed=1)
    model = PeftModel.from_pretrained(base(), folder)
    value = Masks.load(folder)
    assert set(value) == {"0", "2"}
    for name, mask in value.items():
        layer = model.base_model.model.get_submodule(name)
        assert torch.equal(mask, layer.mask("default"))


def test_peft_loads_what_the_algebra_made(tmp_path):
    a = Masks.load(trained(tmp_path, "a", seed=1))
    b = Masks.load(trained(tmp_path, "b", seed=2))
    (a & b).save(tmp_path / "both")
    merged = PeftModel.from_pretrained(base(), tmp_path / "both").merge_and_unload()
    for name in ("0", "2"):
        weight = base().get_submodule(name).weight
        assert torch.equal(merged.get_submodule(name).weight, weight.where(a[name] & b[name], 0.0))
    # and they still know their base
    with pytest.raises(ValueError, match="the base weight is not the one it was trained on"):
        PeftModel.from_pretrained(base(seed=5), tmp_path / "both")


def test_peft_loads_masks_made_by_hand_on_any_base_of_their_shapes(tmp_path):
    value = Masks({"0": torch.rand(20, 12) < 0.5})
    value.save(tmp_path)
    merged = PeftModel.from_pretrained(base(), tmp_path).merge_and_unload()
    assert torch.equal(merged[0].weight, base()[0].weight.where(value["0"], 0.0))
    assert torch.equal(merged[2].weight, base()[2].weight)


def test_masks_of_different_bases_do_not_combine(tmp_path):
    a = Masks.load(trained(tmp_path, "a", seed=1))
    config = MaskConfig(target_modules=["0", "2"], binarizer="threshold", candidates=None, init_weights=False)
    other = get_peft_model(base(seed=5), config)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="cannot combine the masks of '0': they were made for different base weights"):
        a & Masks.load(tmp_path / "other")
    assert a & everywhere_like(a) == a  # masks made by hand fit every base


def everywhere_like(value):
    return Masks({name: torch.ones_like(mask) for name, mask in value.items()})


def test_trained_heads_are_neither_loaded_nor_saved(tmp_path):
    model = get_peft_model(tiny_model("bert", "seq_cls"), MaskConfig(task_type="SEQ_CLS", init_weights=False))
    model.save_pretrained(tmp_path / "a")
    assert any("classifier" in key for key in load_file(tmp_path / "a" / FILE))
    value = Masks.load(tmp_path / "a")
    assert not any("classifier" in name for name in value)
    value.save(tmp_path / "again")
    assert all(key.endswith(".peft_mask_bits") for key in load_file(tmp_path / "again" / FILE))
    merged = PeftModel.from_pretrained(model.unload(), tmp_path / "again").merge_and_unload()
    for name, mask in value.items():
        assert not merged.get_submodule(name).weight[~mask].any()


# ---- bad files ----


@pytest.fixture
def copy(tmp_path):
    return Path(shutil.copytree(GOLDEN, tmp_path / "copy"))


def test_a_missing_adapter_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no masks at '.*nowhere'.*Give the folder that save_pretrained"):
        Masks.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"adapter_model.safetensors' does not exist"):
        Masks.load(tmp_path)


def test_a_truncated_file_is_named(copy):
    data = (copy / FILE).read_bytes()
    for length in (0, 7, 200, len(data) - 1):
        (copy / FILE).write_bytes(data[:length])
        with pytest.raises(
            ValueError, match=r"cannot load masks from '.*adapter_model.safetensors': it is not a whole"
        ):
            Masks.load(copy)


def test_a_file_without_masks_is_named(copy):
    save_file({"base_model.model.0.lora_A.weight": torch.ones(2)}, copy / FILE)
    with pytest.raises(ValueError, match=r"no tensor in it ends in '.peft_mask_bits'.*lora_A.*another method\?"):
        Masks.load(copy)


def test_a_damaged_mask_is_named_with_its_file(copy):
    tensors = load_file(copy / FILE)
    tensors["base_model.model.encoder.vector.peft_mask_bits"][-5] ^= 1
    save_file(tensors, copy / FILE)
    with pytest.raises(ValueError, match=r"mask of 'encoder.vector' from '.*adapter_model.safetensors': its checksum"):
        Masks.load(copy)


def test_a_mask_of_a_newer_format_asks_for_an_upgrade(copy):
    tensors = load_file(copy / FILE)
    tensors["base_model.model.encoder.vector.peft_mask_bits"][4] = 3
    save_file(tensors, copy / FILE)
    with pytest.raises(ValueError, match=r"'encoder.vector'.*newer peft_mask, please upgrade"):
        Masks.load(copy)


def test_a_config_that_is_not_json_is_named(copy):
    (copy / CONFIG).write_text("{")
    with pytest.raises(ValueError, match=r"cannot load masks: '.*adapter_config.json' is not JSON"):
        Masks.load(copy)


def claiming(path, count, side):
    """A file of records of sixty bytes, each of which claims an all-kept mask."""
    body = struct.pack("<4s4B2IQ", b"PMSK", 1, 1, 2, 0, side, side, 0) + bytes(32)
    record = torch.frombuffer(bytearray(body + struct.pack("<I", zlib.crc32(body))), dtype=torch.uint8)
    save_file({f"base_model.model.{i}.peft_mask_bits": record.clone() for i in range(count)}, path)
    return path


def test_masks_that_claim_too_much_together_are_refused_before_the_first_is_read(tmp_path):
    file = claiming(tmp_path / "adapter_model.safetensors", 2, 2**17)
    with pytest.raises(ValueError, match=r"it claims 4,294,967,296 bytes of bits, .* Pass it, on the meta device is"):
        Masks.load(file)


def test_a_base_without_values_says_what_shapes_to_believe(tmp_path):
    with torch.device("meta"):
        base = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    masks = Masks.load(claiming(tmp_path / "adapter_model.safetensors", 2, 64), base=base)
    assert masks.weights == 2 * 64 * 64
    with pytest.raises(ValueError, match=r"its shape is 131072x131072, expected 64x64"):
        Masks.load(claiming(tmp_path / "adapter_model.safetensors", 2, 2**17), base=base)
    with pytest.raises(ValueError, match=r"the base weight of '0' has no values"):
        masks.save(tmp_path / "coded", base=base)


def test_a_mask_twice_in_a_file_is_refused(tmp_path):
    file = claiming(tmp_path / "adapter_model.safetensors", 1, 8)
    tensors = load_file(file)
    save_file(tensors | {"0.peft_mask_bits": tensors["base_model.model.0.peft_mask_bits"].clone()}, file)
    with pytest.raises(ValueError, match=r"it holds a mask twice, with the prefix 'base_model.model.' and without"):
        Masks.load(file)


@pytest.mark.parametrize("text", ["[]", "3", "null", "[" * 100_000, '{"a"', ""])
def test_a_configuration_that_is_none_is_refused(tmp_path, text):
    adapter().save(tmp_path)
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"adapter_config.json' is not JSON \("):
        Masks.load(tmp_path)
