"""Names of modules on a command line."""

import pytest
from peft import get_peft_model

from peft_mask import MaskConfig
from peft_mask.recipes.mask_arguments import targets_of
from tests.tiny_models import tiny_model


@pytest.mark.parametrize("shorthand", ["all-linear", "gate-projections", "Gate-Projections"])
def test_a_shorthand_for_modules_means_the_same_in_a_list_as_alone(shorthand):
    named = [
        get_peft_model(
            tiny_model("llama", "lm"), MaskConfig(task_type="CAUSAL_LM", target_modules=targets)
        ).targeted_module_names
        for targets in (shorthand, targets_of([shorthand]))
    ]
    assert named[0] == named[1] != []


@pytest.mark.parametrize("names", [None, [], ["q_proj"], ["q_proj", "gate_proj"], ["model.*"]])
def test_other_names_of_modules_are_left_as_they_are(names):
    assert targets_of(names) is names
