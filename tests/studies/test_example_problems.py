"""Reinforcement learning on files of one's own: the reward, what a row may be, which are taken, what is refused."""

import json
from decimal import Decimal

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples import grpo
from examples.problems import hold_out, load_problems, take
from examples.rewards import correct, last_number, share_right
from peft_mask import Masks
from tests.studies.test_example_grpo import tokenizer
from tests.tiny_models import tiny_model

TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    "{{ message.content }}{% endfor %}{% if add_generation_prompt %}={% endif %}"
)
ROWS = [{"prompt": f"what is {number}", "answer": number % 4} for number in range(20)]
DECIMALS = st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**12), max_value=10**12, places=3)


def write(file, rows):
    """Write rows as the file's name says, and return the name."""
    if file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        return str(file)
    table = pd.DataFrame(rows)
    {
        ".json": lambda: table.to_json(file, orient="records"),
        ".parquet": lambda: table.to_parquet(file),
        ".csv": lambda: table.to_csv(file, index=False),
        ".tsv": lambda: table.to_csv(file, index=False, sep="\t"),
    }[file.suffix]()
    return str(file)


def load(folder, rows, name="train.jsonl", template=TEMPLATE):
    return load_problems("train_file", write(folder / name, rows), tokenizer(template))


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    tiny_model("llama", "lm").save_pretrained(folder)
    tokenizer(TEMPLATE).save_pretrained(folder)
    return str(folder)


def run(model, output, *arguments):
    common = ["--model_name_or_path", model, "--output_dir", str(output), "--max_steps", "2", "--logging_steps", "1"]
    common += ["--per_device_train_batch_size", "16", "--num_generations", "8", "--max_completion_length", "4"]
    return grpo.main([*common, "--use_cpu", "true", "--disable_tqdm", "true", *arguments])


# ---- the reward ----


@given(
    number=DECIMALS, text=st.sampled_from(["{}", "so {}", "1 and {}.", "= {}\n", "**{}**", "it is {}, I think", "$ {}"])
)
def test_a_number_is_the_same_however_it_is_written_and_whatever_is_said_before(number, text):
    written = {f"{number:f}", f"{number:,f}", f"{number:f}0", f"{number:020f}", f"{number:f}".replace("-", "\u2212")}
    for one in written:
        assert last_number(text.format(one)) == number
        assert correct([[{"content": text.format(one)}]], [f"{number:f}"]) == [1.0]
        assert correct([[{"content": text.format(one)}]], [f"{number + 1:f}"]) == [0.0]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("7-4", "4"),
        ("7 - 4", "4"),
        ("(7)-4", "4"),
        ("1-4=-3", "-3"),
        (".5", "0.5"),
        ("so... 5", "5"),
        ("so...5", "5"),
        ("1,2,3", "3"),
        ("1,2345", "2345"),
        ("12, not 1,100", "1100"),
        ("$1,234.50.", "1234.5"),
        ("9" * 5000, "9" * 5000),
    ],
)
def test_the_last_number_is_what_a_reader_takes_it_for(text, number):
    assert last_number(text) == Decimal(number)


@pytest.mark.parametrize("text", ["", "-", "I do not know.", "1 or 2? None", ", . -"])
def test_a_reply_without_the_number_is_wrong(text):
    assert correct([[{"content": text}]], ["0"]) == [0.0]


# ---- files ----


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "a.csv", "a.tsv"])
def test_problems_are_the_same_in_every_type_of_file(tmp_path, name):
    problems = load(tmp_path, ROWS, name)
    assert problems["answer"][:] == [str(row["answer"]) for row in ROWS]
    assert problems["prompt"][:] == [[{"role": "user", "content": row["prompt"]}] for row in ROWS]


def test_a_prompt_may_be_a_chat_and_other_columns_are_left_alone(tmp_path):
    roles = ("system", "user", "assistant", "user")
    chat = [{"role": role, "content": f"{role} says"} for role in roles]
    problems = load(
        tmp_path, [{"prompt": chat, "answer": "1", "completion": "b"}], template="{{ messages[0].content }}"
    )
    assert problems.to_list() == [{"prompt": chat, "answer": "1"}]


