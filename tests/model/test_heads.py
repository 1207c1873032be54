"""What is new in a model is trained and saved with the adapter, or it is said that it is not."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForAudioClassification,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSemanticSegmentation,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertModel,
    BertPreTrainedModel,
)

from peft_mask import MaskConfig
from peft_mask.layers.mask_layer import MaskLayer
from peft_mask.model.heads import new_modules
from tests.tiny_models import tiny_model
from tests.versions import MARKS_WHAT_IT_READS

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 60}
SHAPES = {
    "bert": {"vocab_size": 64, **TINY},
    "roberta": {"vocab_size": 64, **TINY},
    "llama": {"vocab_size": 64, "num_key_value_heads": 1, **TINY},
    "vit": {"image_size": 8, "patch_size": 4, **TINY},
    "segformer": {
        "num_encoder_blocks": 2,
        "depths": [1, 1],
        "sr_ratios": [1, 1],
        "hidden_sizes": [8, 16],
        "patch_sizes": [3, 3],
        "strides": [2, 2],
        "num_attention_heads": [1, 1],
        "mlp_ratios": [1, 1],
        "decoder_hidden_size": 8,
    },
    "wav2vec2": {
        "conv_dim": [8],
        "conv_stride": [2],
        "conv_kernel": [3],
        "num_feat_extract_layers": 1,
        **TINY,
        "num_conv_pos_embeddings": 4,
        "num_conv_pos_embedding_groups": 2,
        "classifier_proj_size": 8,
    },
}

marked = pytest.mark.skipif(not MARKS_WHAT_IT_READS, reason="needs transformers>=5")


def from_config(automatic, family, **more):
    torch.manual_seed(0)
    return automatic.from_config(AutoConfig.for_model(family, **{**SHAPES[family], **more}))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    for family in SHAPES:
        from_config(AutoModel, family).save_pretrained(folder / family)
    from_config(AutoModelForMaskedLM, "bert").save_pretrained(folder / "bert-lm")  # without a pooler
    from_config(AutoModelForCausalLM, "llama").save_pretrained(folder / "llama-lm")
    from_config(AutoModelForSequenceClassification, "bert", num_labels=3).save_pretrained(folder / "bert-tuned")
    from_config(AutoModelForImageClassification, "vit", num_labels=3).save_pretrained(folder / "vit-tuned")
    return folder


def trained(model):
    return {
        name.split(".modules_to_save")[0].removeprefix("base_model.model.")
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and "peft_mask" not in name
    }


def drawn(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


IMAGE = {"pixel_values": drawn(2, 3, 8, 8)}
TEXT = {"input_ids": torch.arange(2, 14).view(2, 6)}
NEW_HEADS = [
    (AutoModelForImageClassification, "vit", {"classifier"}, IMAGE),
    (AutoModelForSequenceClassification, "bert", {"classifier"}, TEXT),
    pytest.param(AutoModelForSequenceClassification, "bert-lm", {"classifier", "bert.pooler"}, TEXT, marks=marked),
    (AutoModelForSequenceClassification, "llama", {"score"}, {"input_ids": TEXT["input_ids"][:1]}),
    (AutoModelForTokenClassification, "roberta", {"classifier"}, TEXT),
    (AutoModelForQuestionAnswering, "bert", {"qa_outputs"}, TEXT),
    (AutoModelForMultipleChoice, "bert", {"classifier"}, {"input_ids": TEXT["input_ids"].view(1, 2, 6)}),
    (AutoModelForSemanticSegmentation, "segformer", {"decode_head"}, {"pixel_values": drawn(1, 3, 16, 16)}),
    (AutoModelForAudioClassification, "wav2vec2", {"projector", "classifier"}, {"input_values": drawn(1, 64)}),
]


@pytest.mark.parametrize(("automatic", "checkpoint", "head", "inputs"), NEW_HEADS)
def test_a_new_head_is_trained_saved_and_loaded_without_a_task_type(
    automatic, checkpoint, head, inputs, checkpoints, tmp_path
):
    fields = {"num_labels": 1} if automatic in (AutoModelForSequenceClassification, AutoModelForMultipleChoice) else {}

    def base():
        return automatic.from_pretrained(checkpoints / checkpoint, **fields)

    model = get_peft_model(base(), MaskConfig()).eval()
    assert trained(model) == head
    assert not any(isinstance(model.get_submodule(f"base_model.model.{name}"), MaskLayer) for name in head)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path).eval()
    with torch.no_grad():
        for one, other in zip(model(**inputs).to_tuple(), loaded(**inputs).to_tuple(), strict=True):
            assert not isinstance(one, torch.Tensor) or torch.equal(one, other)


@pytest.mark.parametrize("automatic", [AutoModelForSequenceClassification, AutoModelForImageClassification])
@pytest.mark.parametrize("copied", [False, True])
def test_of_a_model_of_unknown_origin_the_class_says_whether_its_head_is_new(automatic, copied, checkpoints):
    family = "vit" if automatic is AutoModelForImageClassification else "bert"
    base = automatic.from_pretrained(checkpoints / family) if copied else from_config(automatic, family)
    base = copy.deepcopy(base)
    assert new_modules(base) is None
    assert trained(get_peft_model(base, MaskConfig())) == {"classifier"}


def test_a_name_that_ends_as_another_does_not_take_the_backbone_along():
    sizes = {"vocab_size": 64, "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 60}
    base = AutoModelForSequenceClassification.from_config(AutoConfig.for_model("distilbert", **sizes))
    assert trained(get_peft_model(base, MaskConfig())) == {"pre_classifier", "classifier"}
    sizes = {"depths": [1] * 4, "hidden_sizes": [8] * 4}  # its head is a norm and a classifier, its blocks have norms
    base = AutoModelForImageClassification.from_config(AutoConfig.for_model("poolformer", **sizes))
    with pytest.warns(UserWarning, match=r"neither trained nor saved.* not in its checkpoint: norm\."):
        model = get_peft_model(base, MaskConfig(target_modules=["conv1"]))
    assert trained(model) == {"classifier"}


@marked
@pytest.mark.parametrize(
    ("automatic", "checkpoint"),
    [
        (AutoModelForSequenceClassification, "bert-tuned"),
        (AutoModelForImageClassification, "vit-tuned"),
        (AutoModelForMaskedLM, "bert-lm"),
        (AutoModelForCausalLM, "llama-lm"),
        (AutoModel, "bert"),
        (AutoModel, "vit"),
    ],
)
def test_what_the_checkpoint_holds_stays_as_it_is(automatic, checkpoint, checkpoints):
    base = automatic.from_pretrained(checkpoints / checkpoint)
    assert new_modules(base) == []
    assert trained(get_peft_model(base, MaskConfig())) == set()  # and warnings are errors


@marked
def test_a_head_for_another_number_of_labels_is_new(checkpoints):
    base = AutoModelForImageClassification.from_pretrained(
        checkpoints / "vit-tuned", num_labels=5, ignore_mismatched_sizes=True
    )
    assert trained(get_peft_model(base, MaskConfig())) == {"classifier"}


@pytest.mark.parametrize("automatic", [AutoModelForMaskedLM, AutoModelForCausalLM])
def test_language_models_of_a_configuration_train_no_head(automatic):
    for family in ("bert", "llama") if automatic is AutoModelForCausalLM else ("bert",):
        base = from_config(automatic, family, **({"is_decoder": True} if family == "bert" else {}))
        assert trained(get_peft_model(base, MaskConfig())) == set()


@marked
@pytest.mark.parametrize(
    ("automatic", "checkpoint", "named"),
    [
        (AutoModelForMaskedLM, "bert", "cls.predictions.transform"),
        (AutoModel, "bert-lm", "pooler"),
    ],
)
def test_what_is_new_and_not_clearly_a_task_head_is_said(automatic, checkpoint, named, checkpoints):
    with pytest.warns(UserWarning, match=f"neither trained nor saved, .* not in its checkpoint: {named}"):
        model = get_peft_model(automatic.from_pretrained(checkpoints / checkpoint), MaskConfig())
    assert trained(model) == set()
    assert not any("pooler" in name for name, module in model.named_modules() if isinstance(module, MaskLayer))
    base = automatic.from_pretrained(checkpoints / checkpoint)
    assert trained(get_peft_model(base, MaskConfig(modules_to_save=[named]))) == {named}
    base = automatic.from_pretrained(checkpoints / checkpoint)
    assert trained(get_peft_model(base, MaskConfig(modules_to_save=[]))) == set()


@marked
def test_a_larger_vocabulary_is_no_new_head(checkpoints):
    base = AutoModelForCausalLM.from_pretrained(checkpoints / "llama-lm")
    base.resize_token_embeddings(70)
    assert new_modules(base) == []


class Tagger(BertPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.bert = BertModel(config)
        self.tags = nn.ModuleList([nn.Linear(32, 2), nn.Linear(32, 3)])
        self.post_init()


@marked
def test_a_class_of_ones_own(checkpoints):
    assert trained(get_peft_model(Tagger.from_pretrained(checkpoints / "bert"), MaskConfig())) == {"tags.0", "tags.1"}
    config = AutoConfig.for_model("bert", **SHAPES["bert"])
    with pytest.warns(UserWarning, match="Tagger has modules that are neither trained nor saved.*: tags"):
        get_peft_model(Tagger(config), MaskConfig())


@marked
def test_the_modules_a_user_names_are_kept_and_the_head_completed(checkpoints):
    def model(**fields):
        base = AutoModelForAudioClassification.from_pretrained(checkpoints / "wav2vec2")
        return get_peft_model(base, MaskConfig(**fields))

    assert trained(model(modules_to_save=["classifier"])) == {"projector", "classifier"}
    assert trained(model(modules_to_save=["feature_projection"])) == {
        "projector",
        "classifier",
        "wav2vec2.feature_projection",
    }
    assert trained(model(modules_to_save=[])) == set()


@marked
def test_another_task_type_does_not_train_the_head_but_says_so(checkpoints):
    base = AutoModelForSequenceClassification.from_pretrained(checkpoints / "bert")
    with pytest.warns(UserWarning, match="neither trained nor saved.*: classifier"):
        model = get_peft_model(base, MaskConfig(task_type="FEATURE_EXTRACTION"))
    assert trained(model) == set()


def test_an_adapter_saved_without_a_head_loads_without_one(checkpoints, tmp_path):
    def base():
        return AutoModelForImageClassification.from_pretrained(checkpoints / "vit")

    get_peft_model(base(), MaskConfig(modules_to_save=[])).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path)
    assert "modules_to_save" not in dict(loaded.named_modules())


def test_a_second_adapter_trains_the_same_head(checkpoints):
    model = get_peft_model(AutoModelForImageClassification.from_pretrained(checkpoints / "vit"), MaskConfig())
    model.add_adapter("b", MaskConfig())
    assert model.peft_config["b"].modules_to_save == model.peft_config["default"].modules_to_save == ["classifier"]


@pytest.mark.parametrize(
    ("family", "named", "masked"),
    [
        ("bert", r".*query|classifier", True),
        ("roberta", r".*query|classifier\.(dense|out_proj)", True),
        ("roberta", ["dense"], False),  # of the head's two layers the other one would be left random
    ],
)
def test_a_head_that_is_named_as_a_target_is_masked_and_not_trained_whole(family, named, masked):
    model = get_peft_model(tiny_model(family), MaskConfig(target_modules=named))
    classifier = model.base_model.model.classifier
    assert isinstance(classifier, ModulesToSaveWrapper) != masked
    if masked:
        linear = [module for module in classifier.modules() if isinstance(module, torch.nn.Linear)]
        layers = [module for module in classifier.modules() if isinstance(module, MaskLayer)]
        assert [layer.get_base_layer() for layer in layers] == linear


@pytest.mark.skipif(not MARKS_WHAT_IT_READS, reason="this transformers does not say what a checkpoint held")
def test_a_new_head_that_is_named_as_a_target_is_trained_whole_as_no_one_would_keep_its_weights(tmp_path):
    AutoModel.from_config(AutoConfig.for_model("bert", vocab_size=64, **TINY)).save_pretrained(tmp_path)
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="classifier"):
        model = get_peft_model(base, MaskConfig(target_modules=["query", "classifier"]))
    assert isinstance(model.base_model.model.classifier, ModulesToSaveWrapper)
