"""Labels travel: a base with a new head gets as many outputs as the adapter has labels, and their names."""

import json

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, PeftModel, get_peft_model
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForMultipleChoice,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    pipeline,
)

from peft_mask import MaskConfig, Masks, update_model_card
from peft_mask.model.carried import carry
from tests.tiny_models import tiny_config, tiny_model, tiny_tokenizer
from tests.versions import MARKS_WHAT_IT_READS

NAMES = {0: "card", 1: "rate", 2: "code", 3: "fee", 4: "transfer"}
INPUTS = {"input_ids": torch.arange(3, 11)[None]}


def saved_backbone(folder, family="bert"):
    torch.manual_seed(1)
    AutoModel.from_config(tiny_config(family)).save_pretrained(folder)
    return folder


def trained(base, automatic=AutoModelForSequenceClassification, task="SEQ_CLS", **config):
    """A model with a random mask and a head that no fresh model has."""
    torch.manual_seed(2)
    model = automatic.from_pretrained(base, **config)
    model = get_peft_model(model, MaskConfig(task_type=task, init_weights=False, target_sparsity=0.05))
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            torch.nn.init.normal_(parameter.data)
    return model.eval()


@pytest.fixture
def base(tmp_path):
    return saved_backbone(tmp_path / "base")


def logits(model):
    with torch.inference_mode():
        return model.eval()(**INPUTS).logits


def test_an_adapter_is_loaded_by_its_name_alone_with_as_many_labels_as_it_has(base, tmp_path):
    model = trained(base, id2label=NAMES)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.config.id2label == NAMES
    assert loaded.config.label2id == {name: place for place, name in NAMES.items()}
    assert loaded.config.num_labels == loaded.get_base_model().num_labels == 5


def test_a_pipeline_made_from_the_adapters_folder_says_the_names(base, tmp_path):
    model = trained(base, id2label=NAMES)
    model.save_pretrained(tmp_path / "adapter")
    answers = pipeline("text-classification", model=str(tmp_path / "adapter"), tokenizer=tiny_tokenizer(), top_k=5)
    words = "w4 w9 w7"
    with torch.inference_mode():
        wanted = model(**tiny_tokenizer()(words, return_tensors="pt")).logits.softmax(-1)[0]
    assert {answer["label"]: pytest.approx(answer["score"]) for answer in answers([words])[0]} == {
        NAMES[place]: score for place, score in enumerate(wanted.tolist())
    }


def test_a_pipeline_tags_tokens_with_the_names(base, tmp_path):
    trained(base, AutoModelForTokenClassification, "TOKEN_CLS", id2label=NAMES).save_pretrained(tmp_path / "adapter")
    found = pipeline("token-classification", model=str(tmp_path / "adapter"), tokenizer=tiny_tokenizer())("some words")
    assert found
    assert {one["entity"] for one in found} <= set(NAMES.values())


def test_the_number_travels_where_nobody_named_the_labels(base, tmp_path):
    model = trained(base, num_labels=4)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.config.id2label == {place: f"LABEL_{place}" for place in range(4)}


def test_a_merged_model_keeps_number_and_names_in_its_checkpoint(base, tmp_path):
    model = trained(base, id2label=NAMES)
    model.save_pretrained(tmp_path / "adapter")
    plain = AutoModelForSequenceClassification.from_pretrained(base)
    PeftModel.from_pretrained(plain, tmp_path / "adapter").merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert merged.config.id2label == NAMES
    torch.testing.assert_close(logits(merged), logits(model))  # a product may round by where a file's tensor lies


def test_without_the_adapter_the_model_has_a_head_of_that_size_that_was_not_trained(base, tmp_path):
    trained(base, id2label=NAMES).save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(base), tmp_path / "adapter")
    with loaded.disable_adapter():
        without = logits(loaded)
    assert without.shape == (1, 5)
    assert without.isfinite().all()
    assert not torch.equal(without, logits(loaded))


