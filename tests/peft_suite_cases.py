"""What PEFT's own tests ask of this tuner: rows for the tables that `peft_suite` fills."""

from peft_mask import MaskConfig

# The layers of these tests have a hundred weights: of the default's half per cent, one would be off.
SPARSE = {"target_sparsity": 0.3, "candidates": None}

CUSTOM = [
    ("mask lin0", "MLP", MaskConfig, {"target_modules": "lin0", **SPARSE}),
    ("mask lin0 lin1", "MLP", MaskConfig, {"target_modules": ["lin0", "lin1"], **SPARSE}),
    ("mask candidates", "MLP", MaskConfig, {"target_modules": ["lin0"], "target_sparsity": 0.2, "candidates": 0.5}),
    ("mask threshold", "MLP", MaskConfig, {"target_modules": ["lin0"], "binarizer": "threshold", "candidates": None}),
    ("mask sign", "MLP", MaskConfig, {"target_modules": ["lin0"], "binarizer": "sign", "candidates": None}),
    (
        "mask bernoulli",
        "MLP",
        MaskConfig,
        # as likely off as kept: a few steps decide otherwise
        {"target_modules": ["lin0"], "binarizer": "bernoulli", "candidates": None, "init_sparsity": 0.4999},
    ),
    (
        "mask n:m",
        "MLP",
        MaskConfig,
        {"target_modules": ["lin0"], "binarizer": "n:m", "pattern": "1:2", "candidates": None},
    ),
    (
        "mask n:m Conv1D",
        "EmbConv1D",
        MaskConfig,
        {"target_modules": ["conv1d"], "binarizer": "n:m", "pattern": "1:5", "candidates": None},
    ),
    ("mask rows", "MLP", MaskConfig, {"target_modules": ["lin0"], "structure": "row", **SPARSE}),
    (
        "mask columns Conv2d",
        "Conv2d",
        MaskConfig,
        {"target_modules": ["conv2d"], "structure": "column", **SPARSE},
    ),
    ("mask head", "MLP", MaskConfig, {"target_modules": ["lin0"], "modules_to_save": ["lin1"], **SPARSE}),
    (
        "mask random",
        "MLP",
        MaskConfig,
        {"target_modules": ["lin0"], "candidate_rule": "random", "candidates": 0.5, "target_sparsity": 0.2},
    ),
    (
        "mask all but one",
        "MLP",
        MaskConfig,
        {"target_modules": ["lin0", "lin1"], "exclude_modules": ["lin1"], **SPARSE},
    ),
    ("mask lin1", "MLP", MaskConfig, {"target_modules": ["lin1"], **SPARSE}),
    (
        "mask head seeded",
        "MLP",
        MaskConfig,
        {"target_modules": ["lin0"], "modules_to_save": ["lin1"], "seed": 7, **SPARSE},
    ),
    ("mask Conv1D", "EmbConv1D", MaskConfig, {"target_modules": ["conv1d"], **SPARSE}),
    ("mask Embedding", "EmbConv1D", MaskConfig, {"target_modules": ["emb"], **SPARSE}),
    ("mask Embedding and Conv1D", "EmbConv1D", MaskConfig, {"target_modules": ["emb", "conv1d"], **SPARSE}),
    ("mask Conv1d", "Conv1d", MaskConfig, {"target_modules": ["conv1d", "lin0"], **SPARSE}),
    ("mask Conv1d wide", "Conv1dBigger", MaskConfig, {"target_modules": ["conv1d"], **SPARSE}),
    ("mask Conv2d", "Conv2d", MaskConfig, {"target_modules": ["conv2d"], **SPARSE}),
    ("mask Conv2d and Linear", "Conv2d", MaskConfig, {"target_modules": ["conv2d", "lin0"], **SPARSE}),
    ("mask Conv2d groups", "Conv2dGroups", MaskConfig, {"target_modules": ["conv2d"], **SPARSE}),
    ("mask Conv3d", "Conv3d", MaskConfig, {"target_modules": ["conv3d"], **SPARSE}),
    ("mask attention", "MHA", MaskConfig, {"target_modules": ["mha"], **SPARSE}),
    ("mask attention and Linear", "MHA", MaskConfig, {"target_modules": ["mha", "lin0"], **SPARSE}),
    ("mask parameters", "MlpUsingParameters", MaskConfig, {"target_parameters": ["lin0.weight"], **SPARSE}),
]
VISION = {"mask": MaskConfig(target_modules=["convolution"], modules_to_save=["classifier", "normalization"], **SPARSE)}
RANDOM = {**SPARSE, "init_weights": False}
LIN0, LIN1 = {"target_modules": ["lin0"], **RANDOM}, {"target_modules": ["lin1"], **RANDOM}
MULTIPLE = [
    ("mask same", "peft_mask", MaskConfig, LIN0, {**LIN0, "seed": 1}),
    ("mask other", "peft_mask", MaskConfig, LIN0, LIN1),
]
MIXED = [
    ("mask same", MaskConfig(**LIN0), MaskConfig(**{**LIN0, "seed": 1})),
    ("mask other", MaskConfig(**LIN0), MaskConfig(**LIN1)),
]


def _row(task_type, **fields):
    return [(MaskConfig, {"task_type": task_type, **SPARSE, **fields})]


CONFIGS = {
    "decoder": _row("CAUSAL_LM"),
    "encoder_decoder": _row("SEQ_2_SEQ_LM"),
    "feature_extraction": _row("FEATURE_EXTRACTION", exclude_modules=["pooler.dense"]),
    "seq_classifier": _row("SEQ_CLS"),
    "token_classification": _row("TOKEN_CLS"),
    "question_answering": _row("QUESTION_ANS"),
    "quantization": _row("CAUSAL_LM", target_modules=["q_proj", "v_proj"]),
    "config": [(MaskConfig, {})],
}

_BITS = "an adapter loaded for inference holds its mask as bits and no scores"
XFAIL = {
    r"test_disable_adapters(_with_merging)?\[mask n:m": "an N:M mask switches weights off from the start on",
    r"test_save_pretrained(?!\[MaskConfig-mandatory)(_pickle|_selected_adapters|_selected_adapters_pickle)?\[": _BITS,
    r"test_parameters_after_loading_model\[": _BITS,
    r"test_add_adapter_no_autocast_adapter_dtype\[": _BITS,
}
