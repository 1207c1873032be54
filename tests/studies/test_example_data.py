"""The data of the examples: how they were cut from their sources, and what is in the repository."""

import pytest
from datasets import load_dataset

from examples.data import cut
from examples.demo import __main__ as demo
from examples.demo.tasks import DATA
from peft_mask.recipes.tagging import read_columns

SPLITS = ("train", "test")

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"


def test_cut_reads_the_syntactic_words_of_conllu(tmp_path):
    lines = [
        "# text = don't go",
        "1-2\tdon't\t_\t_",
        "1\tdo\tdo\tAUX",
        "2\tn't\tnot\tPART",
        "2.1\tx\tx\tVERB",
        "3\tgo\tgo\tVERB",
    ]
    (tmp_path / "a.conllu").write_text("\n".join([*lines, "", "# text = no", "1\tno\tno\tINTJ", "", ""]))
    expected = [[("do", "AUX"), ("n't", "PART"), ("go", "VERB")], [("no", "INTJ")]]
    assert cut.read_conllu(tmp_path / "a.conllu") == expected


def test_cut_chooses_from_the_set_of_sentences():
    short, long = [("a", "A")], [("b", "B")] * (cut.SENTENCE_WORDS + 1)
    invisible, known, other = [("\ufe0f", "A")], [("a", "B")], [("c", "C")]
    expected = {"train": [short], "test": [other]}
    assert cut.cut_sentences([short, short, long], [other, known, invisible, long, other], (1, 1)) == expected
    many = [[(letter, "A")] for letter in LETTERS]
    assert cut.cut_sentences(many, many[:0], (9, 0)) == cut.cut_sentences(many[::-1], many[:0], (9, 0))


@pytest.mark.parametrize(("name", "tags"), [(demo.FIRST, 17), (demo.SECOND, 13)])
def test_committed_sentences_have_every_tag_in_both_splits_and_share_none(name, tags):
    splits = {split: read_columns(DATA / name / f"{split}.conll") for split in SPLITS}
    for sentences in splits.values():
        assert len({tag for sentence in sentences for _, tag in sentence}) == tags
        assert all(word.strip() == word and word for sentence in sentences for word, _ in sentence)
    train, test = ({tuple(word for word, _ in sentence) for sentence in splits[split]} for split in SPLITS)
    assert not train & test


@pytest.mark.parametrize(("name", "labels"), [("banking77", 77), ("clinc150", 150)])
def test_committed_texts_have_every_label_in_both_splits(name, labels):
    files = {split: str(DATA / name / f"{split}.csv") for split in SPLITS}
    rows = load_dataset("csv", data_files=files)
    assert len(set(rows["train"]["label"])) == labels
    assert set(rows["train"]["label"]) == set(rows["test"]["label"])
    assert rows["train"].column_names == ["text", "label"]


def test_committed_data_stay_small_and_say_where_they_come_from():
    files = [file for file in DATA.rglob("*") if file.is_file() and file.suffix != ".pyc"]
    assert sum(file.stat().st_size for file in files) < 1_000_000
    text = (DATA / "README.md").read_text()
    for name in (demo.FIRST, demo.SECOND, "banking77", "clinc150", "CC BY 3.0", "CC BY 4.0", "CC BY-SA 4.0"):
        assert name in text