@pytest.mark.parametrize(
    ("answer", "number"),
    [(3, "3"), (-2.5, "-2.5"), (1e20, "1" + "0" * 20), (1e-7, "0.0000001"), ("1,000", "1000"), ("007", "7")],
)
def test_an_answer_may_be_a_number_or_a_text(tmp_path, answer, number):
    assert load(tmp_path, [{"prompt": "a", "answer": answer}])["answer"][:] == [number]


def test_of_an_answer_with_its_reasons_the_last_number_counts(tmp_path):
    assert load(tmp_path, [{"prompt": "a", "answer": "She has 40+2=42.\n#### 42"}])["answer"][:] == ["42"]


def answers(*values):
    return [{"prompt": "a", "answer": value} for value in values]


def prompts(*values):
    return [{"prompt": value, "answer": 1} for value in values]


def says(*roles):
    return [{"role": role, "content": "a"} for role in roles]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "a", "answer": 1}], r"there is no column \['prompt'\]; the data have \['question', 'answer'\]"),
        ([{"prompt": "a", "completion": "1"}], r"there is no column \['answer'\]; the data have"),
        ([], r"the file is empty; expected rows"),
        (answers("1", None), r"row 2: column 'answer' is empty; fill it in or leave the row out"),
        (answers("1", "many"), r"row 2: the answer 'many' holds no number; expected one, as 42, '1,000' or a text"),
        (answers(True), r"row 1: the answer True holds no number"),
        (answers(1.5, float("nan")), r"row 2: the answer nan holds no number"),
        (answers(float("inf")), r"row 1: the answer inf holds no number"),
        (answers([1]), r"row 1: the answer \[1\] holds no number"),
        (prompts("a", " "), r"row 2: message 1, of the user, has no text in 'content'"),
        (prompts(5), r"row 1: message 1, of the user, has no text in 'content'"),
        (prompts(says("user"), []), r"row 2: the last message of the prompt is missing; expected the user's"),
        (
            prompts(says("user", "assistant")),
            r"row 1: the last message of the prompt is of the assistant; expected the",
        ),
        (prompts(says("human")), r"row 1: message 1 has the role 'human'; expected one of system, user, assistant"),
        (prompts(says("user"), says("system", "user")), r"row 2: the chat template refuses the prompt: no system here"),
    ],
)
def test_a_row_that_is_no_problem_is_named(tmp_path, rows, message):
    with pytest.raises(ValueError, match=rf"^--train_file \S*train.jsonl: {message}"):
        load(tmp_path, rows)


# ---- which rows ----


def test_rows_are_taken_from_the_first_on_and_all_if_no_number_is_given(tmp_path):
    problems = load(tmp_path, ROWS)
    assert take(problems, "train_problems", 3)[:] == problems[:3]
    assert take(problems, "train_problems", None)[:] == take(problems, "train_problems", 20)[:] == problems[:]


@pytest.mark.parametrize(("count", "held"), [(None, 2), (1, 1), (19, 19)])
def test_rows_are_either_learned_or_held_out_as_the_seed_says(tmp_path, count, held):
    problems = load(tmp_path, ROWS)
    train, test = hold_out(problems, count, seed=0)
    assert len(test) == held
    asked = [row["prompt"][0]["content"] for row in (*train, *test)]
    assert sorted(asked) == sorted(row["prompt"] for row in ROWS)
    assert hold_out(problems, count, seed=0)[1][:] == test[:]
    assert hold_out(problems, count, seed=1)[1][:] != test[:]


# ---- the script ----


