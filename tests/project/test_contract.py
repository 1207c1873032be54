"""What `peft_mask` relies on in PEFT, transformers, bitsandbytes and torch beyond their public interfaces.

A release that moves one of these fails here with its name and with what it is for, instead of somewhere as a mask that
is silently not there.
"""

import ast
import importlib
import inspect
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement
from peft import get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from tests.tiny_models import tiny_model
from tests.versions import ASKS_BEFORE_PUSHING

PACKAGE = Path(__file__).parents[2] / "peft_mask"
LIBRARIES = ("peft", "transformers", "bitsandbytes", "accelerate")


@dataclass(frozen=True)
class Hook:
    """One thing relied on.

    Attributes:
        place: `module:qualified.name`.
        use: what `peft_mask` does with it.
        passes: names of the arguments that it is called with, in their order; what else it takes must have a default.
        ours: class that overrides it; its parameters must have the same names, as it may be called by name or position.
        says: what its source must say, for names that are looked up in our objects.
        needs: the releases that have it.
    """

    place: str
    use: str
    passes: tuple[str, ...] | None = None
    ours: str = ""
    says: str = ""
    needs: str = ""

    def __str__(self) -> str:
        return self.place.partition(":")[2] + (f" says {self.says}" if self.says else "")


TUNER, LAYER = "peft.tuners.tuners_utils:BaseTuner.", "peft.tuners.tuners_utils:BaseTunerLayer."
CONFIG, BUFFERS, CALLBACK = "peft:PeftConfig.", "peft.tuners._buffer_dict:BufferDict.", "transformers:TrainerCallback."
MODEL, MASK_LAYER = "peft_mask.model.mask_model:MaskModel", "peft_mask.layers.mask_layer:MaskLayer"
MERGING_LAYER = "peft_mask.layers.merging:MergingLayer"
PARAMETER_LAYER = "peft_mask.layers.stand_in:ParamWrapper"
MASK_CALLBACK = "peft_mask.training.callback:MaskCallback"

