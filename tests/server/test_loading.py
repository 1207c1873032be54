"""From two folders and some settings to a server, and what is said where that cannot be."""

import asyncio
import json
import shutil
import subprocess
import sys

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification

from peft_mask import AdapterRefusedError, MaskConfig
from peft_mask.server import Embeddings, ServerSettings, load_batcher
from peft_mask.server.settings import TOKEN, settings_of, token
from tests.server.places import KINDS, TEXTS, Place
from tests.tiny_models import tiny_model, tiny_tokenizer


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path, KINDS["classify"], ("a", "b"))


def asked(batcher, *question):
    async def work():
        try:
            return await batcher.ask(*question)
        finally:
            await batcher.close()

    return asyncio.run(work())


def test_the_head_is_as_wide_as_the_widest_there_is(place):
    assert load_batcher(place.settings()).cache.model.get_base_model().config.num_labels == 5


def test_a_base_with_a_head_of_its_own_is_served_all_the_same(place, tmp_path):
    base = AutoModelForSequenceClassification.from_pretrained(place.base, num_labels=9)
    base.save_pretrained(tmp_path / "with head")
    shutil.copytree(
        place.base,
        tmp_path / "with head",
        dirs_exist_ok=True,
        ignore=lambda _, names: ["config.json", "model.safetensors"],
    )
    batcher = load_batcher(place.settings(base=str(tmp_path / "with head")))
    assert asked(batcher, "b", TEXTS[0])[0]["label"].startswith("label 1.")


def test_an_adapter_with_more_labels_than_was_said_is_refused_in_words(place):
    batcher = load_batcher(place.settings(num_labels=2))
    with pytest.raises(AdapterRefusedError, match="its head has 5 labels, this model's 2"):
        asked(batcher, "b", TEXTS[0])


def test_labels_without_names_have_numbers(place):
    (place.adapters / "a" / "labels.json").unlink()
    assert asked(load_batcher(place.settings()), "a", TEXTS[0])[0]["label"] in ("LABEL_0", "LABEL_1")


def test_the_model_masks_what_the_adapter_with_most_masks_does(place):
    place.save("a", 0, target_modules=["query"])
    batcher = load_batcher(place.settings())
    assert asked(batcher, "b", TEXTS[0])
    assert asked(load_batcher(place.settings()), "a", TEXTS[0])


def test_a_damaged_adapter_does_not_keep_the_server_from_starting(place):
    (place.adapters / "a" / "adapter_model.safetensors").write_bytes(b"damaged")
    assert asked(load_batcher(place.settings()), "b", TEXTS[0])
    with pytest.raises(AdapterRefusedError, match="the adapter 'a' is refused"):
        asked(load_batcher(place.settings()), "a", TEXTS[0])


def test_a_folder_without_masks_is_refused_with_the_reason_of_each(place, tmp_path):
    with pytest.raises(ValueError, match=r"there is no folder '.*nowhere'"):
        load_batcher(place.settings(adapters=str(tmp_path / "nowhere")))
    other = tmp_path / "others"
    get_peft_model(place.load(2), LoraConfig(task_type="SEQ_CLS")).save_pretrained(other / "lora")
    with pytest.raises(ValueError, match=r"holds no mask that can be read\. lora: it is of type"):
        load_batcher(place.settings(adapters=str(other)))


def test_a_base_that_is_not_there_is_named(place, tmp_path):
    with pytest.raises(ValueError, match=r"the base '.*nowhere' cannot be loaded"):
        load_batcher(place.settings(base=str(tmp_path / "nowhere")))


def test_adapters_of_several_tasks_need_a_word_which(place):
    said = json.loads((place.adapters / "a" / "adapter_config.json").read_text())
    (place.adapters / "a" / "adapter_config.json").write_text(json.dumps(said | {"task_type": "TOKEN_CLS"}))
    with pytest.raises(ValueError, match=r"are for \['SEQ_CLS', 'TOKEN_CLS'\]: say which task to serve"):
        load_batcher(place.settings())
    batcher = load_batcher(place.settings(task="classify"))
    assert asked(batcher, "b", TEXTS[0])
    with pytest.raises(AdapterRefusedError, match="it is for the task TOKEN_CLS, this model for SEQ_CLS"):
        asked(load_batcher(place.settings(task="classify")), "a", TEXTS[0])
    with pytest.raises(ValueError, match="is for the task CAUSAL_LM"):
        load_batcher(place.settings(task="generate"))


