"""Files of rows and of CoNLL columns: what each way of writing them gives, and what is said of those that are wrong."""

import gzip
import json

import pandas as pd
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from examples import script
from peft_mask.recipes.conll import read_conll
from peft_mask.recipes.files import FILE_TYPES, load_file
from peft_mask.recipes.tagging import read_columns

TEXTS = {"text": ["My card, where?", "free"], "label": ["07", "NA"]}
SENTENCES = {"tokens": [["EU", "rejects"], ["German"]], "tags": [["B-ORG", "O"], ["B-MISC"]]}
UD = """# sent_id = 1
# text = don't go
1-2\tdon't\t_\t_\t_\t_\t_\t_\t_\t_
1\tdo\tdo\tAUX\tVB\t_\t3\taux\t_\t_
2\tn't\tnot\tPART\tRB\t_\t3\tadvmod\t_\t_
2.1\tto\tto\tPART\tTO\t_\t_\t_\t_\t_
3\tgo\tgo\tVERB\tVB\t_\t0\troot\t_\tSpaceAfter=No
"""


def load(folder, name, content, **settings):
    data = content if isinstance(content, bytes) else content.encode()
    (folder / name).write_bytes(data)
    return load_file("train_file", str(folder / name), **settings)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", 'text,label\n"My card, where?",07\nfree,NA\n'),
        ("a.csv", '\ufefftext,label\r\n"My card, where?",07\r\n\r\nfree,NA\r\n,\r\n'),
        ("a.csv", 'text,label\r"My card, where?",07\rfree,NA'),
        ("a.csv", "text;label\nMy card, where?;07\nfree;NA\n"),
        ("a.csv", " text | label\nMy card, where?|07\nfree|NA\n"),
        ("a.csv", "text\tlabel\nMy card, where?\t07\nfree\tNA\n"),
        ("a.TSV", '"text"\t"label"\n"My card, where?"\t"07"\n"free"\t"NA"\n'),
        ("a.csv.gz", gzip.compress(b'text,label\n"My card, where?",07\nfree,NA\n', mtime=0)),
        ("a.json", json.dumps(TEXTS)),
        ("a.json", pd.DataFrame(TEXTS).to_json()),
        ("a.json", pd.DataFrame(TEXTS).to_json(orient="records", indent=1)),
        ("a.json", pd.DataFrame(TEXTS).to_json(orient="records", lines=True)),
        ("a.json", json.dumps({"version": 1, "data": pd.DataFrame(TEXTS).to_dict("records")})),
        ("a.jsonl", pd.DataFrame(TEXTS).to_json(orient="records", lines=True) + "\r\n"),
    ],
)
def test_a_table_is_the_same_however_it_is_written(tmp_path, name, content):
    assert load(tmp_path, name, content)[:] == TEXTS


def test_parquet_keeps_the_names_of_classes_and_reads_categories(tmp_path):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["b", "a"])})
    Dataset.from_dict({"text": ["x"], "label": [1]}, features=features).to_parquet(tmp_path / "a.parquet")
    assert load_file("train_file", str(tmp_path / "a.parquet")).features == features
    pd.DataFrame({"label": pd.Categorical(["x", "y", "x"])}).to_parquet(tmp_path / "b.parquet")
    assert load_file("train_file", str(tmp_path / "b.parquet"))["label"][:] == ["x", "y", "x"]


def test_a_line_of_json_lines_is_a_row_even_if_it_holds_lists_alone(tmp_path):
    rows = load(tmp_path, "a.jsonl", '{"tokens": ["a", "b"], "tags": ["X", "Y"]}')
    assert rows.to_list() == [{"tokens": ["a", "b"], "tags": ["X", "Y"]}]


def test_what_a_row_of_objects_lacks_and_an_empty_cell_are_none(tmp_path):
    assert load(tmp_path, "a.jsonl", '{"a": 1}\n{"b": 2}').to_list() == [{"a": 1, "b": None}, {"a": None, "b": 2}]
    assert load(tmp_path, "a.csv", "a,b\n1, \n,2\n").to_list() == [{"a": "1", "b": None}, {"a": None, "b": "2"}]


def test_a_column_without_a_name_is_numbered(tmp_path):
    assert load(tmp_path, "a.csv", ",text\n0,a\n").to_list() == [{"column_1": "0", "text": "a"}]  # pandas' index