HOOKS = [
    # serving over several processes
    Hook("ray.serve.api:ingress", "builds the HTTP application in its replica", says="__serve_build_asgi_app__"),
    Hook("ray.serve.handle:DeploymentHandle.broadcast", "tells all replicas of a new version", ("method_name",)),
    # steps
    Hook(
        "torch.optim.optimizer:Optimizer._patch_step_function",
        "tells a step that calls hooks from one that does not",
        says="step.hooked = True",
    ),
    # registering
    Hook("peft.mapping:PEFT_TYPE_TO_CONFIG_MAPPING", "finds MaskConfig by the type in adapter_config.json"),
    Hook("peft.mapping:PEFT_TYPE_TO_TUNER_MAPPING", "finds MaskModel"),
    Hook("peft.mapping:PEFT_TYPE_TO_MIXED_MODEL_MAPPING", "must know all types that the others know"),
    Hook("peft.mapping:PEFT_TYPE_TO_PREFIX_MAPPING", "tells our tensors from the base model's by name"),
    Hook(
        CONFIG + "save_pretrained", "the last thing called on saving, so fills in the card", ours="peft_mask:MaskConfig"
    ),
    Hook(
        "peft:PeftModel.save_pretrained", "saves the configuration last", says="peft_config.save_pretrained(output_dir"
    ),
    # injection
    Hook(TUNER + "prefix", "beginning of the names of our tensors", ours=MODEL),
    Hook(TUNER + "tuner_layer_cls", "PEFT's loops over adapter layers find ours", ours=MODEL),
    Hook(TUNER + "target_module_mapping", "empty: targets are found, not listed by architecture", ours=MODEL),
    Hook(TUNER + "_prepare_adapter_config", "resolves and checks targets before anything changes", ours=MODEL),
    Hook(TUNER + "_check_new_adapter_config", "refuses other target_parameters than an earlier adapter's", ours=MODEL),
    Hook(TUNER + "_add_modules_to_save_to_tie", "says what ensure_weight_tying ties", ours=MODEL),
    Hook("peft.utils.other:set_additional_trainable_modules", "ties it", says='getattr(peft_config, "modules_to_tie"'),
    Hook(TUNER + "_create_and_replace", "puts a masked layer in the place of a module", ours=MODEL),
    Hook(TUNER + "_check_target_module_exists", "matches names without what wrappers add", ours=MODEL),
    Hook(TUNER + "_replace_module", "also puts task heads of several layers back", ours=MODEL),
    Hook(TUNER + "inject_adapter", "then makes room for records that are loaded by name", ours=MODEL),
    Hook(TUNER + "_cast_adapter_dtype", "gives scores the dtype of scores_dtype", ours=MODEL),
    Hook(TUNER + "_inject_parameters", "knows wrappers of parameters by their class's name", says='"ParamWrapper"'),
    Hook(
        "peft.tuners.tuners_utils:check_target_module_exists",
        "target_modules, exclude_modules, layers",
        ("config", "key"),
    ),
    Hook(
        "peft.tuners.tuners_utils:_maybe_include_all_linear_layers",
        "resolves 'all-linear' before targets are checked",
        ("peft_config", "model"),
    ),
    Hook(
        "peft.utils.other:_set_trainable",
        "trains and saves whole what a name in modules_to_save is the end of",
        says="key.endswith(target_key)",
    ),
    Hook(
        "transformers.core_model_loading:set_param_for_module",
        "marks what it has read, so that the rest is known to be new",
        says="param_value._is_hf_initialized = True",
        needs="transformers>=5",
    ),
    Hook("peft.utils.error:NoMatchingPeftModuleError", "what PEFT raises where nothing is adapted; ours says why"),
    Hook("peft.config:PeftConfigMixin.from_peft_type", "knows a later file by it", says="got an unexpected keyword"),
    Hook("peft.utils.constants:EMBEDDING_LAYER_NAMES", "which embeddings PEFT would save whole beside their masks"),
    Hook("transformers.utils.hub:cached_file", "whether a base has a tokenizer", ("path_or_repo_id", "filename")),
    Hook("transformers.pytorch_utils:Conv1D", "GPT-2's linear layer, whose weight is transposed"),
    # layers
    Hook(LAYER + "adapter_layer_names", "where PEFT finds scores, to freeze and to train", ours=MASK_LAYER),
    Hook(LAYER + "other_param_names", "where it finds bits and positions, to move and to delete", ours=MASK_LAYER),
    Hook(LAYER + "_get_available_adapters", "counts adapters with bits, which have no parameter", ours=MASK_LAYER),
    Hook(LAYER + "merged", "whether weights are switched off, for torch.compile", ours=MERGING_LAYER),
    Hook(LAYER + "weight", "the weight that is computed with, for models that read it", ours=MASK_LAYER),
    Hook(LAYER + "bias", "and the bias", ours="peft_mask.layers.bias:LayerWithBias"),
    Hook(LAYER + "delete_adapter", "also forgets budget and room of the adapter", ours=MASK_LAYER),
    Hook(LAYER + "merge", "switches off in the stored weight", ours=MERGING_LAYER),
    Hook(LAYER + "unmerge", "puts back what was switched off", ours=MERGING_LAYER),
    Hook(LAYER + "_move_adapter_to_device_of_base_layer", "to the parameter's, of experts", ours=PARAMETER_LAYER),
    Hook(LAYER + "set_adapter", "activates, and sets requires_grad", ("adapter_names", "inference_mode")),
    Hook(LAYER + "get_base_layer", "the module below wrappers around wrappers", ()),
    Hook(LAYER + "_get_embed_scale", "Gemma's and BART's factor of embeddings", ()),
    Hook(
        "peft.tuners.tuners_utils:onload_layer",
        "the weight of an offloaded layer while it is computed with",
        ("layer",),
    ),
    Hook(
        "peft.tuners.tuners_utils:check_adapters_to_merge", "which are active and unmerged", ("module", "adapter_names")
    ),
    Hook(BUFFERS + "__init__", "buffers by adapter name, which are saved", ("buffers", "persistent")),
    Hook(BUFFERS + "__contains__", "an adapter with scores has no bits, only room for them", ("key",)),
    Hook(BUFFERS + "__delitem__", "room goes with its adapter", ("key",)),
    Hook(BUFFERS + "__setitem__", "registers a buffer, past the attribute", says="register_buffer"),
    Hook(
        "peft.utils.other:AuxiliaryTrainingWrapper.adapter_state_dict_load_map",
        "finds the heads and tokens that a reference, or an adapter made of others, copies",
        ("adapter_name",),
    ),
    Hook("peft.utils:TrainableTokensWrapper", "finds trained tokens, of which there is no vote"),
    # merging, mixed batches
    Hook(TUNER + "merge_adapter", "all layers or none", ours=MODEL),
    Hook(TUNER + "unmerge_adapter", "with offloaded layers", ours=MODEL),
    Hook(TUNER + "_check_merge_allowed", "refuses what PEFT cannot merge", ()),
    Hook(TUNER + "_unload_and_optionally_merge", "merges all layers before the first is replaced", ours=MODEL),
    Hook(
        TUNER + "_unload_and_optionally_merge",
        "asks attention to put itself together again",
        says="unload_and_optionally_merge_module",
    ),
    Hook(
        "peft:PeftModel._enable_peft_forward_hooks",
        "hands us adapter_names, which it drops otherwise",
        says="self.base_model._enable_peft_forward_hooks(*args, **kwargs)",
    ),
    Hook(
        "peft.utils.other:AuxiliaryTrainingWrapper.forward",
        "takes a name for each row from a pre-hook",
        says="adapter_names",
    ),
    Hook(
        "peft.utils.other:AuxiliaryTrainingWrapper._mixed_batch_forward",
        "mixes copies of these layers; those of others are ours to mix",
        says="(torch.nn.Linear, torch.nn.Embedding, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)",
    ),
    Hook("torch:embedding_bag", "sums what weights that are off add to an output, on any device"),
    Hook("scipy.sparse._sparsetools:csr_matvec", "sums it for one token, without scipy's checks around it"),
    # saving and loading
    Hook(TUNER + "_get_adapter_state_dict", "saves records instead of scores", ours=MODEL),
    Hook(TUNER + "_remap_adapter_state_dict_for_load", "makes bits or scores of records", ours=MODEL),
    Hook("peft:get_peft_model_state_dict", "saves through that hook", says="_get_adapter_state_dict("),
    Hook(
        TUNER + "_remove_adapter_name_from_key",
        "an embedding that is trained whole is saved once, and wrappers leave no names",
        ours=MODEL,
    ),
    Hook(
        "peft:get_peft_model_state_dict",
        "adds embeddings from the same state dict that our hook was given, which is PEFT's own copy",
        says="to_return.update({k: v for k, v in state_dict.items() if k.startswith(embedding_prefix)})",
    ),
    Hook(
        "peft.utils.save_and_load:_filter_state_dict_for_adapter_name",
        "makes that copy",
        ("state_dict", "unwanted_adapter_names"),
    ),
    Hook("peft.utils:ModulesToSaveWrapper.update", "gives an adapter an embedding of its own", ("adapter_name",)),
    Hook("peft.utils:ModulesToSaveWrapper.set_adapter", "puts it in use", ("adapter_names", "inference_mode")),
    Hook("peft.utils:ModulesToSaveWrapper.delete_adapter", "closes a slot", ("adapter_name", "new_active_adapters")),
    Hook(
        "peft.tuners.trainable_tokens:TrainableTokensLayer.update_layer",
        "keeps tokens, rows and originals by these names, to which rows of a resized vocabulary are added",
        says="self.trainable_tokens_original[adapter_name]",
    ),
    Hook(
        "transformers.integrations.peft:PeftAdapterMixin.load_adapter",
        "says eval() when everything has been loaded by name, and heads can be compared",
        says="self.eval()",
        needs="transformers>=5",
    ),
    Hook(
        "peft:get_peft_model_state_dict",
        "finds heads in the mapping that our hook was given, a copy of the caller's",
        says="state_dict = state_dict_filtered_for_adapter_name",
    ),
    Hook("torch.nn:Module._wrapped_call_impl", "calls what is compiled in place", says="self._compiled_call_impl"),
    Hook("torch._dynamo:OptimizedModule.__init__", "what compiles a wrapped module", says="self.dynamo_ctx = "),
    Hook("peft:set_peft_model_state_dict", "loads through that one", says="_remap_adapter_state_dict_for_load("),
    Hook("peft:set_peft_model_state_dict", "hotswap_adapter", ("model", "peft_model_state_dict", "adapter_name")),
    Hook("peft.utils:load_peft_weights", "hotswap_adapter, and loads the best checkpoint", ("model_id", "device")),
    Hook("peft.utils:infer_device", "hotswap_adapter", ()),
    Hook("peft.utils:SAFETENSORS_WEIGHTS_NAME", "the file whose scores are kept from uploads"),
    Hook("peft.utils:CONFIG_NAME", "the file that a control of an adapter is a copy of"),
    Hook("transformers.models.auto.configuration_auto:CONFIG_MAPPING", "tells model types from paths in a command"),
    Hook(
        "transformers.core_model_loading:set_param_for_module",
        "sets a loaded buffer as an attribute of our BitsDict, after it compared its shape",
        says="setattr(module_obj, param_name, param_value)",
        needs="transformers>=5",
    ),
    # quantized weights
    Hook("peft.utils.quantization_utils:resolve_quantization_backend", "how a module is quantized", ("base_layer",)),
    Hook("peft.utils.quantization_utils:quantization_extra_repr", "names the backend in repr", ("module",)),
    Hook("peft.utils.quantization_utils:QuantizationBackend.get_base_weight", "dequantizes", ("base_layer",)),
    Hook("peft.utils.quantization_utils:QuantizationBackend.layer_type", "refuses what is not linear"),
    Hook("peft.utils.quantization_utils:QuantizationBackend.backend_name", "tells formats with an exact zero"),
    Hook("peft.utils.quantization_utils:ForwardOnlyQuantizationBackend", "refuses what cannot be dequantized"),
    Hook("bitsandbytes.functional:dequantize_4bit", "values of 4-bit codes", ("A", "quant_state")),
    Hook("bitsandbytes.functional:int8_vectorwise_dequant", "values of 8-bit codes", ("A", "stats")),
    Hook(
        "bitsandbytes.functional:_convert_weight_packed_for_cpu_inverse",
        "puts 4-bit codes that were packed for the CPU's kernel in order again",
        ("packed_weight", "quant_state"),
    ),
    Hook(
        "bitsandbytes.nn:Linear4bit.forward", "packs codes only if this is set", says="self.support_avx512bf16_for_cpu"
    ),
    # Trainer
    Hook("transformers.trainer_utils:PREFIX_CHECKPOINT_DIR", "finds the checkpoint that was just written"),
    Hook("transformers.trainer_utils:HubStrategy.EVERY_SAVE", "the strategy whose uploads hold no scores"),
    Hook("transformers:TrainerState.stateful_callbacks", "checkpoints keep the share of a budget that was let there"),
    Hook("transformers:TrainerState.load_from_json", "which is read of the best of them", ("json_path",)),
    Hook("transformers:TrainerState.best_model_checkpoint", "its folder, whose masks are the final ones"),
    Hook("transformers:TrainerState.best_global_step", "names it in a warning that they are not"),
    Hook("transformers.trainer:TRAINER_STATE_NAME", "the file of that state"),
    Hook("transformers.utils:SAFE_WEIGHTS_NAME", "tells checkpoints of whole models"),
    Hook("transformers.utils:WEIGHTS_NAME", "the same"),
    Hook("transformers.utils:SAFE_WEIGHTS_INDEX_NAME", "the same"),
    Hook("transformers.utils:WEIGHTS_INDEX_NAME", "the same"),
    Hook("peft.utils:WEIGHTS_NAME", "tells checkpoints of adapters"),
    Hook("accelerate.utils:gather_object", "adds up the perplexities of several processes", ("object",)),
    Hook("accelerate.utils:send_to_device", "puts held-out rows where the model is", ("tensor", "device")),
    Hook("transformers.integrations:is_deepspeed_zero3_enabled", "tells processes that hold parts of a model"),
    Hook(CALLBACK + "on_init_end", "counts flips from the masks before a resume", ours=MASK_CALLBACK),
    Hook(CALLBACK + "on_train_begin", "keeps scores in checkpoints from here on", ours=MASK_CALLBACK),
    Hook(CALLBACK + "on_train_end", "and no longer; keeps the best, fills the budget of bytes", ours=MASK_CALLBACK),
    Hook(CALLBACK + "on_step_begin", "lets a budget grow", ours=MASK_CALLBACK),
    Hook(CALLBACK + "on_pre_optimizer_step", "steers gradients that are whole", ours=MASK_CALLBACK),
    Hook(CALLBACK + "on_step_end", "steers scores after the step", ours=MASK_CALLBACK),
    Hook(CALLBACK + "on_log", "adds figures to the logs", ours=MASK_CALLBACK),
    Hook(CALLBACK + "on_push_begin", "sets scores aside", ours=MASK_CALLBACK, needs="transformers>=5"),
    Hook(CALLBACK + "on_save", "puts them back", ours=MASK_CALLBACK),
    # accelerate
    Hook(
        "accelerate.hooks:add_hook_to_module",
        "its hooks run around a masked layer as around this one",
        says="module._hf_hook.pre_forward(module, *args, **kwargs)",
    ),
    Hook("accelerate.hooks:add_hook_to_module", "finds a forward of the user's own below them", says="_old_forward"),
    # torch
    Hook(
        "torch.nn.parallel:DistributedDataParallel.__init__",
        "asks us once, in all processes, which buffers not to send",
        says="self.parameters_to_ignore = set(module._ddp_params_and_buffers_to_ignore)",
    ),
    Hook(
        "torch.nn.parallel:DistributedDataParallel._assign_modules_buffers",
        "sends none of these",
        says="if buffer_name not in self.parameters_to_ignore",
    ),
    Hook("peft:PeftModel.__getattr__", "DDP finds them through it", says="getattr(self.base_model, name)"),
    Hook(TUNER + "__getattr__", "and through this", says="getattr(self.model, name)"),
    Hook(
        "transformers.modeling_layers:GradientCheckpointingLayer",
        "training_memory computes blocks in place of this function",
        says="self._gradient_checkpointing_func(partial(",
    ),
    Hook("torch.utils._python_dispatch:TorchDispatchMode", "answers questions about values on the meta device"),
    Hook("torch:_C._current_graph_task_id", "tells a forward pass that checkpointing repeats in a backward pass"),
    *(
        Hook(f"torch:{name}", "moves or sums up many tensors in one operation")
        for name in ("_foreach_norm", "_foreach_sign", "_foreach_mul_", "_foreach_sub_", "_foreach_copy_")
    ),
    Hook("torch.utils._pytree:tree_leaves", "finds what a block is given", ("tree",)),
    Hook("torch.utils._pytree:tree_map_only", "cuts what it returns off its past"),
    Hook("torch.nn:Module._apply", "keeps dtypes, and casts what merging has displaced", ours=MERGING_LAYER),
    *(
        Hook("torch.nn:Module._call_impl", "runs the hooks of a base layer around its mask", says=f"self.{hooks}")
        for hooks in (
            "_forward_pre_hooks",
            "_forward_pre_hooks_with_kwargs",
            "_forward_hooks",
            "_forward_hooks_with_kwargs",
            "_forward_hooks_always_called",
            "_backward_hooks",
            "_backward_pre_hooks",
        )
    ),
    Hook("torch:Tensor._make_wrapper_subclass", "a tensor without values"),
    Hook("torch.nn.modules.linear:NonDynamicallyQuantizableLinear", "knows attention's out_proj, which is not called"),
    Hook("torch.nn:Conv1d._conv_forward", "convolves with another weight", ("input", "weight", "bias")),
    Hook("torch.nn:Conv2d._conv_forward", "convolves with another weight", ("input", "weight", "bias")),
    Hook("torch.nn:Conv3d._conv_forward", "convolves with another weight", ("input", "weight", "bias")),
    Hook(
        "torch.nn:TransformerEncoderLayer.forward",
        "calls attention, instead of reading its weights, because ours says False here",
        says="self.self_attn._qkv_same_embed_dim",
    ),
]


