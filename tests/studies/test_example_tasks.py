"""The scripts for tagging, multiple choice and question answering: what they encode, how they score, what they save."""

from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModel, PeftModel, get_peft_model
from safetensors import safe_open
from transformers import (
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from examples import multiple_choice, question_answering
from examples.question_answering import AnswerArguments
from peft_mask import MaskConfig
from peft_mask.analysis import adapter_logits, ensemble, labels_of
from peft_mask.recipes import token_classification
from peft_mask.recipes.tagging import IGNORED
from tests.text_rows import write_jsonl

CONTEXT = "a cat sat on the old oak in may"
QUESTIONS = [
    {"question": "who sat", "context": CONTEXT, "answers": {"text": ["a cat"], "answer_start": [0]}},
    {"question": "when", "context": CONTEXT, "answers": {"text": ["may"], "answer_start": [28]}},
    {"question": "who ran", "context": CONTEXT, "answers": {"text": [], "answer_start": []}},
]
CHOICES = [{"context": f"it is {i}", "choices": ["cat", "oak", "ox"], "label": i % 3} for i in range(12)]
SWAG = [{"sent1": "it ran", "sent2": "a cat", "ending0": "sat", "ending1": "fell", "label": i % 2} for i in range(12)]
TAGS = [{"tokens": ["cat", "in", "oak"], "ner_tags": ["B-pet", "O", "B-tree"]} for _ in range(12)]


def run(script, model, output, *arguments, **files):
    common_arguments = ["--model_name_or_path", model, "--output_dir", str(output), "--max_steps", "2"]
    quiet = ["--use_cpu", "true", "--disable_tqdm", "true", "--report_to", "none"]
    named = [
        part for name, rows in files.items() for part in (f"--{name}", write_jsonl(output / f"{name}.jsonl", rows))
    ]
    return script.main([*common_arguments, *quiet, *named, *arguments])


@pytest.mark.parametrize(
    ("script", "rows", "auto", "labels", "head", "figures"),
    [
        (token_classification, TAGS, AutoModelForTokenClassification, 3, 3 * 33, {"accuracy", "f1"}),
        (multiple_choice, CHOICES, AutoModelForMultipleChoice, 0, 33, {"accuracy"}),
        (multiple_choice, SWAG, AutoModelForMultipleChoice, 0, 33, {"accuracy"}),
        (question_answering, QUESTIONS, AutoModelForQuestionAnswering, 0, 2 * 33, {"exact_match", "f1"}),
    ],
)
def test_scripts_learn_from_local_files_and_the_head_travels(
    tiny_bert,
    tmp_path,
    script,
    rows,
    auto,
    labels,
    head,
    figures,
):
    found = run(script, tiny_bert, tmp_path, train_file=rows, test_file=rows)
    assert found.keys() == {*figures, "mask_bytes", "head_bytes"}
    assert found["head_bytes"] == 4 * head
    loaded = [
        PeftModel.from_pretrained(
            auto.from_pretrained(tiny_bert, **({"num_labels": labels} if labels else {})), tmp_path
        ).state_dict()
        for _ in range(2)
    ]
    trained = {key for key in loaded[0] if "modules_to_save" in key}
    assert trained
    assert all(torch.equal(loaded[0][key], loaded[1][key]) for key in trained), "no random head"
    named = MaskConfig.from_pretrained(tmp_path).label_names
    assert len(named or ()) == (labels or 0)


def test_the_tags_are_in_the_column_that_is_asked_for(tiny_bert, tmp_path):
    (tmp_path / "eng.txt").write_text("-DOCSTART- -X- -X- O\n\n" + "EU NNP B-NP B-ORG\nran VBZ B-VP O\n\n" * 10)
    arguments = ["--train_file", str(tmp_path / "eng.txt"), "--label_column", "2"]
    assert run(token_classification, tiny_bert, tmp_path, *arguments).keys() == {"accuracy", "mask_bytes", "head_bytes"}
    assert MaskConfig.from_pretrained(tmp_path).label_names == ("NNP", "VBZ")


def test_the_head_of_a_multiple_choice_model_is_saved_without_being_named(tiny_bert, tmp_path):
    base = AutoModelForMultipleChoice.from_pretrained(tiny_bert)
    model = get_peft_model(base, MaskConfig())
    assert model.base_model.model.classifier.modules_to_save.default.weight.requires_grad
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", framework="pt") as file:
        assert [key for key in file.keys() if "classifier" in key] == [  # noqa: SIM118 (not a mapping)
            "base_model.model.classifier.bias",
            "base_model.model.classifier.weight",
        ]
    again = AutoPeftModel.from_pretrained(tmp_path)
    inputs = {"input_ids": torch.full((1, 3, 4), 7), "attention_mask": torch.ones(1, 3, 4, dtype=torch.long)}
    with torch.inference_mode():
        assert torch.equal(again.eval()(**inputs).logits, model.eval()(**inputs).logits)


def test_every_choice_is_read_beside_what_all_have_in_common():
    assert multiple_choice.pairs(CHOICES[0]) == (["it is 0"] * 3, ["cat", "oak", "ox"])
    row = SWAG[0] | {f"ending{i}": str(i) for i in range(11)}
    assert multiple_choice.pairs(row) == (["it ran"] * 11, [f"a cat {i}" for i in range(11)])


def encoded(rows, model, **fields):
    """Training windows and test windows of rows, and the tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    arguments = AnswerArguments("", max_seq_length=fields.pop("max_seq_length", 60), doc_stride=8, **fields)
    batch = {name: [row[name] for row in rows] for name in rows[0]}
    train = question_answering.encode_train(dict(batch), tokenizer, arguments)
    test = question_answering.encode_test(batch, list(range(len(rows))), tokenizer, arguments)
    return train, Dataset.from_dict(test), tokenizer, arguments


def test_an_answer_is_marked_by_its_first_and_last_token(tiny_bert):
    train, test, tokenizer, _ = encoded(QUESTIONS, tiny_bert)
    spelled = [
        tokenizer.decode(ids[start : end + 1]).replace(" ", "")
        for ids, start, end in zip(train["input_ids"], train["start_positions"], train["end_positions"], strict=True)
    ]
    assert spelled == ["acat", "may", "[CLS]"]
    assert test["row"][:] == [0, 1, 2]


def test_a_long_context_has_windows_and_the_answer_is_marked_where_it_is(tiny_bert):
    train, test, *_ = encoded(QUESTIONS[:2], tiny_bert, max_seq_length=24)
    assert test["row"][:] == [0, 0, 0, 1, 1]
    assert [start > 0 for start in train["start_positions"]] == [True, False, False, False, True]


@pytest.mark.parametrize("strict", [False, True])
def test_answers_come_back_from_the_logits_of_the_right_tokens(tiny_bert, strict):
    train, test, _, arguments = encoded(QUESTIONS, tiny_bert, max_seq_length=24, version_2_with_negative=strict)
    width = max(map(len, train["input_ids"]))
    starts, ends = np.zeros((2, len(test), width))
    for window, (start, end) in enumerate(zip(train["start_positions"], train["end_positions"], strict=True)):
        starts[window, start] = ends[window, end] = 5.0  # also [CLS], in windows without the answer
    contexts = [row["context"] for row in QUESTIONS]
    answers = question_answering.answers_of(starts, ends, test, contexts, arguments)
    assert answers[:2] == ["a cat", "may"]
    assert (answers[2] == "") == strict


def test_the_files_of_squad_have_a_row_a_question():
    def paragraph(*rows):
        asked = [
            {
                "question": row["question"],
                "answers": [
                    {"text": text, "answer_start": start}
                    for text, start in zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True)
                ],
            }
            for row in rows
        ]
        return {"context": CONTEXT, "qas": asked}

    articles = [{"paragraphs": [paragraph(*QUESTIONS[:2]), paragraph(QUESTIONS[2])]}, {"paragraphs": []}]
    assert question_answering.flat(Dataset.from_list(articles)).to_list() == QUESTIONS
    rows = Dataset.from_list(QUESTIONS)
    assert question_answering.flat(rows) is rows


def test_a_span_is_in_the_context_not_too_long_and_the_right_way_round():
    starts, ends = np.zeros(8), np.zeros(8)
    starts[[1, 5]], ends[[2, 4, 6]] = [9, 3], [9, 2, 1]
    assert question_answering.best_span(starts, ends, (3, 8), 20, 30) == (4.0, 5, 6)
    assert question_answering.best_span(starts, ends, (3, 8), 20, 1) == (3.0, 5, 5)
    assert question_answering.best_span(starts, ends, (3, 8), 1, 30) == (3.0, 5, 5), "the best end is before it"


def test_squad_scores_words_without_articles_and_takes_the_best_answer():
    scores = question_answering.squad_scores(["The cat.", "old oak", "x", ""], [["a cat"], ["oak", "elm"], ["y"], []])
    assert scores == {"exact_match": 50.0, "f1": pytest.approx(100 * (1 + 2 / 3 + 0 + 1) / 4)}


@pytest.mark.parametrize(
    ("script", "rows", "message"),
    [
        (multiple_choice, [{"context": "a", "choices": ["b", "c"]}], r"there is no column \['label'\]"),
        (
            multiple_choice,
            [{"context": "a", "choices": ["b", "c"], "label": 2}],
            "column 'label': expected the number of the right choice, from 0 to 1, got 2",
        ),
        (question_answering, [{"question": "a", "answers": {"text": [], "answer_start": []}}], r"\['context'\]"),
        (token_classification, [{"text": ["a"], "tags": ["X"]}], r"name the column with --text_column"),
        (
            token_classification,
            [{"tokens": ["a", "b"], "tags": ["X"]}],
            r"train_file.jsonl: row 1: expected a tag for each word, found 2 words and 1 tags",
        ),
        (token_classification, [{"tokens": ["a", ""], "tags": ["X", "Y"]}], "row 1: a word or a tag is empty"),
        (
            token_classification,
            [{"tokens": "a b", "tags": "X Y"}],
            "column 'tokens' holds string; expected a list in ea",
        ),
        (token_classification, [{"tokens": ["a", "b"], "tags": ["O", "O"]}], "column 'tags' holds 'O' alone"),
        (
            multiple_choice,
            [{"context": "a", "choices": ["b"], "label": 0}],
            "row 1: expected two choices or more, as ma",
        ),
        (multiple_choice, [*CHOICES, CHOICES[0] | {"choices": ["b", "c"]}], r"as many as in row 1 \(3\), found 2"),
        (multiple_choice, [CHOICES[0] | {"label": None}], "row 1: column 'label' is empty"),
        (multiple_choice, [CHOICES[0] | {"choices": [1, 2]}], "row 1: expected texts, found"),
        *[
            (
                question_answering,
                [QUESTIONS[0] | {"answers": answers}],
                "row 1: column 'answers': expected an object with the lists 'text', of texts, and 'answer_start'",
            )
            for answers in (
                "a cat",
                [{"text": "a cat", "answer_start": 0}],
                {"text": ["a cat"], "answer_start": []},
                {"text": ["a cat"], "answer_start": ["0"]},
                {"text": "a cat", "answer_start": 0},
            )
        ],
        (
            question_answering,
            [QUESTIONS[0] | {"answers": {"text": ["a cat"], "answer_start": [1]}}],
            "at character 1 of the context expected 'a cat', found ' cat '",
        ),
        (question_answering, [{"paragraphs": [{"context": "a"}]}], "expected paragraphs as in SQuAD, .*'qas'"),
    ],
)
def test_scripts_name_the_column_or_row_that_is_wrong(tiny_bert, tmp_path, script, rows, message):
    with pytest.raises(SystemExit, match=message):
        run(script, tiny_bert, tmp_path, train_file=rows * 10, test_file=rows)


def test_a_tag_that_was_never_seen_is_named(tiny_bert, tmp_path: Path):
    with pytest.raises(SystemExit, match="label 'B-bird' does not occur"):
        run(
            token_classification,
            tiny_bert,
            tmp_path,
            train_file=TAGS,
            test_file=[{"tokens": ["cat"], "ner_tags": ["B-bird"]}],
        )


def test_snapshots_of_a_cyclic_learning_rate_make_an_ensemble(tiny_bert, tmp_path):
    cycles = ["--lr_scheduler_type", "cosine_with_restarts", "--lr_scheduler_kwargs", '{"num_cycles": 2}']
    run(token_classification, tiny_bert, tmp_path, *cycles, "--save_steps", "1", train_file=TAGS, test_file=TAGS)
    base = AutoModelForTokenClassification.from_pretrained(tiny_bert, num_labels=3)
    model = PeftModel.from_pretrained(base, tmp_path / "checkpoint-1", adapter_name="1")
    model.load_adapter(tmp_path / "checkpoint-2", "2")
    rows = [{"input_ids": torch.arange(5, 9)[None], "labels": torch.tensor([[0, 1, IGNORED, 2]])}]
    logits = adapter_logits(model, ["1", "2"], rows)
    assert logits.shape == (2, 3, 3)
    assert not torch.equal(*logits)
    assert ensemble(logits, "labels").shape == labels_of(rows).shape


def test_what_the_readme_shows_loads_and_predicts(tiny_bert, tmp_path, monkeypatch, capsys):
    heads = {
        "out": (AutoModelForSequenceClassification, "SEQ_CLS", ["pet", "tree", "fish"]),
        "tags": (AutoModelForTokenClassification, "TOKEN_CLS", ["O", "B-x", "I-x"]),
        "choice": (AutoModelForMultipleChoice, None, []),
        "answers": (AutoModelForQuestionAnswering, "QUESTION_ANS", []),
    }
    for name, (auto, task_type, labels) in heads.items():
        base = auto.from_pretrained(tiny_bert, **({"id2label": dict(enumerate(labels))} if labels else {}))
        get_peft_model(base, MaskConfig(task_type=task_type)).save_pretrained(tmp_path / name)
    text = (Path(__file__).parents[2] / "examples" / "README.md").read_text("utf-8")
    blocks = [part.split("```")[0] for part in text.split("```python\n")[1:]]
    monkeypatch.chdir(tmp_path)
    source = "".join(blocks[:2]).replace("sentence-transformers/all-MiniLM-L6-v2", tiny_bert)
    exec(compile(source, "examples/README.md", "exec"), {})
    first, second, third, _ = capsys.readouterr().out.splitlines()
    assert first in heads["out"][2]
    assert {tag for _, tag in eval(second)} <= {"O", "B-x", "I-x"}
    assert [word for word, _ in eval(second)] == ["Ada", "lives", "in", "Turin"]
    assert third in ("It is orange.", "It does not taste good there.")