@pytest.mark.parametrize(
    ("text", "cells"),
    [
        ('a\tb\n"Hello," he said.\t1\n', [['"Hello," he said.', "1"]]),
        ('a\tb\n"So\t0\nBye"\t1\n', [['"So', "0"], ['Bye"', "1"]]),  # not one text of two lines
        ('a\tb\n"He ""said"" so"\t1\n', [['He "said" so', "1"]]),
        ('a\tb\n"two\nlines"\t1\n', [["two\nlines", "1"]]),
    ],
)
def test_quotes_in_a_table_with_tabs_mean_what_fits(tmp_path, text, cells):
    assert [list(row.values()) for row in load(tmp_path, "a.tsv", text)] == cells


def test_a_file_of_texts_has_one_a_line(tmp_path):
    assert load(tmp_path, "a.txt", "one, two\r\n\r\nthree", types={".txt": "text"})["text"][:] == ["one, two", "three"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        *[(f"a{ending}", "", "the file is empty; expected rows") for ending in FILE_TYPES],
        ("a.csv", " \n\r\n", "the file is empty; expected rows"),
        ("a.csv", "text,label\n", "there are no rows, only a header"),
        ("a.json", "[]", "there are no rows"),
        ("a.csv", "text\na\nh\xe9\n".encode("latin-1"), r"line 3 is not UTF-8 \(byte 0xe9\); save the file as UTF-8"),
        ("a.conll", "h\xe9 O\n".encode("latin-1"), "line 1 is not UTF-8"),
        ("a.csv", "text\na\n".encode("utf-16"), "the file is UTF-16; save it as UTF-8"),
        ("a.csv", b"PK\x03\x04\xff", "the file is a zip archive, as those of Excel are"),
        ("a.csv", "text\na\n\0\n", "line 3 holds a zero byte; expected text"),
        ("a.csv.gz", gzip.compress(b"text\na\n", mtime=0)[:-9], "the file is damaged: it begins as gzip"),
        ("a.csv", "text,text,label\na,b,c\n", r"the header has more than one column \['text'\]; rename"),
        (
            "a.csv",
            "text,label\na,b\nHi, you,c\n",
            "line 3: expected 2 cells separated by ',', as in the header, found 3",
        ),
        ("a.csv", 'text,label\n"two\nlines",a\nb\n', "line 4: expected 2 cells separated by ',', .*, found 1"),
        ("a.csv", 'text,label\na,b\n"c,d\ne,f\n', "line 3: a quoted cell has no end, or is not followed by ','"),
        ("a.json", '{"a": 1,\n"b"', "line 2 is not JSON"),
        ("a.jsonl", '{"a": 1}\n\n{"a": \n', "line 3 is not JSON .*; expected an object a line"),
        ("a.jsonl", '{"a": 1}\n[1]\n', "line 2: expected an object with the names of the columns, found"),
        ("a.json", '[{"a": 1}, 2]', "row 2: expected an object with the names of the columns, found 2"),
        ("a.json", "5", "expected a list of objects, an object of lists or an object a line, found 5"),
        ("a.json", '{"a": [1, 2], "b": [1]}', "the columns have different numbers of rows: {'a': 2, 'b': 1}"),
        ("a.jsonl", '{"a": "x"}\n{"a": 1}\n', "row 2: column 'a' holds 1, and in row 1 'x'; give all the same type"),
        ("a.jsonl", '{"a": ["x"]}\n{"a": [1]}\n', "the rows do not make a table"),
        ("a.parquet", "text,label\n", "the file is not Parquet"),
        ("a.xlsx", "", "expected a file that ends in one of .csv, .tsv"),
        ("a.gz", "", "expected a file that ends in one of .csv, .tsv"),
    ],
)
def test_a_file_that_is_wrong_is_named_with_the_line_or_row(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=rf"^--train_file \S*{name}: {message}"):
        load(tmp_path, name, content)


def test_a_folder_is_not_a_file(tmp_path):
    (tmp_path / "a.csv").mkdir()
    for folder in (tmp_path, tmp_path / "a.csv"):
        with pytest.raises(ValueError, match=rf"--test_file {folder}: expected a file, found a folder"):
            load_file("test_file", str(folder))


