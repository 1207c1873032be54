"""Every field of `MaskConfig` out of range is refused by name."""

import copy
import dataclasses

import pytest
from peft import PeftConfig

import peft_mask
from peft_mask import MaskConfig

PAPER = {"binarizer": "threshold", "candidates": None, "init_weights": "uniform", "init_sparsity": 0.05}

ROW = {"structure": "row", "candidates": None}
MASKED = {"head": "masked"}
NM = {"binarizer": "n:m", "candidates": None}
BERNOULLI = {"binarizer": "bernoulli"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"threshold": float("nan")}, "threshold must be a finite number, got nan"),
        ({"threshold": "0.1"}, "threshold must be a finite number, got '0.1'"),
        ({"init_margin": 0.0}, "init_margin must be a finite number greater than 0, got 0.0"),
        ({**PAPER, "init_sparsity": 0.0}, "init_sparsity must be .* greater than 0 and less than 1"),
        ({**PAPER, "init_sparsity": 1.5}, "init_sparsity must be .* less than 1, got 1.5"),
        ({**PAPER, "init_weights": True}, "init_sparsity=0.05 has no meaning with init_weights=True"),
        ({"init_sparsity": 0.05}, "init_sparsity=0.05 has no meaning with binarizer=.topk.* MaskConfig.paper"),
        (
            {"binarizer": "topk", "init_weights": "uniform"},
            "init_weights='uniform' has no meaning with binarizer=.topk",
        ),
        ({"init_weights": "uniform", "target_sparsity": 0.1}, "target_sparsity=0.1 needs binarizer=.topk"),
        ({**PAPER, "target_sparsity": 0.01}, "target_sparsity=0.01 needs binarizer=.topk"),
        ({**PAPER, "target_bytes": 1000}, "target_bytes=1000 needs binarizer=.topk"),
        ({"target_bytes": True}, "target_bytes must be a positive integer, got True"),
        ({"target_bytes": 1e5}, "target_bytes must be a positive integer, got 100000.0"),
        ({"target_sparsity": 1.0}, "target_sparsity must be .* greater than 0 and less than 1, got 1.0"),
        ({"target_sparsity": 0.2, "candidates": 0.1}, "target_sparsity=0.2 cannot be reached with candidates=0.1"),
        ({"candidates": 1.5}, "candidates must be a finite number greater than 0 and at most 1, got 1.5"),
        ({"gradient_tokens": 0.0}, "gradient_tokens must be .* greater than 0 and at most 1, got 0.0"),
        ({"gradient_tokens": 1.5}, "gradient_tokens must be .* greater than 0 and at most 1, got 1.5"),
        ({"gradient_tokens": "half"}, "gradient_tokens must be a finite number .*, got 'half'"),
        ({**PAPER, "gradient_tokens": 0.5}, "gradient_tokens=0.5 needs binarizer=.topk.*size counts.*Leave one"),
        ({**NM, "gradient_tokens": 0.5}, "gradient_tokens=0.5 needs binarizer=.topk"),
        ({"candidate_rule": "largest"}, r"candidate_rule must be one of \['magnitude', 'off-principal', 'random'\]"),
        ({"scores_dtype": "int8"}, r"scores_dtype must be one of \['float32', 'bfloat16'\]"),
        ({"structure": "rows"}, r"structure must be one of \['weight', 'row', .*\], got 'rows'"),
        (
            {"structure": "row", "candidates": 0.1},
            "candidates=0.1 are single weights, which structure='row' does not have: set candidates",
        ),
        ({**NM, **ROW}, "binarizer=.n:m. is for structure=.weight., got 'row'"),
        ({**ROW, "target_bytes": 1000}, "target_bytes=1000 is for structure=.weight., got 'row'"),
        ({**ROW, "structure": "matrix", "binarizer": "topk"}, "structure=.matrix. has no meaning with binarizer=.topk"),
        ({**ROW, "structure": "head"}, "structure=.head. needs target_modules: name the query, key and value"),
        ({"head": "random"}, r"head must be one of \['trained', 'masked'\], got 'random'"),
        ({**MASKED, "task_type": "TOKEN_CLS"}, "head=.masked. is for task_type=.SEQ_CLS. or none, got 'TOKEN_CLS'"),
        ({"head_seed": None}, "head_seed must be a non-negative integer below 2.63, got None"),
        ({"head_size": 0}, "head_size must be a positive integer or None, got 0"),
        ({"binarizer": "treshold"}, r"binarizer must be one of \['topk', 'threshold', .*\], got 'treshold'"),
        ({"init_weights": "unifrom"}, r"init_weights must be one of \['uniform', .*\], True or False, got 'unifrom'"),
        ({"init_weights": 1}, "init_weights must be one of"),
        ({"pattern": "2:4", "binarizer": "topk"}, "pattern='2:4' needs binarizer=.n:m., got 'topk'"),
        (
            {"binarizer": "n:m", "candidates": 0.1},
            "candidates=0.1 has no meaning with binarizer=.n:m.*set candidates=None",
        ),
        ({**NM, "pattern": "4:2"}, "pattern must be .N:M. with 0 < N < M <= 32, got '4:2'"),
        ({**NM, "pattern": "2:64"}, "pattern must be .N:M. with 0 < N < M <= 32, got '2:64'"),
        ({**NM, "pattern": [2, 4]}, "pattern must be .N:M. with 0 < N < M <= 32, got"),
        ({**NM, "target_sparsity": 0.5}, "target_sparsity=0.5 needs binarizer=.topk.*the pattern says how many"),
        ({**NM, "init_sparsity": 0.5}, "init_sparsity=0.5 has no meaning with binarizer=.n:m.*its pattern says"),
        (
            {**BERNOULLI, "init_weights": "magnitude"},
            "init_weights='magnitude' has no meaning with binarizer=.bernoulli",
        ),
        ({**BERNOULLI, "init_sparsity": 0.5}, "init_sparsity must be less than 0.5 with binarizer=.bernoulli"),
        ({"binarizer": "sign", "init_margin": 2.0}, "init_margin must be at most 1 with binarizer=.sign., got 2"),
        ({"seed": -1}, r"seed must be a non-negative integer below 2\^63 or None, got -1"),
        ({"seed": 1.0}, r"seed must be a non-negative integer below 2\^63 or None, got 1.0"),
        ({"target_parameters": "experts"}, "target_parameters must be a list of names or None, got 'experts'"),
        ({"seed": 2**63}, r"seed must be a non-negative integer below 2\^63 or None"),
        ({"seed": True}, "seed must be a non-negative integer"),
        ({"init_margin": 10**400}, "init_margin must be a finite number"),
        (
            {"target_modules": [["query"]]},
            r"target_modules must be a string, a list of names or None, got \[\['query'\]\]",
        ),
        ({"target_modules": {"query": 1}}, "target_modules must be a string, a list of names or None"),
        ({"target_modules": 5}, "target_modules must be a string, a list of names or None, got 5"),
        ({"exclude_modules": [""]}, "exclude_modules must be a string, a list of names or None"),
        ({"modules_to_save": "classifier"}, "modules_to_save must be a list of names or None, got 'classifier'"),
        ({"modules_to_save": [""]}, "modules_to_save must be a list of names or None"),
        ({"layers_to_transform": "0"}, "layers_to_transform must be a list of integers from 0 on, got '0'"),
        ({"layers_to_transform": -1}, "layers_to_transform must be a list of integers from 0 on"),
        ({"layers_to_transform": []}, "layers_to_transform names no block"),
        ({"target_modules": []}, "target_modules names nothing to mask"),
        ({"layers_to_transform": [10**30]}, "layers_to_transform must be a list of integers"),
        ({"trainable_token_indices": [-1]}, "trainable_token_indices must be a list of integers from 0 on"),
        ({"trainable_token_indices": {"wte": "3"}}, "trainable_token_indices must be a list of integers from 0 on"),
        ({"trainable_token_indices": []}, "trainable_token_indices names no token"),
        ({"fan_in_fan_out": "no"}, "fan_in_fan_out must be True or False, got 'no'"),
        ({"check_base": 0}, "check_base must be True or False, got 0"),
        ({"base_model_name_or_path": ["x"]}, "base_model_name_or_path must be a string or None"),
        ({"auto_mapping": "x"}, "auto_mapping must be a dictionary or None, got 'x'"),
        ({"layers_pattern": "layers"}, "`layers_to_transform` must also be specified"),
    ],
)
def test_a_field_out_of_range_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        MaskConfig(**fields)


