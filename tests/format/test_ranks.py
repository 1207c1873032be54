"""Masks coded against their base: smaller, the same in float32 and bfloat16, and refused on every other base."""

import json
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from peft_mask import MaskConfig, Masks, fill_budget
from peft_mask.format.fingerprint import UNKNOWN
from peft_mask.format.packing import pack_bits, unpack_bits
from peft_mask.format.ranks import HEAD_BYTES, WrongBaseError, decode_ranks, encode_ranks
from peft_mask.format.record import BITS, GAPS, RANKS, read_header, read_record, write_record
from tests.golden.make import large_off, large_off_record
from tests.independent_decoder import decode

GOLDEN = (Path(__file__).parents[1] / "golden" / "large_off.record").read_bytes()
FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"
MISSING = "it was coded against its base weight, which is not at hand"
OTHER = r"it was coded against its base weight, and the one at hand is not the same: .* in float32 or bfloat16"


def tensor(data):
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def sealed(body):
    return tensor(body + struct.pack("<I", zlib.crc32(body)))


def mask_of_large(weight, within=0.1, sparsity=0.005):
    """A mask with `sparsity` zeros, all among the largest `within` of the weight."""
    large = weight.float().abs().flatten().topk(round(within * weight.numel())).indices
    mask = torch.ones(weight.numel(), dtype=torch.bool)
    mask[large[torch.randperm(len(large))[: round(sparsity * weight.numel())]]] = False
    return mask.view(weight.shape)


# ---- positions <-> bytes ----


@pytest.mark.parametrize("shape", [(1,), (200,), (3, 5), (40, 41), (4, 3, 5, 5)], ids=str)
@pytest.mark.parametrize("sparsity", [0.01, 0.3, 1.0])
def test_decoding_restores_positions_on_the_base_in_either_dtype(shape, sparsity):
    weight = torch.randn(shape)
    rounded = weight.bfloat16()
    positions = (torch.rand(weight.numel()) < sparsity).nonzero().squeeze(1).numpy()
    if not len(positions):
        positions = np.array([0])
    data = encode_ranks(positions, weight)
    assert encode_ranks(positions, rounded) == encode_ranks(positions, rounded.float()) == data
    strided = weight.transpose(0, -1).contiguous().transpose(0, -1)
    for base in (weight, rounded, rounded.double(), nn.Parameter(weight), strided):
        assert np.array_equal(decode_ranks(data, len(positions), base), positions)


def test_a_weight_is_looked_at_in_pieces_of_any_size(monkeypatch):
    weight = torch.randn(37, 21)
    positions = (~mask_of_large(weight, 0.3, 0.05)).flatten().nonzero().squeeze(1).numpy()
    data = encode_ranks(positions, weight)
    for size in (1, 21, 50, 100):
        monkeypatch.setattr("peft_mask.format.ranks._CHUNK", size)
        assert encode_ranks(positions, weight) == data


def test_a_weight_that_was_looked_at_can_be_resized():
    weight = torch.randn(64, 32).bfloat16()  # which FSDP2 does to every weight it gathers
    encode_ranks(np.array([3, 700]), weight)
    weight.untyped_storage().resize_(0)


def test_infinite_and_absent_numbers_are_large_and_nothing_is_small():
    weight = torch.tensor([0.0, -0.0, 1.0, -torch.inf, torch.nan, 1e-40, 3.4e38])  # the last rounds to infinity
    for chosen in ([3], [4], [3, 4], [4, 6], [2, 5], [0, 1], list(range(7))):
        data = encode_ranks(np.array(chosen), weight)
        assert encode_ranks(np.array(chosen), weight.bfloat16()) == data
        assert decode_ranks(data, len(chosen), weight).tolist() == chosen
    assert struct.unpack_from("<H", encode_ranks(np.array([4]), weight))[0] == 0x7F80
    assert struct.unpack_from("<H", encode_ranks(np.array([0]), weight))[0] == 0


