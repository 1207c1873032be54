"""Settings every test runs under: no hub, few threads, the same examples every time."""

import gc
import os
from collections.abc import Iterator

# Read by huggingface_hub, datasets and tokenizers when they are imported, so before anything else here.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Read by cuBLAS with its first product: without it none is deterministic.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch
from hypothesis import settings
from transformers import BertConfig, BertModel, BertTokenizerFast

# The models are tiny: threads cost more than they bring, and pytest-xdist already fills the cores.
torch.set_num_threads(1)

# A deadline would assert a time. Derandomized, because a test that fails must fail again.
settings.register_profile("peft_mask", deadline=None, derandomize=True, database=None)
settings.load_profile("peft_mask")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            # They hold a GPU to what the CPU computes, and machines of CI have none; other tests ask it of the CPU.
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    """Keep what is imported out of collections of garbage: Trainer makes one before each training, of half a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """A test's random numbers depend neither on the order of the tests nor on which of them are run."""
    torch.manual_seed(0)


@pytest.fixture
def deterministic() -> Iterator[None]:
    """What transformers' `full_determinism` switches on: operations without a fixed order of their writes raise."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _denormals() -> Iterator[None]:
    """Commands change how this process computes; other tests must not depend on whether one ran before."""
    yield
    torch.set_flush_denormal(False)


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A BERT of two layers of width 32 that spells its words."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    folder = tmp_path_factory.mktemp("tiny-bert")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=512).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=60,
        max_position_embeddings=512,
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)
    return str(folder)