@pytest.mark.parametrize(
    ("given", "binarizer", "candidates"),
    [
        ({}, "topk", 0.1),
        ({"structure": "row"}, "topk", None),
        ({"structure": "head", "target_modules": ["q"]}, "topk", None),
        ({"structure": "matrix"}, "threshold", None),
        ({"init_weights": "uniform"}, "threshold", 0.1),
        ({"init_weights": "magnitude", "init_sparsity": 0.1}, "threshold", 0.1),
        ({"init_weights": "uniform", "binarizer": "sign"}, "sign", 0.1),
        ({"binarizer": "n:m"}, "n:m", None),
        ({"pattern": "1:4"}, "n:m", None),
        ({"target_sparsity": 0.1}, "topk", 0.1),
        ({"target_sparsity": 0.2}, "topk", None),
        ({"target_bytes": 1000}, "topk", 0.1),
        ({"structure": "row", "init_weights": "uniform"}, "threshold", None),
    ],
)
def test_a_choice_brings_along_what_it_needs(given, binarizer, candidates, tmp_path):
    config = MaskConfig(**given)
    assert (config.binarizer, config.candidates) == (binarizer, candidates)
    assert config.to_dict() == MaskConfig(**{**given, "binarizer": binarizer, "candidates": candidates}).to_dict()
    for same in (copy.copy(config), copy.deepcopy(config), dataclasses.replace(config), MaskConfig(**config.to_dict())):
        assert same.to_dict() == config.to_dict()
    config.save_pretrained(str(tmp_path))
    assert "auto" not in (tmp_path / "adapter_config.json").read_text().replace("auto_mapping", "")
    assert PeftConfig.from_pretrained(str(tmp_path)).to_dict() == config.to_dict()


