"""Words of other methods get a TypeError that says what takes their place."""

import dataclasses
import inspect
import json

import pytest
from peft import LoraConfig, PeftConfig

from peft_mask import MaskConfig


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("r", "a mask has no rank: target_sparsity, .*, or target_bytes, .* sets how large it is"),
        ("lora_alpha", "a mask is not scaled: leave it out"),
        ("lora_dropout", "no dropout of its own: leave it out, or see GradientDropout"),
        ("bias", "mask them with mask_biases=True"),
        ("init_lora_weights", "where scores start is init_weights"),
        ("rank_pattern", "target_modules, exclude_modules and layers_to_transform say where"),
        ("use_dora", "it belongs to LoraConfig, and a mask has nothing like it"),
        ("density", "give it as target_sparsity, which is 1 minus the fraction that is kept"),
        ("sparsity", "give it as target_sparsity"),
        ("learning_rate", "arguments of create_mask_optimizer"),
        ("target_module", r"did you mean target_modules\?"),
        ("xyz", r"help\(MaskConfig\) lists all fields"),
    ],
)
def test_a_word_that_is_not_ours_says_what_is(word, message):
    with pytest.raises(TypeError, match=rf"got an unexpected keyword argument '{word}': .*{message}"):
        MaskConfig(**{word: 8})
    with pytest.raises(TypeError, match=message):
        MaskConfig.paper(**{word: 8})


def test_every_argument_of_lora_is_ours_or_explained():
    ours = {field.name for field in dataclasses.fields(MaskConfig)}
    for field in dataclasses.fields(LoraConfig):
        if field.init and field.name not in ours:
            with pytest.raises(TypeError, match=rf"keyword argument '{field.name}': (?!did you mean|help)"):
                MaskConfig(**{field.name: None})


def test_the_signature_still_lists_the_fields():
    assert set(inspect.signature(MaskConfig).parameters) == {field.name for field in dataclasses.fields(MaskConfig)}


def test_a_file_of_a_later_version_loads_with_a_warning(tmp_path):
    MaskConfig(target_modules=["q"]).save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "of_tomorrow": 1}))
    with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['of_tomorrow'\]"):
        assert PeftConfig.from_pretrained(str(tmp_path)).target_modules == {"q"}
