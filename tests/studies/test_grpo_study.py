"""The study of GRPO: the same problems for all, a row a training, and a page that follows from the rows."""

import json

import pytest

from benchmarks import grpo as study
from benchmarks.grpo import ARMS, asked, main, runs_in, write_problems
from examples import grpo
from tests.chat_models import tiny_chat_model

pytest.importorskip("trl", reason="trl is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tiny_chat_model(tmp_path_factory.mktemp("chat")))


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Two steps on few and small sums."""
    for name, value in {"LARGEST": 4, "TRAIN": 8, "TEST": 4, "STEPS": 2, "LENGTH": 4}.items():
        monkeypatch.setattr(study, name, value)
    monkeypatch.setattr(study, "WINDOWS", ((0, 1), (1, 2)))


def by_letter(completions, **_):
    """A reward that a random model gets now and then."""
    return [float(completion[-1]["content"][:1] < "m") for completion in completions]


def test_all_trainings_have_the_same_problems_and_none_is_in_both_splits(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_problems(tmp_path / name)
    texts = {split: (tmp_path / "a" / f"{split}.jsonl").read_text() for split in ("train", "test")}
    assert texts == {split: (tmp_path / "b" / f"{split}.jsonl").read_text() for split in texts}
    train, test = ([json.loads(line) for line in texts[split].splitlines()] for split in ("train", "test"))
    assert (len(train), len(test)) == (8, 4)
    for row in (*train, *test):
        a, b = row["prompt"][-1]["content"].removesuffix(" =").split(" + ")
        assert int(a) + int(b) == int(row["answer"])
    assert not {row["prompt"][-1]["content"] for row in train} & {row["prompt"][-1]["content"] for row in test}


def test_a_question_follows_an_example_in_its_own_form():
    *example, question = asked("What is 4 + 5?")
    assert [message["role"] for message in (*example, question)] == ["system", "user", "assistant", "user"]
    assert question["content"] == "4 + 5 ="
    assert example[1]["content"] == "2 + 3 ="


def test_an_arm_is_a_row_that_is_not_made_twice_and_a_line_of_the_page(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(grpo, "correct", by_letter)
    command = ["--model", folder, "--arms", "mask-0.0001", "lora-5e-4", "--results", str(tmp_path)]
    main([*command, "--seeds", "0", "1"])
    rows = runs_in(tmp_path).read()
    assert list(rows) == [("lora-5e-4", 0), ("lora-5e-4", 1), ("mask-0.0001", 0), ("mask-0.0001", 1)]
    for row in rows.values():
        assert len(row["rewards"]) == len(row["alike"]) == len(row["entropy"]) == 2
        assert 0 <= row["before"] <= 1
        assert 0 <= row["after"] <= 1
    assert rows["mask-0.0001", 0]["trained"] != rows["lora-5e-4", 0]["trained"]
    before = {key: row["before"] for key, row in rows.items()}
    assert len(set(before.values())) == 1, "the same base, the same questions"
    monkeypatch.setattr(grpo, "main", None)
    main([*command, "--seeds", "0", "1"])
    page = (tmp_path / "README.md").read_text("utf-8")
    assert "| LoRA r=8, 5e-4 | 16 | 2 |" in page
    assert "| mask, 0.01 % | 16 | 2 |" in page


@pytest.mark.parametrize("name", ARMS)
def test_the_arguments_of_every_arm_are_ones_that_the_example_takes(name, folder, tmp_path, monkeypatch):
    seen = []

    def main(argv):
        seen.append(argv)
        log = [{"reward": 0.5, "frac_reward_zero_std": 0.0, "entropy": 0.1}] * 2
        return dict.fromkeys(("before", "after", "saved_bytes", "trained_parameters", "seconds"), 1) | {"log": log}

    monkeypatch.setattr(grpo, "main", main)
    study.run(name, 3, folder, tmp_path)
    (argv,) = seen
    parser = grpo.HfArgumentParser((grpo.ScriptArguments, grpo.GRPOConfig))
    parser.set_defaults(per_device_train_batch_size=16)
    arguments, settings = parser.parse_args_into_dataclasses(args=[*argv, "--use_cpu", "true"])
    assert settings.seed == 3
    assert settings.per_device_train_batch_size == ARMS[name].completions
    assert grpo.adapter_of(arguments, grpo.SPARSITY) is not None or name.startswith("full")
