"""The accuracy benchmark, end to end on a tiny random model and a few made-up rows."""

import json
import re
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, BertTokenizer, DistilBertConfig, MPNetConfig, MPNetModel

from benchmarks import long
from benchmarks.accuracy import __main__ as command
from benchmarks.accuracy import probe, runs, summary, tasks, training
from benchmarks.accuracy.methods import METHODS, mask
from benchmarks.accuracy.model import model_class
from benchmarks.accuracy.rivals import RIVALS
from benchmarks.accuracy.sizes import in_head
from benchmarks.accuracy.tasks import IGNORED, TASKS, Rows, training_batches
from benchmarks.accuracy.training import Method, Setting
from peft_mask.layers.mask_layer import MaskLayer

WORDS = ["red", "green", "blue", "runs", "sleeps", "un", "##happy", "the", "a"]
STEPS = 3
PEERS = [name for name in METHODS if name not in {rival.name for rival in RIVALS}]  # those that take the tiny model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "model"
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    BertTokenizer(vocab=vocabulary).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=128,
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two of the table's tasks with 40 training rows each."""
    folder = tmp_path / "data"
    for name in ("trec", "ud_ewt_pos"):
        (folder / name).mkdir(parents=True)
        (folder / name / "labels.json").write_text(json.dumps(["NOUN", "VERB", "X"]), "utf-8")
        for split, count in (("train", 40), ("dev", 9), ("test", 7)):
            write_split(folder, name, split, count)
    return folder