@pytest.mark.parametrize("changed", ["float16", "another", "one weight"])
def test_a_base_with_other_large_weights_is_refused(changed):
    weight = torch.randn(300, 400)
    positions = (~mask_of_large(weight)).flatten().nonzero().squeeze(1).numpy()
    data = encode_ranks(positions, weight)
    bases = {"float16": weight.half(), "another": torch.randn(300, 400), "one weight": weight.clone()}
    bases["one weight"].view(-1)[positions[0]] = 0.0
    with pytest.raises(WrongBaseError, match=OTHER):
        decode_ranks(data, len(positions), bases[changed])


def test_a_base_that_was_float16_is_the_same_in_every_dtype():
    weight = torch.randn(300, 400).half()
    positions = (~mask_of_large(weight)).flatten().nonzero().squeeze(1).numpy()
    data = encode_ranks(positions, weight.float())
    for base in (weight, weight.float(), weight.bfloat16()):
        assert np.array_equal(decode_ranks(data, len(positions), base), positions)


def test_a_threshold_below_the_smallest_listed_weight_is_refused():
    weight = torch.arange(1.0, 17.0)
    data = encode_ranks(np.array([7, 9]), weight)
    lower = (
        encode_ranks(np.array([6, 7, 9]), weight)[:HEAD_BYTES] + encode_ranks(np.array([8, 10]), weight)[HEAD_BYTES:]
    )
    with pytest.raises(ValueError, match="the coded positions are not in their canonical form"):
        decode_ranks(lower, 2, weight)
    for short, count in ((data[: HEAD_BYTES - 1], 2), (b"", 2), (data, 0)):
        with pytest.raises(ValueError, match=rf"{len(short)} coded bytes are no ranks of {count} positions"):
            decode_ranks(short, count, weight)


# ---- records ----


def test_the_golden_record_is_written_and_read_by_both_readers():
    mask, weight = large_off()
    assert large_off_record() == GOLDEN
    assert read_header(tensor(GOLDEN)).codec == RANKS
    for base in (weight, weight.bfloat16()):
        assert torch.equal(unpack_bits(read_record(tensor(GOLDEN), base=base).bits, mask.shape), mask)
    assert not torch.equal(weight.bfloat16().float(), weight)
    assert decode(GOLDEN, weight.flatten().tolist())[1] == mask.flatten().tolist()
    large = [value >= struct.unpack_from("<H", GOLDEN, 56)[0] for value in magnitudes(weight)]
    packed = np.packbits(np.array(large).reshape(60, 70), axis=1, bitorder="little")
    assert struct.unpack_from("<I", GOLDEN, 58)[0] == zlib.crc32(packed)


def magnitudes(weight):
    return (weight.bfloat16().view(torch.int16) & 0x7FFF).flatten().tolist()


