"""The types of model that transformers trains for text, images and sound, made small by one rule, as far as that goes.

    model, inputs = small_model("mamba")
    outputs = tensors(model(**inputs))

No family has settings of its own here: sizes are told by the names of the configuration's fields, and of several inputs
the first is taken that the model accepts. What cannot be made this way raises `NotSmallError`, with the reason.
"""

import inspect
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

_TASKS = (
    "SEQUENCE_CLASSIFICATION",
    "CAUSAL_LM",
    "MASKED_LM",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "IMAGE_CLASSIFICATION",
    "AUDIO_CLASSIFICATION",
)
MODEL_TYPES = tuple(
    sorted(
        {name for task in _TASKS for name in getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES")}
        & set(modeling_auto.MODEL_MAPPING_NAMES)
    )
)
LARGEST = 6_000_000  # parameters
VOCABULARY = 128

# a part of a field's name -> its size; the first that fits
_SIZES = {
    "image_token": None,
    "vocab_size": VOCABULARY,
    "type_vocab": None,
    "num_key_value_groups": None,
    "layerdrop": None,
    "kv_head": 2,
    "key_value_heads": 2,
    "query_groups": 2,
    "attention_heads": 4,
    "num_heads": 4,
    "n_head": 4,
    "num_head": 4,
    "heads": 4,
    "head_dim": 16,
    "head_size": 16,
    "d_kv": 16,
    "num_hidden_layers": 2,
    "layers": 2,
    "n_layer": 2,
    "num_blocks": 2,
    "intermediate": 64,
    "ffn": 64,
    "d_ff": 64,
    "feedforward": 64,
    "n_inner": 64,
    "mlp_dim": 64,
    "experts_per_tok": 2,
    "top_k": 2,
    "num_experts": 4,
    "num_local_experts": 4,
    "routed_experts": 4,
    "shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "lora_rank": 8,
    "rope_head_dim": 8,
    "state_size": 8,
    "time_step_rank": 8,
    "hidden_size": 32,
    "hidden_dim": 32,
    "d_model": 32,
    "n_embd": 32,
    "embed_dim": 32,
    "embedding_size": 32,
    "embedding_dim": 32,
    "projection_dim": 32,
    "out_dim": 32,
    "image_size": 32,
    "patch_size": 16,
    "queries": 8,
}

_NOT_SMALL = {  # why not -> types; those of the transformers that constraints.txt pins
    "too large: its sizes stand in lists, or in fields of other names": (
        "bit blt convnext convnextv2 cvt dots3_note efficientnet flaubert hgnet_v2 levit llama4 perceiver "
        "poolformer pvt recurrent_gemma regnet resnet seamless_m4t seamless_m4t_v2 textnet vibevoice_asr xlm"
    ),
    "needs a library that is not asked for": "dinat gemma3n layoutlmv2 timm_wrapper",
    "its default configuration, or the one made small, is refused": (
        "cohere_compass_text dbrx donut-swin dots1 emu3 esm funnel gemma3n_text hunyuan_v1_dense "
        "hunyuan_v1_moe lfm2_moe ministral musicgen musicgen_melody nemotron neomme reformer swinv2"
    ),
    "its sizes do not fit together when made small, or it needs other inputs": (
        "audio-spectrogram-transformer axk1 axk2 bamba codegen deepseek_v2 deepseek_v3 deepseek_v32 "
        "dots3_note_text ernie4_5_moe esmc falcon_h1 glm4_moe_lite glm_moe_dsa gptj granitemoehybrid helium "
        "hy_v4 lilt longcat_flash minicpm3 mistral4 mobilebert sew sew-d siglip siglip2 swin voxtral_realtime "
        "xmod youtu zamba zamba2"
    ),
}
NOT_SMALL = {name: reason for reason, names in _NOT_SMALL.items() for name in names.split()}


class NotSmallError(Exception):
    """Why a type of model cannot be made small by this rule."""


def small_config(model_type: str) -> PretrainedConfig:
    """Return the default configuration of a type of model with every size in it made small."""
    try:
        config = AutoConfig.for_model(model_type)
        _shrink(config)
    except Exception as error:
        raise NotSmallError(f"configuration: {_told(error)}") from error
    return config


def small_model(model_type: str) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """Return a random model without a head, in evaluation, with inputs that it accepts; the same ones each time.

    Raises:
        NotSmallError: if there is none.
    """
    config = small_config(model_type)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with torch.device("meta"):
                size = sum(p.numel() for p in AutoModel.from_config(config).parameters())
            if size > LARGEST:
                raise NotSmallError(f"{size:,} parameters")
            torch.manual_seed(0)
            model = AutoModel.from_config(small_config(model_type), attn_implementation="eager").float().eval()
        except NotSmallError:
            raise
        except Exception as error:
            raise NotSmallError(f"model: {_told(error)}") from error
        refusals = []
        for inputs in _inputs(model):
            try:
                found = tensors(outputs(model, inputs))
            except Exception as error:
                refusals.append(_told(error))
            else:
                if found and all(tensor.isfinite().all() for tensor in found):
                    return model, inputs
                refusals.append("outputs that are not finite" if found else "no outputs")
    raise NotSmallError(f"inputs: {refusals[0] if refusals else 'none known'}")


def outputs(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> Any:
    """Call a model, with the same random numbers each time."""
    torch.manual_seed(1)
    return model(**inputs)


def tensors(found: Any) -> list[torch.Tensor]:
    """Return the floating tensors among the outputs of a model, caches aside."""
    if isinstance(found, torch.Tensor):
        return [found] if found.is_floating_point() else []
    if isinstance(found, dict):
        found = list(found.values())
    if isinstance(found, (list, tuple)):
        return [tensor for item in found for tensor in tensors(item)]
    return []


def _shrink(config: PretrainedConfig) -> None:
    if getattr(config, "use_cache", False):
        config.use_cache = False  # that of hybrid models wants one layer of each kind
    for name, value in list(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            _shrink(value)
        elif type(value) is int and value > 0:
            size = next((size for part, size in _SIZES.items() if part in name), None)
            if size is not None and size < value:
                setattr(config, name, size)
    for name, value in list(vars(config).items()):
        if name.endswith(("_token_id", "_token_index")) and type(value) is int and value >= VOCABULARY:
            setattr(config, name, 2)
        elif name == "layer_types" and isinstance(value, list):
            setattr(config, name, value[: getattr(config, "num_hidden_layers", 2)])


def _inputs(model: PreTrainedModel) -> Iterator[dict[str, torch.Tensor]]:
    """Yield what a model may want to be called with: text, images, sound."""
    takes = inspect.signature(model.forward).parameters
    ids = torch.arange(20).view(2, 10) % 90 + 10
    generator = torch.Generator().manual_seed(0)
    decoder = {"decoder_input_ids": ids} if "decoder_input_ids" in takes else {}
    vision = getattr(model.config, "vision_config", model.config)
    side = getattr(vision, "image_size", None) or 32
    side = side if isinstance(side, int) else side[0]
    channels = getattr(vision, "num_channels", None) or 3

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    text = {"input_ids": ids}
    if "input_ids" in takes:
        yield text
        yield text | decoder
    images = [{"pixel_values": noise(2, channels, size, size)} for size in (side, 64, 224)]
    images.append({"pixel_values": noise(2, 4, channels, side, side)})
    for image in images if "pixel_values" in takes else []:
        yield image
        if "input_ids" in takes:
            yield text | image
    for name in ("input_values", "input_features"):
        for shape in ((2, 2000), (2, 50, 80), (2, 50, 160), (2, 80, 3000)) if name in takes else ():
            yield {name: noise(*shape)} | decoder


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:160]
