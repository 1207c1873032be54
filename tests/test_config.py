"""Every field of `MaskConfig` out of range is refused by name."""

import pytest
from peft import PeftConfig

import peft_mask
from peft_mask import MaskConfig


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"threshold": float("nan")}, "threshold must be a finite number, got nan"),
        ({"threshold": "0.1"}, "threshold must be a finite number, got '0.1'"),
        ({"init_margin": 0.0}, "init_margin must be a finite number greater than 0, got 0.0"),
        ({"init_sparsity": 0.0, "init_weights": "uniform"}, "init_sparsity must be .* greater than 0 and less than 1"),
        ({"init_sparsity": 1.5, "init_weights": "uniform"}, "init_sparsity must be .* less than 1, got 1.5"),
        ({"init_sparsity": 0.05}, "init_sparsity=0.05 has no meaning with init_weights=True"),
        ({"structure": "rows"}, r"structure must be one of \['weight'\], got 'rows'"),
        ({"binarizer": "treshold"}, r"binarizer must be one of \['threshold'\], got 'treshold'"),
        ({"init_weights": "unifrom"}, r"init_weights must be one of \['uniform'\], True or False, got 'unifrom'"),
        ({"init_weights": 1}, "init_weights must be one of"),
        ({"seed": -1}, "seed must be a non-negative integer or None, got -1"),
        ({"seed": 1.0}, "seed must be a non-negative integer or None, got 1.0"),
        ({"target_parameters": ["experts"]}, r"target_parameters=\['experts'\] is not supported"),
        ({"layers_pattern": "layers"}, "`layers_to_transform` must also be specified"),
    ],
)
def test_a_field_out_of_range_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        MaskConfig(**fields)


def test_lists_of_modules_become_sets_as_in_lora():
    config = MaskConfig(target_modules=["q", "v"], exclude_modules=["head"])
    assert config.target_modules == {"q", "v"}
    assert config.exclude_modules == {"head"}


def test_a_saved_config_is_found_by_its_type(tmp_path):
    config = MaskConfig(target_modules=["q"], init_weights="uniform", init_sparsity=0.1, threshold=0.01, seed=3)
    config.save_pretrained(str(tmp_path))
    loaded = PeftConfig.from_pretrained(str(tmp_path))
    assert type(loaded) is MaskConfig
    assert loaded.peft_type == "PEFT_MASK"
    assert loaded.to_dict() == config.to_dict()


def test_the_public_names_exist():
    assert all(hasattr(peft_mask, name) for name in peft_mask.__all__)
