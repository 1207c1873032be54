"""No hostile adapter does harm: some of the table in each run, all of it in the slow one."""

import contextlib
import tracemalloc
from collections import Counter

import pytest
import torch

from attacks import cases, damage, forge, fuzz, run
from attacks.doors import MASKS, NATIVE, PEFT
from attacks.victim import CODECS, PADDED, QUERY, save_adapter
from peft_mask import Masks
from peft_mask.format.fingerprint import UNKNOWN
from peft_mask.format.mask_file import read_headers
from peft_mask.format.packing import pack_bits
from peft_mask.format.record import read_record, write_record
from tests.versions import LOADS_BY_NAME, LOADS_HEADS, MANAGES_ADAPTERS

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # what PEFT and transformers say of odd adapters
    pytest.mark.skipif(not (LOADS_BY_NAME and LOADS_HEADS and MANAGES_ADAPTERS), reason="the table is for a later one"),
]


def problems(chosen, *doors):
    return [
        f"{case.name} by {door}: {outcome.problems}"
        for case, door, outcome in run.attempts(chosen, doors or run.DOORS)
        if outcome.problems
    ]


def test_names_of_cases_are_distinct():
    names = [case.name for case in [*cases.cases(), *cases.hostile_fields()]]
    assert len(set(names)) == len(names) > 600


def test_the_good_adapters_are_of_every_codec(tmp_path):
    for number, codec in enumerate(CODECS):
        folder = save_adapter(tmp_path / codec, codec, seed=1)
        (header,) = {header.codec for header, _ in read_headers(folder / "adapter_model.safetensors").values()}
        assert header == {"bits": 0, "gaps": 1, "ranks": 2}[codec], number
    masks = Masks.load(tmp_path / "bits")
    assert masks[QUERY].shape[1] % 8 == 0 != masks[PADDED].shape[1] % 8


def test_a_good_adapter_is_no_attack():
    good = [cases.Case(codec, lambda folder: None, codec) for codec in CODECS]
    found = problems(good, PEFT, NATIVE)
    assert len(found) == 6
    assert all("silently accepted" in problem for problem in found)


def test_some_of_the_table():
    table = cases.cases()
    assert problems(table[::12]) == []
    assert problems(table[3::6], PEFT, MASKS) == []


def test_some_hostile_fields():
    assert problems(cases.hostile_fields()[::13], PEFT, NATIVE) == []


def test_mutants_are_refused_in_words_or_are_the_one_record_of_a_mask():
    findings = fuzz.fuzz(2000, seed=0)
    assert findings.failures == {}
    assert findings.refused + findings.accepted == 2000
    assert findings.accepted < 600
    assert len(findings.reasons) > 25  # so many checks were met, those behind the checksum too
    assert findings.worst < 1 << 20


def test_damaged_adapters_are_refused_or_every_value_is_as_saved():
    findings = damage.damage(60, seed=0)
    assert findings.accepted == {}
    assert findings.refused.total() > 40
    assert len(findings.refused) > 4  # by so many checks, in both files


def test_a_mutant_is_the_same_whatever_else_is_tried():
    whole = fuzz.fuzz(30, seed=5)
    parts = [fuzz.fuzz(1, seed=5, start=number) for number in range(30)]
    assert whole.reasons == sum((part.reasons for part in parts), Counter())


@pytest.mark.parametrize("payload", [b"\xff", b"\x55", b"\x11", b"\0"])
@pytest.mark.parametrize("zeros", [1, 2**14, 2**19])
def test_a_forged_record_takes_no_more_memory_than_the_dearest_mask_of_its_shape(payload, zeros):
    shape = (1024, 1024)
    forged = forge.as_tensor(forge.claim(shape, zeros, payload * (2**17 - 1)))
    dearest = write_record(pack_bits(torch.rand(shape) >= 0.5), shape, UNKNOWN)
    peaks = []
    for data in (dearest, forged):
        tracemalloc.start()
        with contextlib.suppress(ValueError):
            read_record(data, shape)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] <= peaks[0] < 24 * 2**20  # bytes a weight, as docs/format.md says


@pytest.mark.slow
def test_the_whole_table():
    assert problems(cases.cases()) == []


@pytest.mark.slow
def test_all_hostile_fields():
    assert problems(cases.hostile_fields()) == []