def test_every_flipped_bit_under_a_right_checksum_is_refused_or_another_record():
    _, weight = large_off()
    data, other = bytearray(GOLDEN[:-4]), 0
    for bit in range(8 * len(data)):
        data[bit // 8] ^= 1 << bit % 8
        forged = sealed(bytes(data))
        data[bit // 8] ^= 1 << bit % 8
        try:
            record = read_record(forged, weight.shape, weight)
        except ValueError:
            continue
        other += 1
        assert torch.equal(write_record(record.bits, record.shape, record.fingerprint, weight), forged)
    assert other  # the fingerprint is not part of the mask


def test_every_truncation_is_refused():
    _, weight = large_off()
    for length in range(len(GOLDEN) - 4):
        with pytest.raises(ValueError, match=r"^it|^its|coded"):
            read_record(sealed(GOLDEN[:length]), weight.shape, weight)


def test_ranks_are_written_where_they_are_shortest_and_read_nowhere_else():
    weight = torch.randn(64, 64)
    for mask, codec in (
        (mask_of_large(weight), RANKS),
        (torch.ones(64, 64, dtype=torch.bool), GAPS),
        (torch.rand(64, 64) >= 0.01, GAPS),
        (torch.rand(64, 64) >= 0.5, BITS),
        (weight.abs() < 1, RANKS),  # all large ones are off
        (weight.abs() < 0.3, RANKS),  # and more than half of all
    ):
        record = write_record(pack_bits(mask), mask.shape, UNKNOWN, weight)
        assert read_header(record).codec == codec
        assert len(record) <= len(write_record(pack_bits(mask), mask.shape, UNKNOWN))
        assert torch.equal(unpack_bits(read_record(record, mask.shape, weight).bits, mask.shape), mask)
        assert decode(record.numpy().tobytes(), weight.flatten().tolist())[1] == mask.flatten().tolist()
    mask = torch.rand(64, 64) >= 0.01
    body = bytearray(write_record(pack_bits(mask), mask.shape, UNKNOWN).numpy().tobytes()[:56])
    body[5] = RANKS
    positions = (~mask).flatten().nonzero().squeeze(1).numpy()
    with pytest.raises(ValueError, match="it is stored as ranks, though gaps or bits are not longer"):
        read_record(sealed(bytes(body) + encode_ranks(positions, weight)), base=weight)


def test_a_record_of_ranks_needs_a_base_of_its_shape():
    _, weight = large_off()
    with pytest.raises(WrongBaseError, match=MISSING):
        read_record(tensor(GOLDEN))
    with pytest.raises(ValueError, match="its shape is 60x70, expected 70x60"):
        read_record(tensor(GOLDEN), base=weight.t())


# ---- adapters ----

WIDTH = 160


def base(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH)).to(dtype)


def in_codes(model):
    model[0].weight = nn.Parameter(model[0].weight.mul(100).to(torch.int8), requires_grad=False)
    return model


def masked(model=None, **fields):
    """A model with the default recipe's mask: half a per cent off, among the largest tenth."""
    fields = {"target_modules": ["0", "2"], "init_weights": False, "portable": False, "seed": 0} | fields
    return get_peft_model(model or base(), MaskConfig(**fields)).eval()


@pytest.fixture
def model():
    return masked()


def saved(model, folder):
    model.save_pretrained(folder)
    return folder


def size(folder):
    return (folder / FILE).stat().st_size


def test_an_adapter_is_a_third_smaller_and_loads_as_the_same_mask(model, tmp_path):
    small = saved(model, tmp_path / "small")
    model.peft_config["default"].portable = True
    portable = saved(model, tmp_path / "portable")
    records = [sum(map(len, load_file(folder / FILE).values())) - 2 * 60 for folder in (small, portable)]
    assert records[0] < 0.75 * records[1]
    for dtype in (torch.float32, torch.bfloat16):
        loaded = PeftModel.from_pretrained(base(dtype), small)
        assert loaded.peft_config["default"].portable is False
        for ours, theirs in zip(model.base_model.model[::2], loaded.base_model.model[::2], strict=True):
            assert torch.equal(ours.mask("default"), theirs.mask("default"))
    assert Masks.load(small, base()) == Masks.load(small, base(torch.bfloat16)) == Masks.load(portable)


def test_both_kinds_of_file_are_made_of_each_other_to_the_byte(model, tmp_path):
    small = saved(model, tmp_path / "small")
    masks = Masks.load(small, base())
    masks.save(tmp_path / "portable")
    Masks.load(tmp_path / "portable").save(tmp_path / "again", base())
    assert (tmp_path / "again" / FILE).read_bytes() == (small / FILE).read_bytes()
    assert [json.loads((tmp_path / name / CONFIG).read_text())["portable"] for name in ("portable", "again")] == [
        True,
        False,
    ]
    loaded = PeftModel.from_pretrained(base(torch.float16), tmp_path / "portable")
    assert torch.equal(loaded.base_model.model[0].mask("default"), masks["0"])


def test_it_is_saved_and_read_over_merged_weights(model, tmp_path):
    plain = saved(model, tmp_path / "plain")
    model.merge_adapter()
    merged = saved(model, tmp_path / "merged")
    assert (merged / FILE).read_bytes() == (plain / FILE).read_bytes()
    layer = model.base_model.model[0]
    record = load_file(merged / FILE)["base_model.model.0.peft_mask_bits"]
    assert torch.equal(read_record(record, base=layer.unmerged_weight()).bits, layer.packed_mask("default"))


def test_other_bases_are_refused_with_what_to_do(model, tmp_path):
    small = saved(model, tmp_path)
    for other in ({"dtype": torch.float16}, {"seed": 1}):
        with pytest.raises(ValueError, match=rf"cannot load the mask of '0': {OTHER}.* portable=True\.$"):
            PeftModel.from_pretrained(base(**other), small)
        with pytest.raises(ValueError, match=rf"cannot load the mask of '0' from '.*{FILE}': {OTHER}"):
            Masks.load(small, base(**other))
    with pytest.raises(ValueError, match=rf"'0': {MISSING}: load the base model's weights before the adapter\.$"):
        PeftModel.from_pretrained(base().to("meta"), small)
    with pytest.raises(
        ValueError, match=rf"{MISSING}: pass the base model, in float32 or bfloat16, as Masks.load\(path, base=model\)"
    ):
        Masks.load(small)


def test_masks_meet_their_base_only(model, tmp_path):
    model.peft_config["default"].portable = True
    folder = saved(model, tmp_path / "portable")
    masks = Masks.load(folder, base(torch.float16))
    with pytest.raises(ValueError, match=r"the mask of '0' was not made for the weight of the base model given"):
        Masks.load(folder, base(seed=1))
    for other, message in (
        (base(seed=1), "the mask of '0' was not made for the weight of the base model given"),
        (base(torch.float16), "cannot code the mask of '0' against a weight in torch.float16"),
        (base().to("meta"), "the base weight of '0' has no values"),
        (in_codes(base()), "the base weight of '0' is quantized: give the base model in float32 or bfloat16"),
        (nn.Sequential(nn.Linear(3, 2)), r"the mask of '0' is for a weight of shape \(160, 160\)"),
        (nn.Module(), "the base model, a Module, has no module '0'"),
        (model.base_model.model, r"the base model carries an adapter"),
    ):
        with pytest.raises(ValueError, match=message):
            masks.save(tmp_path / "none", other)
    assert not (tmp_path / "none").exists()


def test_a_base_that_is_not_exact_gets_a_portable_file_and_a_warning(tmp_path):
    model = masked(base(torch.float16))
    with pytest.warns(UserWarning, match=r"the masks of \['0', '2'\] are saved as with portable=True"):
        model.save_pretrained(tmp_path)
    assert Masks.load(tmp_path).sparsity == pytest.approx(0.005, rel=0.01)


@pytest.mark.parametrize("target", [600, 700, 900])
def test_a_byte_budget_buys_more_zeros(tmp_path, target):
    sparsities = {}
    for portable in (True, False):
        model = masked(target_bytes=target, portable=portable)
        estimated = model.peft_config["default"].target_sparsity
        fill_budget(model)
        folder = saved(model, tmp_path / str(portable))
        assert size(folder) == pytest.approx(target, rel=0.03)
        sparsities[portable] = Masks.load(folder, base()).sparsity
        assert estimated == pytest.approx(sparsities[portable], rel=0.15)
    assert sparsities[False] > 1.2 * sparsities[True]


def test_a_budget_among_all_weights_is_found():
    config = masked(target_bytes=5000, candidates=None, portable=True).peft_config["default"]
    assert 0 < config.target_sparsity < 0.5


def test_the_card_is_that_of_the_file(model, tmp_path):
    small = saved(model, tmp_path)
    text = (small / "README.md").read_text()
    coded = sum(map(len, load_file(small / FILE).values()))
    assert f"| bytes of the masks | {coded:,} |" in text
    assert f"| bits a masked weight | {8 * coded / (2 * WIDTH * WIDTH):.3f} |" in text
    assert f"| sparsity | {2 * math.floor(0.005 * WIDTH * WIDTH) / (2 * WIDTH * WIDTH):.4%} |" in text
    assert "in float32 or bfloat16" in text


def test_portable_is_true_or_false():
    with pytest.raises(ValueError, match="portable must be True or False, got 'no'"):
        MaskConfig(portable="no")
