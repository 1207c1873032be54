"""The Hub, by the unmodified client against a server of the tests: processes that share nothing but the server."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import EvalResult, ModelCard
from peft import get_peft_model
from safetensors.torch import load

from peft_mask import MaskConfig, Masks, update_model_card
from peft_mask.layers.mask_layer import MaskLayer
from tests.hub_server import HubServer, card_errors
from tests.tiny_models import tiny_model
from tests.versions import ASKS_BEFORE_PUSHING, RESUMES_DOWNLOADS

ROOT = Path(__file__).parents[2]
TOKEN, REPO = "hf_alice", "alice/mask"
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def hub():
    with HubServer({TOKEN: "alice", "hf_bob": "bob"}) as server:
        yield server
    assert server.unknown == [], "the client asked for what this server does not speak"


@pytest.fixture
def base(tmp_path):
    tiny_model("bert").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def run(hub, code, *arguments, token=TOKEN, cwd, check=True):
    """Run code in a process of its own, as a user on a machine of his own: nothing cached, one hub."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGINGFACE"))}
    home = Path(cwd, f"home-{len(list(Path(cwd).glob('home-*')))}")
    environment |= {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(home),
        "HF_TOKEN": token,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", PREAMBLE + code, *map(str, arguments)],
        env=environment,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


PREAMBLE = """
import sys
import torch
import peft_mask
from peft import AutoPeftModelForSequenceClassification, PeftModel, get_peft_model
from peft_mask import MaskConfig, Masks
from transformers import AutoModelForSequenceClassification
from tests.tiny_models import tiny_inputs
Base = AutoModelForSequenceClassification
"""

PUSH = """
model = get_peft_model(Base.from_pretrained(sys.argv[1]), MaskConfig(task_type="SEQ_CLS", target_sparsity=0.05))
optimizer = peft_mask.create_mask_optimizer(model)
model(**tiny_inputs(model.base_model.model), labels=torch.tensor([0, 1])).loss.backward()
optimizer.step()
model.eval()
torch.save(model(**tiny_inputs(model.base_model.model)).logits, "logits.pt")
model.push_to_hub("alice/mask")
"""


def pushed_tensors(repo, path=WEIGHTS, branch="main"):
    return load(repo.at(branch).files[path].data)


@pytest.mark.slow
def test_a_push_from_one_process_and_a_load_in_another(hub, base, tmp_path):
    run(hub, PUSH, base, cwd=tmp_path)
    repo = hub.repos[REPO]
    assert set(repo.files) >= {WEIGHTS, "adapter_config.json", "README.md"}
    names = pushed_tensors(repo)
    assert not any("scores" in name or "positions" in name for name in names)
    assert any(name.endswith("peft_mask_bits") for name in names)
    first = repo.branches["main"]
    folder = {path: file for path, file in repo.at("main").files.items() if path != ".gitattributes"}
    repo.commit("tagged", "the same in a folder", {f"adapters/one/{path}": file for path, file in folder.items()})
    repo.commit("main", "something else", {"README.md": repo.at("main").files["README.md"]})
    done = run(
        hub,
        """
expected = torch.load("logits.pt")
def same(model):
    assert torch.equal(model.eval()(**tiny_inputs(model.base_model.model)).logits, expected)
base, first = sys.argv[1:]
load = lambda **where: PeftModel.from_pretrained(Base.from_pretrained(base), "alice/mask", **where)
same(load(revision=first))
same(load(revision="tagged", subfolder="adapters/one", token="hf_alice"))
same(AutoPeftModelForSequenceClassification.from_pretrained("alice/mask", revision=first, num_labels=3))
from huggingface_hub import snapshot_download
assert Masks.load(snapshot_download("alice/mask", revision=first)).sparsity > 0
for where in ({"revision": "nowhere"}, {"subfolder": "nowhere"}, {}):
    try:
        load(**where)
    except Exception as error:
        print(type(error).__name__, error, sep=": ")
    else:
        raise SystemExit(f"loaded from {where}")
""",
        base,
        first,
        cwd=tmp_path,
    )
    refusals = done.stdout.splitlines()
    assert len(refusals) == 3
    assert all("alice/mask" in line for line in refusals), refusals


def test_a_push_without_the_right_leaves_nothing(hub, base, tmp_path):
    without_right = """
model = get_peft_model(Base.from_pretrained(sys.argv[1]), MaskConfig(task_type="SEQ_CLS"))
for token in ("hf_wrong", "hf_bob"):
    try:
        model.push_to_hub("alice/mask", token=token)
    except Exception as error:
        print(str(error).split()[0], error.response.status_code)
    else:
        raise SystemExit(f"{token} could push")
"""
    done = run(hub, without_right, base, cwd=tmp_path)
    assert done.stdout.split()[1::2] == ["401", "403"]
    assert hub.repos == {}
    assert hub.storage == {}


@pytest.mark.slow  # the client tries again and again before it gives up
def test_a_connection_cut_in_mid_upload_changes_nothing_and_a_second_try_works(hub, base, tmp_path):
    hub.cut("PUT", "/lfs/", after=500, times=99)
    done = run(hub, PUSH, base, cwd=tmp_path, check=False)
    assert done.returncode != 0
    assert set(hub.repos[REPO].files) == {".gitattributes"}
    hub.mend()
    run(hub, PUSH, base, cwd=tmp_path)
    assert WEIGHTS in hub.repos[REPO].files


@pytest.mark.slow  # the client tries again and again before it gives up
def test_a_connection_cut_in_mid_download_loads_no_half_file(hub, base, tmp_path):
    run(hub, PUSH, base, cwd=tmp_path)
    load_it = """
model = PeftModel.from_pretrained(Base.from_pretrained(sys.argv[1]), "alice/mask").eval()
assert torch.equal(model(**tiny_inputs(model.base_model.model)).logits, torch.load("logits.pt"))
"""
    hub.cut("GET", "/lfs/", after=500, times=99)
    assert run(hub, load_it, base, cwd=tmp_path, check=False).returncode != 0
    hub.mend()
    if RESUMES_DOWNLOADS:
        hub.cut("GET", "/lfs/", after=500, times=1)
    run(hub, load_it, base, cwd=tmp_path)


TRAIN = """
from transformers import Trainer, TrainingArguments
from peft_mask import MaskCallback, create_mask_optimizer
rows = [{"input_ids": [i % 9 + 3] * 6, "attention_mask": [1] * 6, "labels": i % 3} for i in range(16)]
base, *strategies = sys.argv[1:]
for strategy in strategies:
    model = get_peft_model(Base.from_pretrained(base), MaskConfig(task_type="SEQ_CLS", target_sparsity=0.05))
    arguments = TrainingArguments(
        strategy, max_steps=4, save_steps=2, per_device_train_batch_size=4, use_cpu=True, report_to=[],
        push_to_hub=True, hub_model_id=f"alice/{strategy}", hub_strategy=strategy, hub_always_push=True,
    )
    optimizers = (create_mask_optimizer(model), None)
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[MaskCallback()], optimizers=optimizers)
    trainer.train()
    trainer.push_to_hub()
"""


def scored(names):
    return any("peft_mask_scores" in name for name in names)


@pytest.mark.slow
def test_trainer_pushes_with_each_strategy(hub, base, tmp_path):
    # strategy -> the folders with checkpoints that it uploads
    strategies = {
        "end": set(),
        "every_save": set(),
        "checkpoint": {"last-checkpoint"},
        "all_checkpoints": {"checkpoint-2", "checkpoint-4"},
    }
    if not ASKS_BEFORE_PUSHING:
        del strategies["every_save"]  # refused, see test_training.py
    run(hub, TRAIN, base, *strategies, cwd=tmp_path)
    for strategy, expected in strategies.items():
        repo = hub.repos[f"alice/{strategy}"]
        assert not scored(pushed_tensors(repo))
        for step in (2, 4):  # on this machine every checkpoint can be resumed from
            folder = tmp_path / strategy / f"checkpoint-{step}"
            assert scored(load((folder / WEIGHTS).read_bytes()))
            assert not [file.name for file in folder.iterdir() if file.name.endswith((".tmp", ".scores"))]
        adapters = [commit.files[WEIGHTS].data for commit in repo.commits if WEIGHTS in commit.files]
        if not expected:
            assert len(adapters) >= (2 if strategy == "every_save" else 1)
            assert not any(scored(load(data)) for data in adapters)
        folders = {path.split("/")[0] for path in repo.files if path.endswith(f"/{WEIGHTS}")}
        assert folders == expected
        for folder in folders:
            assert scored(pushed_tensors(repo, f"{folder}/{WEIGHTS}")), "whoever asks for checkpoints wants to resume"


# ---- the card ----


@pytest.fixture
def saved(tmp_path, base):
    model = get_peft_model(tiny_model("bert"), MaskConfig(task_type="SEQ_CLS", target_sparsity=0.05))
    for layer in model.modules():
        if isinstance(layer, MaskLayer):
            torch.nn.init.normal_(layer.peft_mask_scores["default"])
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_the_card_says_what_the_adapter_is(saved, base):
    card = ModelCard.load(saved / "README.md")
    masks = Masks.load(saved)
    assert card.data.base_model == str(base)
    assert card.data.library_name == "peft"
    assert {"peft-mask", f"base_model:adapter:{base}"} <= set(card.data.tags)
    assert f"{masks.sparsity:.4%}" in card.text
    assert f"{masks.weights:,} in {len(masks)} matrices" in card.text
    assert f"{(saved / WEIGHTS).stat().st_size:,}" in card.text
    assert "More Information Needed" not in card.text
    snippet = card.text.split("```python\n")[1].split("```")[0]
    assert snippet.startswith("import peft_mask")
    compile(snippet.replace("...", "3"), "card", "exec")


def test_results_become_metadata_and_text_of_ones_own_stays(saved):
    def result(value, metric="accuracy"):
        return EvalResult("text-classification", "trec", "TREC", metric, value)

    file = saved / "README.md"
    file.write_text(file.read_text("utf-8") + "\n## Mine\n\nKept.\n", "utf-8")
    update_model_card(saved, [result(0.5), result(0.4, "f1")])
    update_model_card(saved, [result(0.9)])
    card = ModelCard.load(file)
    assert {(r.metric_type, r.metric_value) for r in card.data.eval_results} == {("accuracy", 0.9), ("f1", 0.4)}
    assert card_errors(file.read_text("utf-8")) == []
    assert card.text.count("## A mask") == 1
    assert "## Mine\n\nKept." in card.text
    before = file.read_bytes()
    update_model_card(saved)
    assert file.read_bytes() == before


def test_a_folder_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        update_model_card(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("metadata", ["tags: [peft-mask]\nmodel-index: 3", "tags: [peft-mask"])
def test_a_card_that_cannot_be_read_loses_no_adapter(saved, metadata):
    model = get_peft_model(tiny_model("bert"), MaskConfig(task_type="SEQ_CLS", target_sparsity=0.05))
    (saved / "README.md").write_text(f"---\n{metadata}\n---\n", "utf-8")
    with pytest.warns(UserWarning, match="is not filled in"):
        model.peft_config["default"].save_pretrained(str(saved))
    assert Masks.load(saved).weights > 0
