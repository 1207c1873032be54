"""What the room relies on inside vLLM 0.32, public or not: each name with its parameters, or with what its source says.

A release that moves one of these fails here with its name and what it is for. Until this list has been gone through for
another release, `peft_mask.vllm` refuses it.
"""

import ast
import importlib
import inspect
from pathlib import Path
from typing import NamedTuple

import pytest

pytestmark = [pytest.mark.usefixtures("settings_of_vllm"), pytest.mark.filterwarnings("default")]

ROOM = Path(__file__).parents[2] / "peft_mask" / "vllm"


class Name(NamedTuple):
    """One thing relied on.

    Attributes:
        place: `module:qualified.name`.
        use: what the room does with it.
        takes: the names of its parameters; None if it is not called.
        says: what its source says, for attributes that are made in it.
    """

    place: str
    use: str
    takes: str | None = None
    says: tuple[str, ...] = ()

    def __str__(self):
        return self.place.partition(":")[2]


MANAGER, WORKER = "vllm.lora.model_manager:LoRAModelManager", "vllm.lora.worker_manager:WorkerLoRAManager"
LINEAR = "vllm.lora.layers.base_linear:BaseLinearLayerWithLoRA"
MERGED = "vllm.lora.layers.column_parallel_linear:MergedColumnParallelLinearWithLoRA"
PATCHES = "vllm.model_executor.model_loader.checkpoint_weight_patch"
ASYNC, OFFLINE = "vllm.v1.engine.async_llm:AsyncLLM", "vllm.v1.engine.llm_engine:LLMEngine"

