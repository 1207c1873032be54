"""The example of embeddings, run on a tiny random encoder: what it learns, saves and refuses."""

import json

import pytest

pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
pytest.importorskip("sklearn", reason="scikit-learn is not installed")

import numpy as np
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

from examples import embeddings
from peft_mask import Masks
from tests.tiny_models import tiny_model, tiny_tokenizer

# transformers' own module asks its old names
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def text(number):
    return " ".join(f"w{4 + (7 * number + 3 * place) % 60}" for place in range(6))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    tiny_model("bert", "base").save_pretrained(folder / "bert")
    tiny_tokenizer().save_pretrained(folder / "bert")
    SentenceTransformer(modules=[Transformer(str(folder / "bert")), Pooling(32)]).save_pretrained(str(folder / "base"))
    return str(folder / "base")


def written(path, labels, rows, first=0):
    lines = [f"{text(first + number)},label{number % labels}" for number in range(rows)]
    path.write_text("\n".join(["text,label", *lines]), "utf-8")
    return str(path)


def run(encoder, folder, *arguments, train=(4, 16), test=(4, 8)):
    folder.mkdir(exist_ok=True)
    files = ["--train_file", written(folder / "train.csv", *train)]
    files += ["--test_file", written(folder / "test.csv", *test, first=16)]
    common = ["--model_name_or_path", encoder, "--output_dir", str(folder / "out"), "--max_steps", "2"]
    common += ["--per_device_train_batch_size", "4", "--use_cpu", "true", "--disable_tqdm", "true"]
    return embeddings.main([*files, *common, *arguments])


@pytest.mark.parametrize("method", ["mask", "lora", "full"])
def test_every_method_learns_and_what_it_saves_embeds(encoder, tmp_path, capsys, method):
    results = run(encoder, tmp_path, "--method", method)
    assert json.loads((tmp_path / "out" / "results.json").read_text("utf-8")) == results
    assert set(results["before"]) == set(results["after"]) == {"nearest", "logistic"}
    printed = capsys.readouterr().out
    assert "16 texts of 4 labels to learn from, 8 held out:" in printed
    assert f"{tmp_path / 'out'}: {results['saved_bytes']:,} bytes" in printed
    plain, learned = (
        SentenceTransformer(name, device="cpu").encode([text(0)]) for name in (encoder, str(tmp_path / "out"))
    )
    assert not np.array_equal(plain, learned)


def test_a_mask_is_all_that_is_saved_and_the_card_says_how_to_load_it(encoder, tmp_path):
    run(encoder, tmp_path, "--target_sparsity", "0.02")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(name.endswith("peft_mask_bits") for name in tensors)
    assert 0 < Masks.load(tmp_path / "out").sparsity <= 0.021
    assert "import peft_mask" in (tmp_path / "out" / "README.md").read_text("utf-8")


def test_few_texts_a_label_make_pairs_of_one_label(encoder, tmp_path, capsys):
    run(encoder, tmp_path, "--per_class", "2")
    assert "8 texts of 4 labels to learn from, 8 held out:" in capsys.readouterr().out
    texts = {label: [f"{label} {number}" for number in range(5)] for label in ("a", "b")}
    chosen = embeddings.few(texts, 3, seed=0)
    assert {label: len(own) for label, own in chosen.items()} == {"a": 3, "b": 3}


def test_a_batch_has_pairs_of_different_labels_in_the_order_in_which_they_were_drawn():
    texts = {label: [f"{label}{number}" for number in range(3)] for label in "abcd"}
    made = embeddings.pairs(texts, steps=5, batch=3, seed=0)
    assert len(made) == 15
    assert all(row["anchor"][0] == row["positive"][0] and row["anchor"] != row["positive"] for row in made)
    batches = list(embeddings.in_order(made, batch_size=3, drop_last=False, seed=0))
    assert batches == [[3 * step, 3 * step + 1, 3 * step + 2] for step in range(5)]
    assert [len({made[place]["anchor"][0] for place in batch}) for batch in batches] == [3] * 5
    assert made[:] == embeddings.pairs(texts, 5, 3, seed=0)[:] != embeddings.pairs(texts, 5, 3, seed=1)[:]


def test_the_share_of_labels_is_counted_on_held_out_texts():
    class Model:
        def encode(self, texts, normalize_embeddings):
            places = {"a": (1.0, 0.0), "b": (0.0, 1.0)}
            return np.array([places[text[0]] for text in texts])

    train = {"a": ["a1", "a2"], "b": ["b1", "b2"]}
    assert embeddings.score(Model(), train, {"a": ["a3"], "b": ["b3"]}) == {"nearest": 1.0, "logistic": 1.0}
    assert embeddings.score(Model(), train, {"a": ["a3", "b4"], "b": ["b3", "b5"]}) == {
        "nearest": 0.75,
        "logistic": 0.75,
    }


@pytest.mark.parametrize(
    ("arguments", "files", "message"),
    [
        (["--per_class", "1"], {}, r"--per_class 1: a pair takes two texts of a label; give 2 or more"),
        (["--per_class", "9"], {}, r"label 'label0' has 4 texts, and --per_class 9 are needed; add some, or leave it"),
        ([], {"train": (16, 16)}, r"label 'label0' has 1 texts, and two for a pair are needed"),
        ([], {"train": (1, 16)}, r"--train_file .*: all texts have one label; what is to lie apart needs two or more"),
        ([], {"test": (5, 10)}, r"--test_file .*: label 'label4' is not among those to learn from"),
        (["--label_column", "kind"], {}, r"there is no column \['kind'\]"),
        (["--method", "lora", "--target_bytes", "9000"], {}, r"--target_bytes says nothing to --method lora; leave it"),
        (["--max_steps", "-1"], {}, r"--max_steps -1: pairs are drawn for each step; give 1 or more"),
        (["--target_sparsity", "2"], {}, r"target_sparsity must be"),
    ],
)
def test_what_cannot_be_done_ends_with_one_sentence(encoder, tmp_path, arguments, files, message):
    with pytest.raises(SystemExit, match=rf"^error: (?s:.*){message}"):
        run(encoder, tmp_path, *arguments, **files)
    assert not (tmp_path / "out").exists()