def test_a_mask_is_learned_from_a_file_and_says_which(chat_model, tmp_path, capsys):
    train, test = write(tmp_path / "mine.jsonl", ROWS), write(tmp_path / "other.csv", ROWS[:5])
    results = run(
        chat_model, tmp_path / "out", "--train_file", train, "--test_file", test, "--train_problems", "16",
        "--test_problems", "4", "--target_modules", "gate-projections",
    )  # fmt: skip
    assert [results[name] for name in ("data", "train_problems", "test_problems")] == ["other.csv", 16, 4]
    assert {name.rpartition(".")[2] for name in Masks.load(tmp_path / "out")} == {"gate_proj"}
    printed = capsys.readouterr().out
    assert "held-out answers that are right: " in printed
    assert "(4 problems, other.csv)" in printed
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert "| problems | 16 to learn from, 4 held out, of other.csv |" in card
    assert f"--train_file {train} --test_file {test}" in card
    assert "sums" not in printed + card


def test_without_a_test_file_a_tenth_is_held_out(chat_model, tmp_path):
    results = run(chat_model, tmp_path / "out", "--train_file", write(tmp_path / "mine.jsonl", ROWS))
    assert [results[name] for name in ("data", "train_problems", "test_problems")] == ["mine.jsonl", 18, 2]


@pytest.mark.parametrize(("own", "length"), [(False, 16), (True, 512)])
def test_replies_are_as_long_as_sums_need_or_trl_has_it(chat_model, tmp_path, monkeypatch, own, length):
    def seen(model, tokenizer, train, test, arguments, settings):
        raise ValueError(f"length {settings.max_completion_length}")

    monkeypatch.setattr(grpo, "trainer_of", seen)
    file = ["--train_file", write(tmp_path / "mine.jsonl", ROWS)] if own else []
    with pytest.raises(SystemExit, match=f"length {length}$"):
        grpo.main(["--model_name_or_path", chat_model, "--output_dir", str(tmp_path), "--use_cpu", "true", *file])


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        (20, "--largest 9", r"--largest 9 is for sums, and the problems are those of --train_file \S*; leave one of"),
        (20, "--train_problems 19", r"--train_problems 19: --train_file \S* has 18 rows for that; give 1 to as many"),
        (20, "--train_problems 0", r"--train_problems 0: --train_file \S* has 18 rows for that"),
        (
            20,
            "--test_problems 20",
            r"--test_problems 20: --train_file \S* has 20 rows, of which one at .*; give 1 to 19",
        ),
        (20, "--test_problems 0", r"--test_problems 0: --train_file \S* has 20 rows, of which one at least"),
        (20, "--test_file FILE --test_problems 21", r"--test_problems 21: --test_file \S* has 20 rows for that"),
        (20, "--test_file gone.jsonl", r"--test_file gone\.jsonl: there is no such file"),
        (1, "", r"--train_file \S*: one row cannot be both learned and held out; give --test_file"),
        (2, "", r"1 problems to learn from are too few for one step, which asks 2 different ones; add some, or lower"),
        (0, "", r"--train_file \S*: the file is empty"),
        (None, "--test_file FILE", r"--test_file \S* goes with --train_file; give both, or neither for sums"),
        (
            20,
            "--target_modules gate-projections q_proj",
            r"--target_modules gate-projections stands for modules itself; leave the other",
        ),
        (
            20,
            "--target_modules gate-projections --method lora",
            r"--target_modules gate-projections is known to masks alone; name",
        ),
    ],
)
def test_what_does_not_go_together_ends_with_one_sentence(chat_model, tmp_path, rows, arguments, message):
    file = write(tmp_path / "mine.jsonl", ROWS[: rows or 0])
    given_file = [] if rows is None else ["--train_file", file]
    words = [file if word == "FILE" else word for word in arguments.split()]
    with pytest.raises(SystemExit, match=f"^error: {message}"):
        run(chat_model, tmp_path / "out", *given_file, *words)
    assert not (tmp_path / "out" / "results.json").exists()


def test_the_share_of_right_replies_is_of_all_of_them():
    assert share_right(["it is 4", "5", "none", "12 + 1 = 13"], ["4", "6", "7", "13"]) == 0.5