NAMES = [
    # switching
    Name(f"{PATCHES}:CheckpointWeightPatch", "a patch", "name shape dtype values indices"),
    Name(
        f"{PATCHES}:load_checkpoint_weight_patches",
        "writes them",
        "model patches max_chunk_bytes validate_unique_indices",
    ),
    Name(f"{PATCHES}:_load_nan_masked_weights", "is held against the model as it does", says=("torch.Tensor.copy_ =",)),
    Name("vllm.v1.worker.gpu_worker:Worker.compute_weight_checksums", "digests, in tests", "self"),
    Name("vllm.v1.worker.gpu_worker:Worker.__init__", "a worker's configuration", says=("vllm_config",)),
    Name("vllm.v1.worker.gpu_worker:Worker.get_model", "its model", "self", ("self.model_runner.get_model()",)),
    Name(
        "vllm.v1.worker.worker_base:WorkerWrapperBase.init_worker",
        "asks for the extension before the model is loaded",
        says=("resolve_obj_by_qualname", "worker_class.__bases__"),
    ),
    Name("vllm.v1.serial_utils:run_method", "tells that workers lack a method", says=("is not implemented.",)),
    Name("vllm:LLM.collective_rpc", "calls the workers", "self method timeout args kwargs"),
    Name("vllm:LLM.reset_prefix_cache", "forgets old keys and values", "self reset_running_requests reset_connector"),
    Name("vllm:LLM.reset_mm_cache", "and old images", "self"),
    Name(f"{OFFLINE}.has_unfinished_requests", "nothing is switched under a request", "self"),
    Name(f"{OFFLINE}.reset_encoder_cache", "forgets what encoders made", "self"),
    Name(f"{ASYNC}.collective_rpc", "calls the workers", "self method timeout args kwargs"),
    Name(f"{ASYNC}.pause_generation", "lets requests end and empties all caches", "self mode clear_cache"),
    Name(
        "vllm.v1.engine.core:EngineCore._reset_caches",
        "all of them",
        says=("reset_prefix_cache(", "reset_encoder_cache("),
    ),
    Name(f"{ASYNC}.resume_generation", "goes on", "self"),
    Name(f"{ASYNC}.is_paused", "leaves paused what others paused", "self"),
    Name(
        "vllm.config:ModelConfig",
        "says what is served",
        says=(
            "model: str",
            "revision: str",
            "quantization:",
            "enforce_eager: bool",
            "def use_mla",
            "def is_multimodal_model",
        ),
    ),
    Name(
        "vllm.config:ParallelConfig",
        "says where",
        says=("tensor_parallel_size: int", "pipeline_parallel_size: int", "enable_expert_parallel: bool"),
    ),
    Name("vllm.config:LoadConfig", "says where downloads lie", says=("download_dir:",)),
    Name(
        "vllm.model_executor.layers.utils:dispatch_cpu_unquantized_gemm",
        "replaced: packs weights on a CPU",
        "layer remove_weight",
    ),
    Name(
        "vllm.model_executor.layers.utils:cpu_unquantized_gemm",
        "how it is used",
        says=("layer.cpu_linear(x, weight, bias)",),
    ),
    # the endpoint
    Name("vllm.plugins:load_endpoint_plugins", "finds the endpoint", says=("ENDPOINT_PLUGINS_GROUP", "factory()")),
    Name("vllm.plugins.endpoint_plugins.interface:EndpointPlugin.attach_router", "adds routes", "self app"),
    Name(
        "vllm.plugins.endpoint_plugins.interface:EndpointPlugin.init_state",
        "has the engine",
        "self engine_client state args",
    ),
    Name("vllm.plugins.endpoint_plugins.interface:EndpointPlugin", "both", says=("name: str", "required_tasks:")),
    # mixed batches
    Name(
        "vllm.lora.worker_manager:LRUCacheWorkerLoRAManager.create_lora_manager",
        "replaced: checks the engine",
        "self model vllm_config",
        ("self._adapter_manager = lora_manager",),
    ),
    Name(f"{WORKER}._load_adapter", "replaced: reads a mask", "self lora_request"),
    Name(f"{MANAGER}._create_merged_loras_inplace", "replaced: a mask has no matrices", "self lora_model"),
    Name(
        f"{MANAGER}.activate_adapter",
        "replaced: puts a mask into a slot",
        "self lora_id",
        ("self.lora_index_to_id[index] = lora_model.id", "module.reset_lora(index)"),
    ),
    Name(f"{MANAGER}._set_adapter_mapping", "replaced: tells whose tokens are", "self mapping"),
    Name(
        f"{LINEAR}._apply_sync",
        "replaced: computes with masks",
        "self x bias",
        ("self._get_quant_method().apply(self.base_layer, x, bias)",),
    ),
    Name(f"{LINEAR}._apply_lora_to_output", "adds LoRAs", "self x output"),
    Name(f"{LINEAR}.apply", "comes to `_apply_sync`", "self x bias", ("self._apply_sync(x, bias)",)),
    Name(f"{MERGED}.apply", "as well", "self x bias", ("super().apply(x, bias)",)),
    Name(
        f"{LINEAR}.__init__", "its attributes", says=("self.base_layer = base_layer", "self._enable_aux_cuda_stream =")
    ),
    Name(f"{LINEAR}.create_lora_weights", "its slots", says=("self.lora_a_stacked =", "self.lora_b_stacked =")),
    Name("vllm.lora.layers.base:BaseLayerWithLoRA.set_mapping", "whom it asks", says=("self.punica_wrapper",)),
    Name(
        f"{MANAGER}.__init__",
        "its attributes",
        says=("self._registered_adapters:", "self.lora_index_to_id:", "self.packed_modules:", "self.modules:"),
    ),
    Name(f"{MANAGER}._init_punica_wrapper", "all it tells", says=("self.punica_wrapper_mapping:",)),
    Name(
        f"{MANAGER}.set_adapter_mapping",
        "tells it anew if slots changed",
        says=("self._last_slot_layout != slot_layout",),
    ),
    Name(f"{MANAGER}.deactivate_adapter", "frees a slot", "self adapter_id"),
    Name(
        "vllm.lora.lora_model:LoRAModel",
        "stands for a mask",
        "lora_model_id rank loras is_3d_lora_weight modules_to_save",
    ),
    Name("vllm.lora.layers.utils:LoRAMapping", "whose tokens are", says=("index_mapping: tuple[int, ...]",)),
    Name("vllm.lora.utils:get_adapter_absolute_path", "finds an adapter", "lora_path"),
    Name(
        "vllm.v1.core.kv_cache_utils:_gen_lora_extra_hash_keys",
        "tells keys and values of adapters apart",
        says=("lora_request.lora_name, lora_request.lora_path",),
    ),
    Name(
        "vllm.lora.ops.torch_ops:bgmv_expand",
        "takes slot -1 for the last one",
        says=("lora_b_weights[lora_indices_tensor]",),
    ),
    Name("vllm.model_executor.layers.linear:UnquantizedLinearMethod", "computes x W^T + b"),
    *[
        Name(f"vllm.model_executor.layers.linear:{kind}Linear", "layers that are masked")
        for kind in ("ColumnParallel", "MergedColumnParallel", "QKVParallel", "RowParallel")
    ],
    Name("vllm.platforms:current_platform.is_cpu", "whether weights would be packed", ""),
]


def thing(name):
    module, _, path = name.place.partition(":")
    found = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    return found


@pytest.mark.parametrize("name", NAMES, ids=str)
def test_what_is_relied_on_is_there(name):
    found = inspect.unwrap(thing(name))  # where mixing was let in, what it has replaced
    if name.takes is not None:
        assert list(inspect.signature(found).parameters) == name.takes.split(), name.use
    if name.says:
        source = inspect.getsource(found)
        assert [words for words in name.says if words not in source] == [], name.use


def private_names(path):
    """The private names in a file that it does not make itself."""
    nodes = list(ast.walk(ast.parse(path.read_text("utf-8"))))
    attributes = {node.attr: node for node in nodes if isinstance(node, ast.Attribute)}
    stored = {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
    defined = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    strings = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    found = {name for name in attributes if name not in defined | stored} | {
        each for each in strings if each.isidentifier()
    }
    return {name for name in found if name.startswith("_") and not name.startswith(("__", "_mask", "_peft_mask"))}


def test_every_private_name_of_vllm_in_the_room_is_listed():
    used = set().union(*map(private_names, ROOM.glob("*.py")))
    listed = " ".join(" ".join([name.place, *name.says]) for name in NAMES)
    assert {"_apply_sync", "_load_adapter", "_adapter_manager"} <= used
    assert [name for name in used if name not in listed] == []