@pytest.mark.parametrize(
    "text",
    [
        "EU\tB-ORG\nrejects\tO\n\nGerman\tB-MISC\n",
        "EU B-ORG\nrejects O\n\nGerman B-MISC\n",
        "EU   B-ORG\nrejects O  \n\n\n \nGerman B-MISC",
        "-DOCSTART- -X- -X- O\n\nEU NNP B-NP B-ORG\nrejects VBZ B-VP O\n-DOCSTART- -X- O O\nGerman JJ B-NP B-MISC\n",
        "EU\tNNP B-NP B-ORG\nrejects VBZ\tB-VP O\n\nGerman JJ B-NP B-MISC\n",
        "\ufeffEU\tB-ORG\t\r\nrejects\tO\t\r\n\r\nGerman\tB-MISC\t\r\n",
        "# id 5b\tdomain=en\nEU _ _ B-ORG\nrejects _ _ O\n\n# id 6c domain=en\nGerman _ _ B-MISC\n",  # MultiCoNER
        "# http://x [2006]\n1\tEU\tB-ORG\n2\trejects\tO\n\n# y\n1\tGerman\tB-MISC\n",  # GermEval
    ],
)
def test_columns_are_the_same_however_they_are_separated(tmp_path, text):
    rows = load(tmp_path, "a.conll", text)
    assert {name: rows[name][:] for name in ("tokens", "tags")} == SENTENCES
    assert read_columns(tmp_path / "a.conll") == [[("EU", "B-ORG"), ("rejects", "O")], [("German", "B-MISC")]]


def test_words_are_read_as_they_stand():
    columns = read_conll("\n\na b\tNN\tNOUN\nc\u2028d\tNN\tX\n\n \n\ne\xa0f\tNN\tX")
    assert columns["tokens"] == [["a b", "c\u2028d"], ["e\xa0f"]]
    assert columns["tags"] == [["NOUN", "X"], ["X"]]


def test_a_word_that_begins_with_a_hash_is_no_comment():
    columns = read_conll("#fb HT\n# O\n#= HT\nand O\n# text = and so on\n#tag = 1\nso O\n")
    assert columns["tokens"] == [["#fb", "#", "#=", "and", "so"]]


def test_the_tag_of_conllu_is_the_part_of_speech_and_every_column_has_its_name(tmp_path, capsys):
    rows = load(tmp_path, "a.conllu", UD)
    assert rows["tokens"][:] == [["do", "n't", "go"]]
    assert rows["tags"][:] == rows["upos"][:] == [["AUX", "PART", "VERB"]]
    assert rows["xpos"][:] == [["VB", "RB", "VB"]]
    assert "a.conllu: the tags are column upos; --label_column chooses another of id, form" in capsys.readouterr().out


def test_more_than_two_columns_are_known_by_their_numbers(tmp_path, capsys):
    assert load(tmp_path, "a.conll", "EU NNP B-ORG\n")["2"][:] == [["NNP"]]
    assert "the tags are column 3; --label_column chooses another of 1, 2, 3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Ada\tB-PER\nlives\tO\n\nTurin\n", "line 4 is 'Turin': expected 2 columns, as in most lines, found 1"),
        ("Ada B-PER\nlives O\n\nin Turin O\n", "line 4 is 'in Turin O': expected 2 columns, as in most lines, found 3"),
        ("Ada\tB-PER\nNew York\t\nlives\tO\n", "line 2 is .*: the tag is missing"),
        ("Ada\tB-PER\n\tO\nlives\tO\n", "line 2 is .*: the word is missing"),
        ("Ada B-PER\n#PLL\nlives O\n", "line 2 is '#PLL': expected 2 columns"),
        ("Ada\nlives\n", "the lines have one column; expected a word and its tag"),
        ("-DOCSTART-\n\n", "there are no words; expected a word and its tag"),
        ("#begin document (a); part 000\na 0 0 The DT\n", "this is CoNLL-2012, where the word is the fourth column"),
    ],
)
def test_a_line_that_has_not_the_columns_of_the_others_is_named(tmp_path, text, message):
    with pytest.raises(ValueError, match=rf"^--train_file \S*a.conll: {message}"):
        load(tmp_path, "a.conll", text)
    with pytest.raises(ValueError, match=rf"a.conll: {message}"):
        read_columns(tmp_path / "a.conll")


def test_files_are_read_by_the_name_that_the_scripts_had_for_it():
    assert script.load_file is load_file