def write_split(folder: Path, name: str, split: str, count: int) -> None:
    if name == "trec":
        rows = [{"text": f"the {WORDS[i % 5]} " * (1 + i % 3), "label": i % 3} for i in range(count)]
        (folder / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    else:
        sentence = "the\tDT\tX\nred\tJJ\tNOUN\nunhappy\tJJ\tNOUN\nruns\tVB\tVERB\n\n"
        (folder / name / f"{split}.conll").write_text(sentence * count, "utf-8")


@pytest.fixture
def setting(data: Path, model: Path) -> Setting:
    return Setting(data, str(model))


@pytest.fixture(autouse=True)
def no_more_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """A method's own rates are enough here, though what is best of tiny models is often at the edge."""
    monkeypatch.setattr(runs, "MOST", 0)


def run(data: Path, model: Path, results: Path, *more: str) -> None:
    options = ["--data", data, "--model", model, "--results", results, "--steps", STEPS, "--threads", 1, *more]
    command.main([str(option) for option in ["run", "--tasks", "trec", "ud_ewt_pos", *options]])


def results_in(folder: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    return runs.runs_in(folder).read()


def test_one_command_runs_every_method_and_makes_the_report(
    data: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "results"
    run(data, model, results, "--seeds", "0", "1", "--methods", *PEERS)
    assert (results / "runs.jsonl").read_bytes().count(b"\n") == len(results_in(results)), "one row a training"
    rows = summary.rows_of(summary.read_results(results))
    assert [(row.task, row.method) for row in rows] == [(t, m) for t in ("trec", "ud_ewt_pos") for m in PEERS]
    assert all(list(row.tries) == [f"{lr:g}" for lr in METHODS[row.method].lrs] for row in rows)
    assert all(row.seeds == ((0,) if row.method == "probe" else (0, 1)) for row in rows)
    assert not list(results.rglob("*.safetensors")), "trained parameters are left behind"
    page = (results / "README.md").read_text("utf-8")
    assert all(f"| {method} |" in page for method in PEERS)
    assert str(tmp_path) not in page + (results / "runs.jsonl").read_text("utf-8")
    assert {mean["method"] for mean in json.loads((results / "summary.json").read_text())["means"]} == set(PEERS)
    assert (results / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert "| mask | 2 |" in capsys.readouterr().out
    by_method = {row.method: row for row in rows if row.task == "trec"}
    assert by_method["mask"].bytes < by_method["lora-r8"].bytes < by_method["full"].bytes
    assert by_method["probe"].bytes == 0
    assert by_method["probe"].bfloat16_bytes is by_method["mask"].bfloat16_bytes is None
    # 100 numbers of four bytes, 50 bytes of names and shapes; the head's 10 numbers are in none of them
    row = replace(by_method["lora-r8"], bytes=450, trained_parameters=110, head_bytes=40)
    assert row.bfloat16_bytes == 250
    assert replace(row, dtype="bfloat16").bfloat16_bytes == 450, "saved so"
    assert len({row.head_bytes for row in by_method.values()}) == 1, "the head is the same in every method"


def test_a_second_call_trains_nothing(data: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = tmp_path / "results"
    run(data, model, results, "--seeds", "0", "--methods", "full", "probe")
    before = results_in(results)
    monkeypatch.setattr(training, "train", None)
    monkeypatch.setattr(probe, "train", None)
    run(data, model, results, "--seeds", "0", "--methods", "full", "probe")
    assert results_in(results) == before


def test_a_run_cut_off_is_taken_up_where_it_stopped(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, calls = training.train, []

    def cut_off(*arguments: Any) -> dict[str, Any]:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return train(*arguments)

    monkeypatch.setattr(training, "train", cut_off)
    for _ in range(2):
        try:
            runs.search(TASKS["trec"], METHODS["lora-r1"], [0], setting, tmp_path, STEPS)
        except KeyboardInterrupt:
            assert len(results_in(tmp_path)) == 2
    assert len(calls) == 4, "three tries, one of them begun twice"
    assert len(results_in(tmp_path)) == 3


def test_a_run_whose_parameters_are_gone_before_its_test_is_trained_again(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*arguments: Any) -> float:
        raise KeyboardInterrupt

    search = (TASKS["trec"], METHODS["mask"], [0], setting, tmp_path, STEPS)
    with monkeypatch.context() as patch:
        patch.setattr(training, "score_test", killed)
        with pytest.raises(KeyboardInterrupt):
            runs.search(*search)
    (before,) = results_in(tmp_path).values()
    (state,) = tmp_path.rglob("*.safetensors")
    state.unlink()
    train, calls = training.train, []

    def told(*arguments: Any) -> dict[str, Any]:
        calls.append(arguments)
        return train(*arguments) | {"trained_parameters": -1}

    monkeypatch.setattr(training, "train", told)
    runs.search(*search)
    assert len(calls) == 1
    (after,) = results_in(tmp_path).values()
    assert after.keys() - before.keys() == {"test"}
    assert after["loss"] == before["loss"]
    assert after["trained_parameters"] == -1 < before["trained_parameters"], "the row of the second training"


@pytest.mark.parametrize("name", ["mask", "lora-r1", "probe"])
def test_search_never_reads_test(setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    read: list[str] = []
    load = tasks.load_rows

    def spy(task: tasks.Task, split: tasks.Split, model: str, data: Path) -> Rows:
        if split == "test":
            read.append(f"test after {len(results_in(tmp_path))} results")
        return load(task, split, model, data)

    monkeypatch.setattr(training, "load_rows", spy)
    runs.search(TASKS["trec"], METHODS[name], [0, 1], setting, tmp_path, STEPS)
    tries = len(METHODS[name].lrs)
    expected = {f"test after {tries} results"}
    if name != "probe":
        expected.add(f"test after {tries + 1} results")
    assert set(read) == expected
    scored = [result for result in results_in(tmp_path).values() if "test" in result]
    assert len({result["lr"] for result in scored}) == 1
    assert len(scored) == (1 if name == "probe" else 2)


def test_search_chooses_the_rate_best_on_dev_and_the_smaller_of_equals(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dev = {1e-3: 0.5, 3e-3: 0.7, 1e-2: 0.7}
    train = training.train
    monkeypatch.setattr(training, "train", lambda *a: {**train(*a), "dev": dev[a[2]]})
    runs.search(TASKS["trec"], METHODS["lora-r8"], [0], setting, tmp_path, STEPS)
    scored = [key for key, result in results_in(tmp_path).items() if "test" in result]
    assert scored == [("trec", "lora-r8", 3e-3, 0, STEPS)]


def test_test_is_scored_with_the_parameters_of_the_run(setting: Setting, tmp_path: Path) -> None:
    method, task, state = METHODS["mask"], TASKS["ud_ewt_pos"], tmp_path / "state.safetensors"
    assert isinstance(method, Method)
    (setting.data / task.name / "test.conll").write_bytes((setting.data / task.name / "dev.conll").read_bytes())
    figures = training.train(task, method, 1e-3, 1, STEPS, setting, state)
    assert training.score_test(task, method, 1, setting, state) == figures["dev"]


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


def test_dev_chooses_among_more_rates_while_the_best_is_at_the_edge(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "MOST", 7)
    dev = {3e-3: 0.6, 1e-2: 0.7, 3e-2: 0.8, 1e-1: 0.75}
    train = training.train
    monkeypatch.setattr(training, "train", lambda *a: {**train(*a), "dev": dev[a[2]]})
    open_ended = replace(METHODS["lora-r1"], lrs=(3e-3, 1e-2))
    runs.search(TASKS["trec"], open_ended, [0], setting, tmp_path, STEPS)
    assert sorted(result["lr"] for result in results_in(tmp_path).values()) == sorted(dev)
    assert [key[2] for key, result in results_in(tmp_path).items() if "test" in result] == [3e-2]
    assert runs.unfinished_steps(TASKS["trec"], open_ended, [0], tmp_path, STEPS) == 0


@pytest.mark.parametrize(
    ("lrs", "best", "further"),
    [
        ((1e-3, 3e-3, 1e-2), 1e-2, 3e-2),
        ((1e-3, 3e-3, 1e-2), 1e-3, 3e-4),
        ((5e-4, 7e-3), 7e-3, 1e-2),
        ((1e-3, 3e-3, 1e-2), 3e-3, None),
        ((1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1), 1e-1, None),
        ((5e-4,), 5e-4, None),
    ],
)
def test_the_next_rate_is_about_three_times_beyond_an_edge(
    lrs: tuple[float, ...], best: float, further: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "MOST", 7)
    assert runs.beyond(lrs, best) == further


def test_a_study_without_an_adapter_or_a_whole_row_has_its_pages_too(
    data: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(data, model, tmp_path / "probe", "--methods", "probe")
    for task, method in (("trec", "mask"), ("ud_ewt_pos", "bitfit")):  # neither has a row for every task
        run(data, model, tmp_path / "parts", "--tasks", task, "--methods", method, "--seeds", "0")
    assert "| probe | 2 |" in capsys.readouterr().out
    assert all((tmp_path / name / "curve.png").exists() for name in ("probe", "parts"))


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


def test_a_run_is_a_function_of_its_seed(setting: Setting) -> None:
    method = METHODS["lora-r8"]
    assert isinstance(method, Method)
    losses = [training.train(TASKS["trec"], method, 1e-3, seed, STEPS, setting)["loss"] for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def test_a_run_can_be_watched(setting: Setting) -> None:
    method, seen = METHODS["full"], []
    assert isinstance(method, Method)

    def watch(step: int, model: torch.nn.Module) -> None:
        seen.append((step, model.classifier.weight.detach().clone()))

    training.train(TASKS["trec"], method, 1e-3, 0, STEPS, setting, watch=watch)
    assert [step for step, _ in seen] == [0, 1, 2, 3]
    first = training.untrained(TASKS["trec"], method, 0, setting).classifier.weight
    assert torch.equal(seen[0][1], first), "before the first step"
    assert all(not torch.equal(a, b) for (_, a), (_, b) in pairwise(seen)), "after each"


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


def test_a_long_training_is_followed_along_the_way(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(long, "MARKS", (1, 3, 5))
    options = ["--data", setting.data, "--model", setting.model, "--results", tmp_path / "long", "--steps", STEPS]
    long.main([str(option) for option in [*options, "--batch_size", 8]])
    ((key, result),) = long.runs_in(tmp_path / "long").read().items()
    assert key == ("trec", "mask", 5e-4, 8, STEPS)
    small = training.train(TASKS["trec"], METHODS["mask"], 5e-4, 0, STEPS, replace(setting, batch_size=8))
    assert result["loss"] == small["loss"]
    assert result["batch_size"] == 8
    assert list(result["along"]) == ["1", "3"]
    assert result["along"]["3"] == result["dev"], "scoring on the way changes nothing"
    line = capsys.readouterr().out.splitlines()[-1]
    assert f"| {100 * result['dev']:.1f} |" in line
    assert line in (tmp_path / "long/README.md").read_text("utf-8")


def test_scoring_on_the_way_does_not_end_the_training_mode(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long, "MARKS", (1,))
    arguments, dropped = (TASKS["trec"], METHODS["mask"], 5e-4), replace(setting, dropout=0.5)
    followed = long.follow(*arguments, STEPS, dropped)
    assert followed["loss"] == training.train(*arguments, 0, STEPS, dropped)["loss"]


def test_the_classifier_reads_the_mean_of_what_is_no_padding(tmp_path: Path) -> None:
    config = MPNetConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_labels=3
    )
    torch.manual_seed(0)
    MPNetModel(config).save_pretrained(tmp_path / "mpnet")
    model = model_class("SEQ_CLS", str(tmp_path / "mpnet")).from_pretrained(tmp_path / "mpnet", num_labels=3).eval()
    texts = torch.tensor([[0, 5, 6, 2], [0, 7, 2, 1]])  # 1 is padding
    kept = texts != 1
    states = model.mpnet(texts, attention_mask=kept).last_hidden_state
    means = torch.stack([states[0].mean(0), states[1, :3].mean(0)])
    outputs = model(texts, kept, torch.tensor([0, 2]))
    torch.testing.assert_close(outputs.logits, model.classifier(means))
    torch.testing.assert_close(outputs.loss, -outputs.logits.log_softmax(-1)[[0, 1], [0, 2]].mean())


def test_an_encoder_without_a_pooled_class_is_refused(tmp_path: Path) -> None:
    DistilBertConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="it is of type distilbert, pooled are bert, mpnet"):
        model_class("SEQ_CLS", str(tmp_path))


def test_a_result_made_with_other_settings_is_refused(setting: Setting, tmp_path: Path) -> None:
    runs.search(TASKS["trec"], METHODS["probe"], [0], setting, tmp_path, STEPS)
    row = "the row task=trec, method=probe, lr=0.001, seed=0, steps=3 of '.*runs.jsonl'"
    with pytest.raises(ValueError, match=row + r" was made with the settings .* Delete that row"):
        runs.search(TASKS["trec"], METHODS["probe"], [0], replace(setting, batch_size=8), tmp_path, STEPS)


def test_parameters_of_another_method_are_refused(setting: Setting, tmp_path: Path) -> None:
    method = METHODS["full"]
    assert isinstance(method, Method)
    save_file({"other": torch.zeros(1)}, tmp_path / "state.safetensors")
    with pytest.raises(ValueError, match=r"cannot score 'state.safetensors': it holds other parameters than full"):
        training.score_test(TASKS["trec"], method, 0, setting, tmp_path / "state.safetensors")


def test_the_rate_that_dev_likes_best_is_in_the_tables(setting: Setting, tmp_path: Path) -> None:
    runs.search(TASKS["trec"], METHODS["probe"], [0], setting, tmp_path, STEPS)
    results = [{**result, "dev": 0.5, "test": 0.7} for result in summary.read_results(tmp_path)]
    (row,) = summary.rows_of(results)
    assert (row.lr, row.at_edge) == (0.001, True), "the smallest of equal ones"
    results[1] |= {"dev": 0.6, "test": 0.4}
    (row,) = summary.rows_of(results)
    assert (row.lr, row.test, row.at_edge) == (0.01, (0.4,), False), "though its test is worse"
    del results[1]["test"]
    assert not summary.rows_of(results), "the test of another rate does not stand in for it"


def test_data_folder_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main([])
    assert "--data is missing" in capsys.readouterr().err


def test_a_words_label_stands_on_its_last_piece_and_words_cut_off_count(setting: Setting) -> None:
    rows = setting.rows(TASKS["ud_ewt_pos"], "dev")
    assert rows.labels[0] == [IGNORED, 2, 0, IGNORED, 0, 1, IGNORED]  # [CLS] the red un ##happy runs [SEP]
    short = setting.rows(replace(TASKS["ud_ewt_pos"], max_length=4), "dev")
    assert short.labels[0] == [IGNORED, 2, 0, IGNORED]
    assert short.labelled == rows.labelled == 9 * 4


def test_batches_are_a_function_of_the_seed_and_show_every_row_once_an_epoch() -> None:
    rows = Rows([[0] * (1 + i % 7) for i in range(96)], [0] * 96, 96, pad=0)
    batches = list(training_batches(rows, seed=3, steps=6, batch_size=32))
    assert batches == list(training_batches(rows, seed=3, steps=6, batch_size=32))
    assert batches != list(training_batches(rows, seed=4, steps=6, batch_size=32))
    assert sorted(chain(*batches[:3])) == sorted(chain(*batches[3:])) == list(range(96))
    assert batches[:2] == list(training_batches(rows, seed=3, steps=2, batch_size=32))


@pytest.mark.parametrize("numbers", [(0, 32), (STEPS, 0), (-1, 32)])
def test_steps_and_batches_of_nothing_are_refused(setting: Setting, numbers: tuple[int, int]) -> None:
    rows = setting.rows(TASKS["trec"], "train")
    with pytest.raises(ValueError, match=f"steps and batch_size must be at least 1, got {numbers[0]} and {numbers[1]}"):
        next(training_batches(rows, 0, *numbers))


def test_too_few_rows_for_a_batch_are_refused() -> None:
    with pytest.raises(ValueError, match="a batch of 32 needs as many rows, the training split has 1"):
        list(training_batches(Rows([[0]], [0], 1, pad=0), seed=0, steps=1, batch_size=32))
