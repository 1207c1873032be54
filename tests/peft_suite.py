"""Run PEFT's own tests against masks: `python tests/peft_suite.py`, followed by pytest's arguments, if any.

What PEFT promises of its methods stands in its tests, and most of these are parametrized over tables of configurations.
They come with the source distribution of the installed PEFT, which pip fetches once into a cache. Here the rows of
`peft_suite_cases.py` take the place of PEFT's, and those tests run that got one of them. The models are tiny, random
and made on the spot; of a hub nothing is asked.

Exit status: pytest's; 1 also if of one of PEFT's files no test ran; 75 (`os.EX_TEMPFAIL`) if the source distribution
cannot be fetched, in which case nothing was tested.
"""

import contextlib
import importlib
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import FunctionType, ModuleType, SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything that reads it is imported
sys.path.insert(1, str(Path(__file__).parents[1]))  # `tests` will be PEFT's; ours are imported by their own names

import peft_suite_cases as cases
import pytest
import torch
import transformers
from tiny_models import tiny_model

from peft_mask import MaskConfig

Rows = list[object]

# `test_config` has these load an adapter from the hub.
FROM_HUB = {"test_from_pretrained", "test_from_pretrained_cache_dir", "test_save_pretrained_with_runtime_config"}


def replacements(models: Path) -> dict[str, dict[str, Rows]]:
    """Return what replaces which table, by test file; a table in the decorator of a test has the test's name."""

    def at(*names: str) -> Rows:
        return [str(models / name) for name in names]

    on_mlp = [
        config(**{**fields, "target_modules": ["lin0"], "init_weights": False})
        for _, model, config, fields in cases.CUSTOM
        if model == "MLP"
    ]
    configs, classifiers = cases.CONFIGS, at("bert-cls", "roberta-cls")
    return {
        "test_custom_models": {
            "TEST_CASES": cases.CUSTOM,
            "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES": cases.MULTIPLE,
            "MIXED_ADAPTER_TEST_CASES": cases.MIXED,
            "ALL_PEFT_CONFIG_CLASSES": [MaskConfig],
            "test_multiple_adapters_mixed_modules_to_save": [MaskConfig],
            "test_multiple_adapters_mixed_modules_to_save_order_switched": [MaskConfig],
            "test_adapter_name_makes_no_difference": on_mlp,
        },
        "test_decoder_models": {
            "PEFT_DECODER_MODELS_TO_TEST": at("opt", "gpt-two", "lama", "qwen2"),
            "ALL_CONFIGS": configs["decoder"],
        },
        "test_encoder_decoder_models": {
            "PEFT_ENCODER_DECODER_MODELS_TO_TEST": at("t5", "bart"),
            "ALL_CONFIGS": configs["encoder_decoder"],
        },
        "test_feature_extraction_models": {
            "PEFT_FEATURE_EXTRACTION_MODELS_TO_TEST": at("bert", "roberta"),
            "ALL_CONFIGS": configs["feature_extraction"],
        },
        "test_seq_classifier": {
            "PEFT_SEQ_CLS_MODELS_TO_TEST": [*classifiers, *at("lama-cls")],
            "ALL_CONFIGS": configs["seq_classifier"],
        },
        "test_token_classification_qa": {
            "PEFT_TOKEN_CLS_MODELS_TO_TEST": classifiers,  # and PEFT_QA_MODELS_TO_TEST, which is the same list
            "TOKEN_CLS_CONFIGS": configs["token_classification"],
            "QA_CONFIGS": configs["question_answering"],
        },
        "test_config": {
            "ALL_CONFIG_CLASSES": configs["config"],
            "LAYER_INDEXING_CONFIG_CLASSES": configs["config"],
        },
        "test_quantization": {"TEST_CASES": configs["quantization"]},
        "test_vision_models": {"test_model_with_batchnorm_reproducibility": list(cases.VISION.values())},
    }


def save_models(folder: Path) -> None:
    """Save the models that PEFT's tests load. Some skip a path with "gpt2" or "llama" in it, hence two of the names."""
    opt = transformers.OPTConfig(
        hidden_size=128,  # wide enough for a block of 4-bit quantization
        word_embed_proj_dim=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=64,
        vocab_size=64,
    )
    resnet = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3)
    torch.manual_seed(0)
    texts = {
        **{name: tiny_model(name, "lm") for name in ("opt", "qwen2", "t5", "bart")},
        **{name: tiny_model(name, "base") for name in ("bert", "roberta")},
        **{f"{name}-cls": tiny_model(name, "seq_cls") for name in ("bert", "roberta")},
        "gpt-two": tiny_model("gpt2", "lm"),
        "lama": tiny_model("llama", "lm"),
        "lama-cls": tiny_model("llama", "seq_cls"),
    }
    for model in texts.values():
        # the token of many inputs is the one that pads, of which Llama knows nothing but zeros
        torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.02)
    others = {
        "opt-wide": transformers.OPTForCausalLM(opt),
        "resnet": transformers.ResNetForImageClassification(resnet),
    }
    for name, model in (texts | others).items():
        model.save_pretrained(folder / name)


