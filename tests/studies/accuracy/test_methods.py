"""The table of methods: what each trains, saves and is scored with."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertModel, BertTokenizer

from benchmarks.accuracy import training
from benchmarks.accuracy.methods import METHODS, mask
from benchmarks.accuracy.rivals import RIVALS
from benchmarks.accuracy.sizes import in_head
from benchmarks.accuracy.tasks import TASKS
from benchmarks.accuracy.training import Method, Setting
from peft_mask.layers.mask_layer import MaskLayer
from tests.studies.made_up import STEPS

LAYER = "bert.encoder.layer.0."
SELF, MIXED = LAYER + "attention.self.", LAYER + "attention.output."
KEY_VALUE = [SELF + "key", SELF + "value"]
OUTPUTS = [MIXED + "dense", LAYER + "output.dense"]
LINEAR = [SELF + "query", *KEY_VALUE, *OUTPUTS, LAYER + "intermediate.dense"]
NORMS = ["bert.embeddings.LayerNorm", MIXED + "LayerNorm", LAYER + "output.LayerNorm"]
LORA = {f"{module}.lora_{side}" for module in LINEAR for side in "AB"}


@pytest.mark.parametrize(
    ("name", "expected", "numbers"),
    [
        *((f"lora-r{r}", LORA, r * (4 * (16 + 16) + 2 * (16 + 32))) for r in (1, 2, 4, 8, 16)),
        ("bitfit", {f"{module}.bias" for module in LINEAR + NORMS}, 5 * 16 + 32 + 3 * 16),
        ("ia3", {f"{module}.ia3_l" for module in KEY_VALUE + OUTPUTS}, 3 * 16 + 32),
        ("shira-r1", {f"{module}.shira_weight" for module in (SELF + "query", SELF + "value")}, 2 * (16 + 16)),
    ],
)
@pytest.mark.parametrize("task", ["trec", "ud_ewt_pos"])
def test_a_peer_trains_and_saves_its_own_parameters_and_the_head(
    setting: Setting, task: str, name: str, expected: set[str], numbers: int
) -> None:
    method = METHODS[name]
    assert isinstance(method, Method)
    model = training.untrained(TASKS[task], method, 0, setting)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trained = {key: p.numel() for key, p in model.named_parameters() if p.requires_grad}
    own = {key: size for key, size in trained.items() if not in_head(key)}
    assert {re.sub(r"^base_model\.model\.|\.default(\.weight)?$", "", key) for key in own} == expected
    assert sum(own.values()) == numbers
    batch = setting.rows(TASKS[task], "train").batch([0, 1, 2, 3])
    optimizer = method.optimizer(model, method.lrs[0])
    for _ in range(2):  # LoRA's A has no gradient while B is zero
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert moved <= trained.keys()
    assert len(moved & own.keys()) > len(own) / 2  # a bias of keys changes nothing; ReLUs may be off
    figures = training.train(TASKS[task], method, method.lrs[0], 0, STEPS, setting)
    tensors = 4 * numbers * (3 if name == "shira-r1" else 1)  # of SHiRA two indices beside each number
    assert tensors < figures["bytes"] - figures["head_bytes"] < tensors + 250 * 2 * len(trained)


@pytest.mark.parametrize("name", ["bitfit", "ia3", "shira-r1"])
def test_a_peers_test_is_scored_with_the_parameters_of_the_run(setting: Setting, tmp_path: Path, name: str) -> None:
    method, task, state = METHODS[name], TASKS["ud_ewt_pos"], tmp_path / "state.safetensors"
    assert isinstance(method, Method)
    (setting.data / task.name / "test.conll").write_bytes((setting.data / task.name / "dev.conll").read_bytes())
    figures = training.train(task, method, method.lrs[-1], 1, STEPS, setting, state)
    assert training.score_test(task, method, 1, setting, state) == figures["dev"]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """A layer of all-MiniLM-L6-v2's widths, to which the settings of the rivals are fitted."""
    folder = tmp_path_factory.mktemp("wide") / "model"
    BertTokenizer.from_pretrained(model).save_pretrained(folder)
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=14, hidden_size=384, num_hidden_layers=1, intermediate_size=1536)).save_pretrained(
        folder
    )
    return folder


@pytest.mark.filterwarnings("ignore::UserWarning:peft")  # of what makes files small, and of layers that are not linear
@pytest.mark.parametrize("rival", RIVALS, ids=lambda rival: rival.name)
def test_a_rival_learns_and_is_saved_and_scored_in_bfloat16(
    data: Path, wide: Path, tmp_path: Path, rival: Method
) -> None:
    setting, task, state = Setting(data, str(wide)), TASKS["trec"], tmp_path / "state.safetensors"
    before = {name: p for name, p in training.untrained(task, rival, 0, setting).named_parameters() if p.requires_grad}
    figures = training.train(task, rival, rival.lrs[-1], 0, STEPS, setting, state)
    own = {name: value for name, value in load_file(state).items() if not in_head(name)}
    assert any(not torch.equal(value, before[name]) for name, value in own.items())
    assert all(torch.equal(value, value.bfloat16().float()) for value in own.values())
    assert figures["dtype"] == "bfloat16"
    in_float32 = training.train(task, replace(rival, dtype=torch.float32), rival.lrs[-1], 0, STEPS, setting)
    saved, whole = (each["bytes"] - each["head_bytes"] for each in (figures, in_float32))
    assert saved < 0.75 * whole, "what is saved is half as wide, its names are not"
    again = training.restored(task, rival, 0, setting, state)
    (data / "trec" / "test.jsonl").write_bytes((data / "trec" / "dev.jsonl").read_bytes())
    assert training.accuracy(again, setting.rows(task, "dev")) == figures["dev"]


def test_a_masks_bytes_against_its_base_are_fewer(setting: Setting) -> None:
    figures = training.train(
        TASKS["trec"], replace(METHODS["mask"], build=mask(target_sparsity=0.1)), 5e-4, 0, STEPS, setting
    )
    assert 0 < figures["bytes_on_base"] < figures["bytes"] - figures["head_bytes"]


def test_shiras_positions_come_from_the_seed_of_the_run(setting: Setting) -> None:
    method = METHODS["shira-r1"]
    assert isinstance(method, Method)

    def positions(seed: int) -> list[list[int]]:
        model = training.untrained(TASKS["trec"], method, seed, setting)
        return next(m.shira_indices["default"].tolist() for m in model.modules() if hasattr(m, "shira_indices"))

    assert positions(0) == positions(0) != positions(1)


def test_a_method_says_what_happens_before_each_step(setting: Setting) -> None:
    method, seen = METHODS["growing-mask"], []
    assert isinstance(method, Method)

    def grow(model: torch.nn.Module, progress: float) -> None:
        method.before_step(model, progress)
        seen.append((progress, sum(m.rule("default").zeros for m in model.modules() if isinstance(m, MaskLayer))))

    watched = replace(method, build=mask(target_sparsity=0.1), before_step=grow)  # enough of such small matrices
    training.train(TASKS["trec"], watched, 5e-4, 0, 10, setting)
    assert [progress for progress, _ in seen] == [step / 10 for step in range(10)]
    budgets = [budget for _, budget in seen]
    assert budgets[0] < budgets[1] < budgets[2]
    assert set(budgets[2:]) == {budgets[2]}, "whole after a fifth"