def find(place):
    module, _, names = place.partition(":")
    found = importlib.import_module(module)
    for name in filter(None, names.split(".")):
        annotated = getattr(found, "__annotations__", {})  # a class attribute without a value is declared alone
        found = getattr(found, name) if hasattr(found, name) or name not in annotated else annotated[name]
    return found


def parameters_of(function):
    return [p for p in inspect.signature(function).parameters.values() if p.name not in ("self", "cls")]


@pytest.mark.parametrize("hook", HOOKS, ids=str)
def test_what_is_relied_on_is_there(hook):
    library = hook.place.partition(":")[0].partition(".")[0]
    if library == "bitsandbytes":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    if hook.needs and version(library) not in Requirement(hook.needs).specifier:
        pytest.skip(f"needs {hook.needs}")
    gone = f"{library} {version(library)}: {hook.place}, of which peft_mask makes this use: {hook.use}"
    try:
        found = find(hook.place)
    except (ImportError, AttributeError) as error:
        pytest.fail(f"{gone}, is gone ({error})")
    if hook.says:
        assert hook.says in inspect.getsource(found), f"{gone}, does not say {hook.says!r} any more"
    if hook.passes is not None:
        names = [p.name for p in parameters_of(found)]
        others = parameters_of(found)[len(hook.passes) :]
        needed = [p.name for p in others if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
        assert tuple(names[: len(hook.passes)]) == hook.passes, f"{gone}, takes {names}"
        assert not needed, f"{gone}, cannot do without {needed}"
    if hook.ours and callable(found):
        ours = parameters_of(getattr(find(hook.ours), hook.place.rpartition(".")[2]))
        named = [p.name for p in ours if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
        theirs = [p.name for p in parameters_of(found) if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
        taken = theirs[: len(named)] if len(named) < len(ours) else theirs
        assert named == taken, f"{gone}, takes {theirs}, ours {named}"


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        (Hook("peft:gone", "an example"), r"^peft \S+: peft:gone, of which .* use: an example, is gone"),
        (
            Hook(LAYER + "get_base_layer", "an example", says="no such words"),
            r"an example, does not say 'no such words' any more",
        ),
        (Hook(LAYER + "set_adapter", "an example", ("name",)), r"an example, takes \['adapter_names', "),
        (Hook(LAYER + "set_adapter", "an example", ()), r"an example, cannot do without \['adapter_names'\]"),
        (
            Hook(CALLBACK + "on_log", "an example", ours="tests.project.test_contract:Moved"),
            r"example, takes .* ours \['logs'\]",
        ),
    ],
)
def test_a_hook_that_moved_is_reported_with_its_name_and_use(hook, message):
    with pytest.raises((AssertionError, pytest.fail.Exception), match=message):
        test_what_is_relied_on_is_there(hook)


class Moved:
    def on_log(self, logs):
        pass


def imported():
    """Yield what `peft_mask` imports from the libraries by another way than their front doors."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in LIBRARIES:
                yield from (f"{node.module}:{alias.name}" for alias in node.names if "." in node.module)


def overridden():
    """Yield what the classes of `peft_mask` override of the libraries'."""
    for theirs, ours in {(hook.place.rpartition(".")[0], hook.ours) for hook in HOOKS if hook.ours}:
        for name in vars(find(ours)):
            if name in vars(find(theirs)) and not name.startswith(("__", "_abc_")):
                yield f"{theirs}.{name}"


def test_the_table_is_complete():
    known = {hook.place for hook in HOOKS} | {hook.place.rpartition(".")[0] for hook in HOOKS}
    assert {*imported(), *overridden()} - known == set()
    assert {*imported(), *overridden()} & known != set()


@pytest.mark.skipif(not ASKS_BEFORE_PUSHING, reason="needs transformers>=5")
def test_trainer_asks_callbacks_between_writing_a_checkpoint_and_uploading_it(tmp_path, monkeypatch):
    from peft_mask import MaskConfig

    events = []

    class Recorder(TrainerCallback):
        def on_log(self, args, state, control, logs, **kwargs):
            if "loss" in logs:  # which were filed already
                events.append(("log", state.log_history[-1].get("loss") == logs["loss"]))

        def on_push_begin(self, args, state, control, **kwargs):
            events.append(("push", [path.name for path in tmp_path.glob("checkpoint-1/*.safetensors")]))

        def on_save(self, args, state, control, **kwargs):
            events.append(("save", state.global_step))

    def upload_folder(**kwargs):
        events.append(("upload", kwargs["folder_path"]))
        return SimpleNamespace(done=lambda: True, is_done=lambda: True, result=lambda: None)

    def init_hf_repo(self, **kwargs):
        self.hub_model_id, self.push_in_progress = "user/mask", None

    # releases call one or the other
    monkeypatch.setattr(
        "transformers.trainer.hf_api", lambda: SimpleNamespace(upload_folder=upload_folder), raising=False
    )
    monkeypatch.setattr("transformers.trainer.upload_folder", upload_folder, raising=False)
    monkeypatch.setattr(Trainer, "init_hf_repo", init_hf_repo)
    arguments = TrainingArguments(
        tmp_path, max_steps=1, save_steps=1, logging_steps=1, use_cpu=True, report_to=[], push_to_hub=True
    )
    model = get_peft_model(tiny_model("bert"), MaskConfig(task_type="SEQ_CLS"))
    rows = [{"input_ids": [3, 4], "labels": 0}] * 2
    Trainer(model, arguments, train_dataset=rows, callbacks=[Recorder()]).train()
    assert events[:4] == [
        ("log", True),
        ("push", ["adapter_model.safetensors"]),
        ("upload", str(tmp_path)),
        ("save", 1),
    ]
