"""An offline vLLM engine with what the tests ask of it. Importing this needs vLLM."""

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

from tests.vllm.models import NEW, PROMPTS

_GREEDY = SamplingParams(temperature=0, max_tokens=NEW, detokenize=False, ignore_eos=True)


class Engine:
    def __init__(self, model, **options):
        settings = {
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 128,
            "max_num_seqs": 8,
            "max_num_batched_tokens": 512,
            "kv_cache_memory_bytes": 64 << 20,
            "block_size": 32,
            "enable_prefix_caching": True,
        }
        self.llm = LLM(model=str(model), **settings | options)

    def outputs(self, prompts=PROMPTS, loras=None):
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        return self.llm.generate(requests, _GREEDY, use_tqdm=False, lora_request=loras)

    def tokens(self, prompts=PROMPTS, loras=None):
        """The greedy tokens that follow each prompt."""
        return [list(output.outputs[0].token_ids) for output in self.outputs(prompts, loras)]

    def enqueue(self):
        self.llm.enqueue([{"prompt_token_ids": PROMPTS[0]}], _GREEDY, use_tqdm=False)

    def checksums(self):
        """vLLM's own digest of every weight."""
        (digests,) = self.llm.collective_rpc("compute_weight_checksums")
        return digests

    def close(self):
        self.llm.llm_engine.engine_core.shutdown()


def named(folder, name, number):
    """A request's word for an adapter."""
    return LoRARequest(name, number, str(folder / name))