def test_a_file_without_these_fields_means_what_it_did(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "PEFT_MASK", "target_modules": ["q"]}')
    config = PeftConfig.from_pretrained(str(tmp_path))
    assert (config.binarizer, config.candidates, config.target_sparsity) == ("topk", 0.1, 0.005)


@pytest.mark.parametrize("blocks", [range(2, 5), (2, 3, 4), {2, 3, 4}])
def test_blocks_of_any_kind_can_be_saved(blocks, tmp_path):
    MaskConfig(layers_to_transform=blocks).save_pretrained(str(tmp_path))
    assert PeftConfig.from_pretrained(str(tmp_path)).layers_to_transform == [2, 3, 4]


def test_lists_of_modules_become_sets_as_in_lora():
    config = MaskConfig(target_modules=["q", "v"], exclude_modules=["head"])
    assert config.target_modules == {"q", "v"}
    assert config.exclude_modules == {"head"}


def test_a_saved_config_is_found_by_its_type(tmp_path):
    config = MaskConfig.paper(target_modules=["q"], init_sparsity=0.1, seed=3)
    config.save_pretrained(str(tmp_path))
    loaded = PeftConfig.from_pretrained(str(tmp_path))
    assert type(loaded) is MaskConfig
    assert loaded.peft_type == "PEFT_MASK"
    assert loaded.to_dict() == config.to_dict()


def test_the_public_names_exist():
    assert all(hasattr(peft_mask, name) for name in peft_mask.__all__)
