"""A training that several processes share, for `accelerate launch --config_file ...`.

    distributed_job.py FOLDER [STEPS [DTYPE]]

trains up to STEPS in batches of 8, each process its part, with a checkpoint every third step, goes on from the last one
in FOLDER if there is one, and writes the adapter there at the end. In float64, the default, no gradient is so close to
zero that the order of a sum decides its sign. DeepSpeed trains in float32 at most.
"""

import os
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from peft import get_peft_model
from torch import nn
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from peft_mask import MaskCallback, MaskConfig, SparsitySchedule, create_mask_optimizer
from peft_mask.recipes.trainer import OptimizerTrainer
from peft_mask.tensors.sharded import is_taken_away
from tests.processes import leave
from tests.tiny_models import tiny_inputs, tiny_model

BATCH, STEPS = 8, 6


def offer_fsdp_on_cpu() -> None:
    """Let Accelerate take processes on CPUs for processes on GPUs, which alone it shards models over."""
    init = AcceleratorState.__init__

    def init_as_on_gpus(self, *arguments, **settings):
        PartialState(cpu=True)
        if PartialState._shared_state["distributed_type"] == DistributedType.MULTI_CPU:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        init(self, *arguments, **settings)

    AcceleratorState.__init__ = init_as_on_gpus


class StopAfter(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def main(folder: Path, stop: int, dtype: str) -> None:
    torch.set_num_threads(1)
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        offer_fsdp_on_cpu()
    base = tiny_model("bert")
    for module in base.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # each process draws its own
    torch.manual_seed(0)
    model = get_peft_model(base, MaskConfig(task_type="SEQ_CLS", target_sparsity=0.02)).to(getattr(torch, dtype))
    inputs = tiny_inputs(base, batch_size=32, labels=True)
    rows = [{name: value[i] for name, value in inputs.items()} for i in range(32)]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH // int(os.environ.get("WORLD_SIZE", "1")),
        save_steps=3,
        logging_steps=1,
        average_tokens_across_devices=False,  # it would multiply the loss by the number of processes
        report_to=[],
        use_cpu=not deepspeed,  # Accelerate takes it to mean DDP
        ddp_backend="gloo" if deepspeed else None,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = OptimizerTrainer(
        create_mask_optimizer,
        model=model,
        args=arguments,
        train_dataset=rows,
        callbacks=[MaskCallback(SparsitySchedule("linear", end=0.5)), StopAfter(stop)],
    )
    if deepspeed:  # which would leave weights as small as these whole
        settings = trainer.accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        settings["stage3_param_persistence_threshold"] = 0
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)) if folder.is_dir() else None)
    trainer.save_model(folder)
    in_parts = [is_taken_away(p) for p in model.parameters()]
    assert all(in_parts) if deepspeed and settings["stage"] == 3 else not any(in_parts)


if __name__ == "__main__":
    folder, stop, dtype = (*sys.argv[1:], *("", str(STEPS), "float64")[len(sys.argv) - 1 :])
    main(Path(folder), int(stop), dtype)
    leave()