def test_a_loaded_adapter_is_trained_on_with_the_loss_of_its_labels(base, tmp_path):
    trained(base, id2label=NAMES).save_pretrained(tmp_path / "adapter")
    plain = AutoModelForSequenceClassification.from_pretrained(base)
    with (
        pytest.warns(UserWarning, match="holds masks without scores"),
        pytest.warns(UserWarning, match="the model had 3 labels and has 5 now"),
    ):
        loaded = PeftModel.from_pretrained(plain, tmp_path / "adapter", is_trainable=True)
    loaded(**INPUTS, labels=torch.tensor([4])).loss.backward()
    head = loaded.get_base_model().classifier.modules_to_save["default"]
    assert head.weight.grad.shape[0] == 5
    assert head.weight.grad.any()


def test_settings_of_an_adapter_that_a_new_task_takes_bring_its_labels_with_a_word(base, tmp_path):
    trained(base, id2label=NAMES).save_pretrained(tmp_path / "adapter")

    def wrapped(**own):
        settings = MaskConfig.from_pretrained(tmp_path / "adapter")
        for name, value in own.items():
            setattr(settings, name, value)
        return get_peft_model(AutoModelForSequenceClassification.from_pretrained(base, num_labels=7), settings)

    with pytest.warns(UserWarning, match="had 7 labels and has 5 now, .* set id2label of this one to None"):
        assert logits(wrapped(inference_mode=False)).shape == (1, 5)
    assert logits(wrapped(inference_mode=False, id2label=None)).shape == (1, 7)


def test_saving_again_keeps_the_names(base, tmp_path):
    trained(base, id2label=NAMES).save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter")
    loaded.save_pretrained(tmp_path / "again")
    assert MaskConfig.from_pretrained(tmp_path / "again").id2label == NAMES


def test_a_masked_head_gets_its_number_of_labels_too(base, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(base, id2label=NAMES)
    model = get_peft_model(model, MaskConfig.paper(task_type="SEQ_CLS"))
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(model))


def test_an_image_classifier_without_task_type_brings_its_labels(tmp_path):
    base = saved_backbone(tmp_path / "base", "vit")
    model = trained(base, AutoModelForImageClassification, None, id2label=NAMES)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "adapter")
    assert loaded.config.id2label == NAMES
    assert torch.equal(loaded.classifier.weight, model.base_model.model.classifier.modules_to_save["default"].weight)


def test_masks_alone_bring_no_labels_and_a_head_carried_over_brings_its_own(base, tmp_path):
    trained(base, id2label=NAMES).save_pretrained(tmp_path / "adapter")
    Masks.load(tmp_path / "adapter").save(tmp_path / "alone")
    assert MaskConfig.from_pretrained(tmp_path / "alone").id2label is None
    carry(tmp_path / "adapter", tmp_path / "alone")
    assert MaskConfig.from_pretrained(tmp_path / "alone").id2label == NAMES


# ---- whose labels they are ----


@pytest.mark.skipif(not MARKS_WHAT_IT_READS, reason="transformers does not say what it has read from a checkpoint")
def test_a_head_of_the_bases_own_keeps_its_number(tmp_path):
    tuned = tmp_path / "tuned"
    tiny_model("bert", "seq_cls").save_pretrained(tuned)
    base = saved_backbone(tmp_path / "base")
    trained(base, id2label=NAMES).save_pretrained(tmp_path / "adapter")
    model = AutoModelForSequenceClassification.from_pretrained(tuned)
    with pytest.raises(ValueError, match=r"expected the shape \(3, 32\), the file has \(5, 32\)"):
        PeftModel.from_pretrained(model, tmp_path / "adapter")
    assert model.config.num_labels == 3


def test_labels_that_somebody_has_named_keep_their_number(base, tmp_path):
    trained(base, id2label=NAMES).save_pretrained(tmp_path / "adapter")
    model = AutoModelForSequenceClassification.from_pretrained(base, id2label={0: "no", 1: "yes"})
    with pytest.raises(ValueError, match=r"expected the shape \(2, 32\), the file has \(5, 32\)"):
        PeftModel.from_pretrained(model, tmp_path / "adapter")


