"""Masks, the base and a LoRA in one batch of a real vLLM engine."""

import pytest

from tests.vllm import models

pytestmark = [pytest.mark.usefixtures("settings_of_vllm"), pytest.mark.filterwarnings("default")]  # vLLM's own warnings

OPTIONS = {
    "worker_extension_cls": "peft_mask.vllm.MixedMasks",
    "enable_lora": True,
    "max_lora_rank": 8,
    "max_cpu_loras": 4,
}
NUMBERS = {name: number for number, name in enumerate((*models.MASKS, "ranked", models.LORA, "damaged", "foreign"), 1)}
MIXTURE = ["a", "base", "b", "lora", "lora", "a", "base", "b"]


class Mixed:
    def __init__(self, engine, folder, expected):
        self.engine, self.folder, self.expected = engine, folder, expected

    def word(self, name):
        from tests.vllm.engines import named

        return None if name == "base" else named(self.folder, name, NUMBERS[name])

    def check(self, names):
        """Answer a prompt for each name in one batch, hold it against the merged models, return the cached tokens."""
        which = [place % len(models.PROMPTS) for place in range(len(names))]
        outputs = self.engine.outputs([models.PROMPTS[each] for each in which], [self.word(name) for name in names])
        for name, each, output in zip(names, which, outputs, strict=True):
            assert list(output.outputs[0].token_ids) == self.expected[name][each], (name, names)
        return [output.num_cached_tokens for output in outputs]


@pytest.fixture(scope="module", params=[1, 3], ids=lambda slots: f"{slots} slots")
def mixed(request, engine, folder, expected):
    return Mixed(engine(folder / "base", max_loras=request.param, **OPTIONS), folder, expected)


def test_each_row_has_the_tokens_of_its_merged_model_also_from_the_prefix_cache(mixed):
    mixed.check(MIXTURE)
    assert min(mixed.check(MIXTURE)) >= 64


def test_more_adapters_than_slots_and_memory_take_turns(mixed):
    for names in (["c", "ranked", "a"], ["b", "c", "lora", "base"], ["a", "b", "c", "ranked", "lora", "base"], MIXTURE):
        mixed.check(names)


@pytest.mark.parametrize(
    ("name", "reason"), [("damaged", "checksum is wrong"), ("foreign", "not the one it was trained on")]
)
def test_a_refused_adapter_is_refused_when_it_is_added_and_the_others_go_on(mixed, name, reason):
    with pytest.raises(Exception, match=f"the adapter '{name}' in .* is refused: .*{reason}"):  # of another process
        mixed.engine.llm.llm_engine.add_lora(mixed.word(name))
    mixed.check(MIXTURE)


def test_a_mask_of_what_is_no_linear_layer_is_refused_by_name(mixed, folder):
    from tests.vllm.engines import named

    models.write_mask(folder, "embedding", 3, target_modules=["embed_tokens", "q_proj"])
    with pytest.raises(Exception, match=r"layer 'model.embed_tokens', a VocabParallelEmbedding, computes in a way"):
        mixed.engine.llm.llm_engine.add_lora(named(folder, "embedding", 20))
    mixed.check(MIXTURE)


def test_an_adapter_that_masks_some_layers_leaves_the_others_alone(mixed, folder):
    from tests.vllm.engines import named

    models.write_mask(folder, "some", 3, target_modules=["k_proj", "up_proj"], target_sparsity=0.2)
    alone = models.tokens_of(models.merged(folder, "some"), least_lead=0)
    words = [named(folder, "some", 21), mixed.word("a"), None, named(folder, "some", 21)]
    assert alone != mixed.expected["base"]
    tokens = mixed.engine.tokens(loras=words)
    assert tokens == [alone[0], mixed.expected["a"][1], mixed.expected["base"][2], alone[3]]


def test_an_engine_that_compiles_is_refused_at_its_start(engine, folder, capfd):
    with pytest.raises(RuntimeError):
        engine(folder / "base", **OPTIONS | {"enforce_eager": False})
    said = capfd.readouterr()
    assert "masks cannot be mixed in this engine: it compiles or captures batches" in said.out + said.err
