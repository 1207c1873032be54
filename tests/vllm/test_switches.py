"""Masks switched in the weights of a real vLLM engine."""

import pytest

from peft_mask import AdapterRefusedError
from peft_mask.vllm import mask_in_force, switch_mask
from tests.vllm import models

pytestmark = [pytest.mark.usefixtures("settings_of_vllm"), pytest.mark.filterwarnings("default")]  # vLLM's own warnings

EXTENSION = {"worker_extension_cls": "peft_mask.vllm.MaskExtension"}
# 21 switches: every pair of neighbors, among them a mask in its own place and both kinds of file
SWITCHES = [
    "a",
    "b",
    "c",
    None,
    "a",
    "a",
    "c",
    "b",
    None,
    None,
    "ranked",
    "a",
    "b",
    "ranked",
    "c",
    "a",
    None,
    "c",
    "c",
    "b",
    None,
]


@pytest.fixture(scope="module")
def served(engine, folder):
    return engine(folder / "base", **EXTENSION)


@pytest.fixture
def base(served):
    """The engine under no mask, before and after."""
    switch_mask(served.llm, None)
    yield served
    switch_mask(served.llm, None)


def test_switches_give_the_tokens_of_merged_models_and_the_base_comes_back_to_the_bit(base, folder, expected):
    untouched = base.checksums()
    assert base.tokens() == expected["base"]
    for name in SWITCHES:
        report = switch_mask(base.llm, name and folder / name)
        assert report["adapter"] == (name and str(folder / name))
        assert base.tokens() == expected[name or "base"], name
        assert (base.checksums() == untouched) == (name is None)
        assert mask_in_force(base.llm) == report
    assert len(SWITCHES) > 20


def test_keys_and_values_of_the_mask_before_would_be_answered_from_if_the_prefix_cache_stayed(base, folder, expected):
    base.tokens()  # which fills the cache
    path = str(folder / "a")
    base.llm.collective_rpc("mask_prepare", args=(path,))
    base.llm.collective_rpc("mask_apply", args=(path,))
    assert base.tokens() != expected["a"]
    assert base.llm.reset_prefix_cache()
    assert base.tokens() == expected["a"]


def test_weights_under_a_mask_are_to_the_bit_those_of_its_merged_export(base, engine, folder, expected, tmp_path):
    models.merged(folder, "b").save_pretrained(tmp_path)
    exported = engine(tmp_path, skip_tokenizer_init=True, **EXTENSION)  # which keeps weights in place on a CPU
    switch_mask(base.llm, folder / "b")
    assert base.checksums() == exported.checksums()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("damaged", "checksum is wrong"),
        ("foreign", "base weight is not the one it was trained on"),
        ("nowhere", "does not exist"),
        ("lora", "of type LORA"),
    ],
)
def test_a_refused_adapter_changes_nothing(base, folder, expected, name, reason):
    switch_mask(base.llm, folder / "c")
    before, in_force = base.checksums(), mask_in_force(base.llm)
    with pytest.raises(AdapterRefusedError, match=reason):
        switch_mask(base.llm, folder / name)
    assert (base.checksums(), mask_in_force(base.llm)) == (before, in_force)
    assert base.tokens() == expected["c"]


def test_nothing_is_switched_under_requests_that_have_not_ended(base, folder, expected):
    base.enqueue()
    with pytest.raises(RuntimeError, match="requests have not been finished"):
        switch_mask(base.llm, folder / "a")
    (output,) = base.llm.wait_for_completion(use_tqdm=False)
    assert list(output.outputs[0].token_ids) == expected["base"][0]


def test_masks_of_embeddings_and_heads_are_switched_where_these_are_two_weights(base, folder):
    models.write_mask(folder, "embedded", 4, target_modules=["embed_tokens", "lm_head", "q_proj"])
    switch_mask(base.llm, folder / "embedded")
    assert base.tokens() == models.tokens_of(models.merged(folder, "embedded"), least_lead=0.005)


def test_masks_are_switched_where_they_are_compiled_and_beside_loras(engine, folder, expected):
    both = engine(folder / "base", enforce_eager=False, enable_lora=True, max_lora_rank=8, **EXTENSION)
    untouched = both.checksums()
    for name in ("a", "b", None):
        switch_mask(both.llm, name and folder / name)
        assert both.tokens() == expected[name or "base"]
    assert both.checksums() == untouched


def test_a_tied_embedding_is_refused_and_other_weights_are_not(engine, folder, tmp_path):
    models.write_base(tmp_path / "tied", seed=7, tie_word_embeddings=True)
    models.write_base(tmp_path / "untied", seed=7, tie_word_embeddings=False)
    for name in ("embed_tokens", "q_proj"):
        models.write_mask(tmp_path, name, 3, base="untied", target_modules=[name])
    tied = engine(tmp_path / "tied", **EXTENSION)
    with pytest.raises(AdapterRefusedError, match=r"'model.embed_tokens.weight' is tied: .*lm_head.weight"):
        switch_mask(tied.llm, tmp_path / "embed_tokens")
    switch_mask(tied.llm, tmp_path / "q_proj")
    switch_mask(tied.llm, None)
    tied.llm.collective_rpc("reset_weights")  # weights that somebody else has changed are not the base's
    with pytest.raises(AdapterRefusedError, match="is not in the model as it is in the base checkpoint"):
        switch_mask(tied.llm, tmp_path / "q_proj")


def test_a_merged_export_is_served_by_vllm_as_it_comes_which_says_what_it_lacks_to_switch(
    engine, folder, expected, tmp_path
):
    models.merged(folder, "b").save_pretrained(tmp_path)
    plain = engine(tmp_path, skip_tokenizer_init=True)
    assert plain.tokens() == expected["b"]
    with pytest.raises(RuntimeError, match="start vLLM with --worker-extension-cls"):
        switch_mask(plain.llm, folder / "a")
