"""No hostile adapter does harm: some of the table in each run, all of it in the slow one."""

import pytest

from attacks import cases, run
from attacks.doors import MASKS, NATIVE, PEFT
from attacks.victim import CODECS, PADDED, QUERY, save_adapter
from peft_mask import Masks
from peft_mask.mask_file import read_headers
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
        (header,) = {header.codec for header, _ in read_headers(folder / "adapter_model.safetensors")}
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


@pytest.mark.slow
def test_the_whole_table():
    assert problems(cases.cases()) == []


@pytest.mark.slow
def test_all_hostile_fields():
    assert problems(cases.hostile_fields()) == []