def test_other_names_for_as_many_labels_are_said_and_replaced(base, tmp_path):
    trained(base, id2label={0: "no", 1: "yes"}).save_pretrained(tmp_path / "adapter")
    model = AutoModelForSequenceClassification.from_pretrained(base, id2label={0: "yes", 1: "no"})
    with pytest.warns(UserWarning, match="the adapter calls label 0 'no', this model 'yes'"):
        PeftModel.from_pretrained(model, tmp_path / "adapter")
    assert model.config.id2label == {0: "no", 1: "yes"}


def test_names_that_nobody_gave_replace_none(base, tmp_path):
    trained(base).save_pretrained(tmp_path / "adapter")
    own = {0: "no", 1: "yes", 2: "perhaps"}
    model = AutoModelForSequenceClassification.from_pretrained(base, id2label=own)
    PeftModel.from_pretrained(model, tmp_path / "adapter")
    assert model.config.id2label == own


def test_a_second_adapter_leaves_the_labels_of_the_first(base, tmp_path):
    trained(base, id2label=NAMES).save_pretrained(tmp_path / "one")
    trained(base, id2label={place: f"other {place}" for place in range(5)}).save_pretrained(tmp_path / "two")
    model = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "one")
    model.load_adapter(tmp_path / "two", "two")
    assert model.config.id2label == NAMES


def test_a_second_adapter_is_saved_with_the_names_that_it_came_with(base, tmp_path):
    other = {place: f"other {place}" for place in range(5)}
    trained(base, id2label=NAMES).save_pretrained(tmp_path / "one")
    trained(base, id2label=other).save_pretrained(tmp_path / "two")
    model = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "one")
    model.load_adapter(tmp_path / "two", "two")
    model.save_pretrained(tmp_path / "both")
    assert MaskConfig.from_pretrained(tmp_path / "both").id2label == NAMES
    assert MaskConfig.from_pretrained(tmp_path / "both" / "two").id2label == other


def test_models_without_labels_bring_none(tmp_path):
    torch.manual_seed(0)
    choices = AutoModelForMultipleChoice.from_config(tiny_config("bert"))
    for name, model, task in (("lm", tiny_model("llama", "lm"), "CAUSAL_LM"), ("choice", choices, None)):
        get_peft_model(model, MaskConfig(task_type=task)).save_pretrained(tmp_path / name)
        assert json.loads((tmp_path / name / "adapter_config.json").read_text())["id2label"] is None


# ---- files of strangers ----


@pytest.mark.parametrize(
    "names",
    [["a", "b"], {}, {"0": "a", "2": "b"}, {"0": 1}, {"zero": "a"}, {"-1": "a"}, "a", 3, {"0": None}],
    ids=str,
)
def test_labels_of_a_configuration_that_cannot_be_are_refused(names):
    with pytest.raises(ValueError, match=r"id2label must be a dictionary of strings by 0, 1, 2, \.\.\. or None, got"):
        MaskConfig(id2label=names)


def test_places_are_put_in_order():
    assert list(MaskConfig(id2label={"1": "b", "0": "a"}).id2label.items()) == [(0, "a"), (1, "b")]


def test_more_labels_than_the_head_has_are_refused(base, tmp_path):
    trained(base, id2label=NAMES).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    said = json.loads(file.read_text())
    said["id2label"]["5"] = "one more"
    file.write_text(json.dumps(said))
    with pytest.raises(ValueError, match=r"expected the shape \(6, 32\), the file has \(5, 32\)"):
        AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter")


def test_the_card_says_how_to_load_it_and_needs_no_number(base, tmp_path):
    trained(base, id2label=NAMES).save_pretrained(tmp_path / "adapter")
    update_model_card(tmp_path / "adapter")
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert 'model = AutoPeftModelForSequenceClassification.from_pretrained("this/repository")' in card