class Suite:
    """The pytest plugin that puts our rows into PEFT's tests.

    Args:
        models: folder of the models.
    """

    def __init__(self, models: Path) -> None:
        self.models = models
        self.rows = replacements(models)
        self.asked: set[str] = set()  # the files of which a test did what it should

    def pytest_sessionstart(self) -> None:
        pytest.register_assert_rewrite("tests.testing_common")
        common = import_without_neighbors("tests.testing_utils")
        common.hub_online_once = lambda model_id: contextlib.nullcontext()
        common.load_cat_image = lambda: torch.rand(1, 3, 32, 32)
        import_without_neighbors("tests.testing_common")
        for name, rows in self.rows.items():
            module = importlib.import_module(f"tests.{name}")
            known = vars(module).keys() | {
                test for part in vars(module).values() for test in getattr(part, "__dict__", ())
            }
            if lost := rows.keys() - known:
                raise pytest.UsageError(f"the tests of PEFT {version('peft')} have no {sorted(lost)} in {name}.py")
        quantization, vision = (sys.modules[f"tests.{name}"] for name in ("test_quantization", "test_vision_models"))
        for loader in (quantization.Bnb8bitLoader, quantization.Bnb4bitLoader):
            loader.model_id, loader.expected_layer_count = str(self.models / "opt-wide"), 4
        vision.TestResnet.model_id = str(self.models / "resnet")
        processor = SimpleNamespace(from_pretrained=lambda _: lambda image, **_: {"pixel_values": image})
        vision.AutoImageProcessor = processor

    def pytest_pycollect_makeitem(self, collector: pytest.Collector, name: str, obj: object) -> None:
        module = collector.getparent(pytest.Module).obj
        rows = self.rows[module.__name__.removeprefix("tests.")]
        of_tables = {id(vars(module).get(table)): new for table, new in rows.items()}
        marks = obj.pytestmark if isinstance(obj, FunctionType) and hasattr(obj, "pytestmark") else []
        for index, mark in enumerate(marks):
            if mark.name == "parametrize":
                new = rows.get(name, of_tables.get(id(mark.args[1])))
                if new is not None:
                    marks[index] = pytest.mark.parametrize(mark.args[0], new).mark

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Function]) -> None:
        ours = [item for item in items if has_mask(item) and item.originalname not in FROM_HUB]
        for item in ours:
            # the reason of each stands in peft_suite_cases.py: scores that a loaded adapter does not have, N:M masks
            for pattern, reason in cases.XFAIL.items():
                if re.search(pattern, item.name):
                    item.add_marker(pytest.mark.xfail(reason=reason, strict=True))
        config.hook.pytest_deselected(items=[item for item in items if item not in set(ours)])
        items[:] = ours

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and (report.passed or hasattr(report, "wasxfail")):
            self.asked.add(Path(report.location[0]).stem)


def import_without_neighbors(name: str) -> ModuleType:
    """Import a module that imports names from libraries whose tests are not ours, installed or not."""
    absent = {"datasets": "load_dataset", "diffusers": "StableDiffusionPipeline"}
    absent = {package: imported for package, imported in absent.items() if find_spec(package) is None}
    sys.modules.update(
        {package: SimpleNamespace(**{imported: type(imported, (), {})}) for package, imported in absent.items()}
    )
    try:
        return importlib.import_module(name)
    finally:
        for package in absent:
            del sys.modules[package]


def has_mask(item: pytest.Function) -> bool:
    values = item.callspec.params.values() if hasattr(item, "callspec") else ()
    return any(value is MaskConfig or isinstance(value, MaskConfig) for value in values)


def source_distribution() -> Path:
    """Return the archive of the installed PEFT's source, fetched if the cache lacks it."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "peft-suite")
    archive = cache / f"peft-{version('peft')}.tar.gz"
    if not archive.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary=peft", f"--dest={folder}"]
            subprocess.run([*pip, f"peft=={version('peft')}"], check=True)
            Path(folder, archive.name).rename(archive)  # whole or not at all
    return archive


def main(arguments: list[str]) -> int:
    try:
        archive = source_distribution()
    except subprocess.CalledProcessError as error:
        print(
            f"PEFT's tests did NOT run, pip cannot fetch the source of PEFT {version('peft')}: {error}", file=sys.stderr
        )
        return os.EX_TEMPFAIL
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with tarfile.open(archive) as tar:
            for member in tar.getmembers():
                if "/tests/" in member.name:
                    member.name = member.name.partition("/")[2]
                    tar.extract(member, folder, filter="data")
        (folder / "tests/__init__.py").touch()
        save_models(folder / "models")
        os.chdir(folder)
        sys.path.insert(0, name)
        suite = Suite(folder / "models")
        files = [f"tests/{test}.py" for test in suite.rows]
        options = ["-c", os.devnull, "--rootdir", name, "-q", "-rfEsx", "--tb=short", "--disable-warnings"]
        status = pytest.main([*options, "-p", "no:cacheprovider", *files, *arguments], plugins=[suite])
        os.chdir("/")
    unasked = suite.rows.keys() - suite.asked
    if unasked and not arguments:  # which may choose tests
        print(f"no test of ours ran in {sorted(unasked)}")
        return int(status) or 1
    return int(status)


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    sys.exit(main(sys.argv[1:]))