@pytest.mark.parametrize(("family", "longest"), [("bert", 64), ("roberta", 62)])
def test_texts_are_as_long_as_the_base_has_places_for(tmp_path, family, longest):
    model = tiny_model(family, "seq_cls")
    model.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")  # it says nothing of lengths
    get_peft_model(model, MaskConfig(task_type="SEQ_CLS")).save_pretrained(tmp_path / "adapters" / "a")
    batcher = load_batcher(ServerSettings(str(tmp_path / "base"), str(tmp_path / "adapters")))
    assert batcher.task.max_length == longest
    assert asked(batcher, "a", "w5 " * longest)


def test_a_decoder_without_a_pad_token_classifies_rows_of_several_lengths(tmp_path):
    model = tiny_model("llama", "seq_cls")
    model.config.pad_token_id = None
    model.save_pretrained(tmp_path / "base")
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "base")
    get_peft_model(model, MaskConfig(task_type="SEQ_CLS")).save_pretrained(tmp_path / "adapters" / "a")
    batcher = load_batcher(ServerSettings(str(tmp_path / "base"), str(tmp_path / "adapters")))
    texts = ["w5 w6 w7", "w8 w9 w40 w41 w42"]

    async def work():
        alone = [await batcher.ask("a", text, top_k=3) for text in texts]
        together = await asyncio.gather(*(batcher.ask("a", text, top_k=3) for text in texts))
        await batcher.close()
        return alone, together

    alone, together = asyncio.run(work())
    assert batcher.statistics.batches == 3
    assert batcher.statistics.failures == 0
    for one, two in zip(alone, together, strict=True):
        assert [each["label"] for each in one] == [each["label"] for each in two]
        assert [each["score"] for each in one] == pytest.approx([each["score"] for each in two], abs=1e-5)


def test_pooling_is_that_of_the_bases_folder(places):
    place = places["embed"]
    assert load_batcher(place.settings()).task.pooling == "mean"
    (place.base / "1_Pooling").mkdir()
    (place.base / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    try:
        batcher = load_batcher(place.settings())
        assert isinstance(batcher.task, Embeddings)
        assert batcher.task.pooling == "cls"
        assert load_batcher(place.settings(pooling="last")).task.pooling == "last"
    finally:
        shutil.rmtree(place.base / "1_Pooling")


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"base": "b"}, "the setting 'adapters' is missing"),
        ({"base": "b", "adapters": "a", "slotz": 3}, "there is no setting 'slotz': expected some of"),
        ({"base": "b", "adapters": "a", "slots": "many"}, "slots must be a int, got 'many'"),
        ({"base": "b", "adapters": "a", "slots": 0}, "slots must be at least 1, got 0"),
        ({"base": "b", "adapters": "a", "task": "translate"}, "task must be one of .*, got 'translate'"),
        ({"base": "b", "adapters": "a", "timeout": "0"}, "timeout must be above 0 seconds"),
        ({"base": "b", "adapters": "a", "max_waiting": 10}, "max_questions must be at most max_waiting, which is 10"),
        ({"base": "b", "adapters": "a", "threads": -1}, "threads must be at least 0"),
        ({"base": "b", "adapters": "a", "affinity": "maybe"}, "affinity must be true or false, got 'maybe'"),
    ],
)
def test_a_setting_without_meaning_is_refused(said, message):
    with pytest.raises(ValueError, match=message):
        settings_of(said)


def test_settings_may_be_strings_as_on_rays_command_line():
    said = {"base": "b", "adapters": "a", "slots": "8", "timeout": "2.5", "affinity": "true", "task": "tag"}
    settings = settings_of(said)
    assert (settings.slots, settings.timeout, settings.affinity, settings.task) == (8, 2.5, True, "tag")


def test_an_empty_token_is_refused(monkeypatch):
    monkeypatch.delenv(TOKEN, raising=False)
    assert token() is None
    monkeypatch.setenv(TOKEN, "secret")
    assert token() == "secret"
    monkeypatch.setenv(TOKEN, "")
    with pytest.raises(ValueError, match="PEFT_MASK_SERVER_TOKEN is empty"):
        token()


@pytest.mark.slow
def test_the_command_says_in_one_line_what_is_wrong(tmp_path):
    command = [sys.executable, "-m", "peft_mask.server", "--base", "b", "--adapters", str(tmp_path / "nowhere")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert (
        done.stderr.strip().splitlines()[-1]
        == f"error: there is no folder '{tmp_path / 'nowhere'}' to take adapters from."
    )
