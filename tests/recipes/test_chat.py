"""Rows, chat templates and tokens that do not go together: each is refused with a message that says what to do."""

import json

import pytest
from transformers import AutoTokenizer

from peft_mask.recipes import sft
from peft_mask.recipes.chat import answers_of, check_markers, load_conversations
from tests.chat_models import CHATML, CHATS, PAIRS, chat, line, tiny_chat_model, write


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_chat_model(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A model without a template, and without the tokens of one."""
    return tiny_chat_model(tmp_path_factory.mktemp("plain"), template=None)


def refused(model, folder, message, rows=CHATS, *more):
    with pytest.raises(SystemExit, match=message):
        sft.main(line(model, folder, rows, *more))
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (
            chat("what is oak"),
            r"--train_file .*train.jsonl: row 21: there is no answer of the assistant, and so nothing",
        ),
        ([], r"row 21: there is no answer of the assistant"),
        (
            chat("a", "b", roles=("human", "gpt")),
            r"row 21: message 1 has the role 'human'; expected one of system, user",
        ),
        ([{"from": "human", "value": "a"}], r"row 21: message 1 has the role None; .*under the name 'role'"),
        (chat("a", " "), r"row 21: message 2, of the assistant, has no text in 'content'"),
        ([{"role": "user"}, *chat("", "b")[1:]], r"row 21: message 1, of the user, has no text in 'content'"),
        (
            [{**chat("a")[0], "name": "ann"}, *chat("", "b")[1:]],
            r"message 1 has \['name'\] beside .*, which would be lost",
        ),
        (
            chat("hello", "what is oak", "tree", roles=("assistant", "user", "assistant")),
            r"row 21: the assistant speaks first, and an answer needs .* before it: .*, or give --system\.",
        ),
    ],
)
def test_a_row_that_is_no_conversation_is_named(model, tmp_path, messages, message):
    refused(model, tmp_path, message, [*CHATS, {"messages": messages}])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"--train_file .*: the file is empty; expected rows"),
        (
            '{"text": "a"}',
            r"neither a column 'messages' nor both of 'prompt' and 'completion', the file has \['text'\]",
        ),
        ('{"prompt": "a"}', r"neither a column 'messages' nor both of .*; see --prompt_column and --completion_column"),
        ('{"prompt": "a", "completion": null}', r"row 1: message 2, of the assistant, has no text"),
        ('{"messages": ["a", "b"]}', r"row 1: message 1 is 'a'; expected an object with 'role' and 'content'"),
        (json.dumps(CHATS[0]), r"one row cannot be both learned and held out; give --test_file"),
    ],
)
def test_a_file_that_holds_no_conversations_is_refused(model, tmp_path, text, message):
    (tmp_path / "rows.jsonl").write_text(text)
    refused(model, tmp_path, message, str(tmp_path / "rows.jsonl"))


def test_the_test_file_is_checked_as_well(model, tmp_path):
    test = write(tmp_path / "test.jsonl", [{"messages": chat("a")}])
    refused(model, tmp_path, r"--test_file .*test.jsonl: row 1: there is no answer", CHATS, "--test_file", test)
    refused(model, tmp_path, r"--test_file .*gone.jsonl: there is no such file", CHATS, "--test_file", "gone.jsonl")


def test_a_model_without_a_chat_template_is_refused(plain, tmp_path):
    refused(plain, tmp_path, r"the tokenizer has no chat template: name one with --chat_template_path")


def test_a_template_whose_tokens_are_none_is_refused_and_they_are_named(plain, tmp_path):
    template = tmp_path / "chatml.jinja"
    template.write_text(CHATML)
    message = (
        r"'<\|im_end\|>' \(10\), '<\|im_start\|>' \(12\)\. .* --add_tokens '<\|im_end\|>' '<\|im_start\|>', or say --sp"
    )
    refused(plain, tmp_path, message, CHATS, "--chat_template_path", str(template))
    # the same, if the tokenizer brought it along
    tokenizer = AutoTokenizer.from_pretrained(plain)
    tokenizer.chat_template = CHATML
    with pytest.raises(ValueError, match=message):
        check_markers(tokenizer, [chat("a", "b")])


def test_a_template_may_be_split_if_the_user_says_so(plain, tmp_path):
    template = tmp_path / "zephyr.jinja"
    template.write_text(
        "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    more = ["--chat_template_path", str(template)]
    refused(plain, tmp_path, r"'<\|assistant\|>' \(13\), '<\|user\|>' \(8\)", CHATS, *more)
    trainer, _ = sft.make_trainer(*sft.parse(line(plain, tmp_path, CHATS, *more, "--split_markers")))
    assert trainer.processing_class.decode(trainer.train_dataset[0]["input_ids"]).startswith("<|user|>what is")


@pytest.mark.parametrize("text", ["[INST] x [/INST]", "<<SYS>> x <</SYS>>", "a < b and b > c", "x<|x"])
def test_what_is_text_in_a_template_is_not_taken_for_a_token(plain, text):
    tokenizer = AutoTokenizer.from_pretrained(plain)
    tokenizer.chat_template = "{{ messages[0]['content'] }} " + text
    check_markers(tokenizer, [chat("a", "b")])


def test_an_end_at_which_the_model_does_not_stop_is_refused(plain, tmp_path):
    template = tmp_path / "chatml.jinja"
    template.write_text(CHATML)
    more = ["--chat_template_path", str(template), "--add_tokens", "<|im_start|>", "<|im_end|>"]
    message = (
        r"row 1: the chat template ends an answer with 'et<\|im_end\|>', .* stops, \['</s>'\]: .* with --eos_token"
    )
    refused(plain, tmp_path, message, CHATS, *more)
    refused(
        plain, tmp_path, r"--eos_token <\|end\|> is no token; add it with --add", CHATS, *more, "--eos_token", "<|end|>"
    )


STRICT = {
    "no system here": "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}",
    "roles must alternate": "{% for message in messages %}{% if (message['role'] == 'user') != loop.index is odd %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}",
}


@pytest.mark.parametrize(
    ("reason", "messages"),
    [
        ("no system here", chat("be short", "what is oak", "tree", roles=("system", "user", "assistant"))),
        ("roles must alternate", chat("what is oak", "and elm", "tree", roles=("user", "user", "assistant"))),
    ],
)
def test_a_row_that_the_template_refuses_is_named(tmp_path, reason, messages):
    model = tiny_chat_model(tmp_path / "strict", template=STRICT[reason] + CHATML)
    rows = [*CHATS, {"messages": messages}]
    refused(model, tmp_path, rf"train.jsonl: row 21: the chat template refuses it: {reason}", rows)


def test_a_system_message_that_the_template_refuses_is_refused_with_the_first_row(tmp_path):
    model = tiny_chat_model(tmp_path / "strict", template=STRICT["no system here"] + CHATML)
    message = r"train.jsonl: row 1: the chat template refuses it: no system here"
    refused(model, tmp_path, message, CHATS, "--system", "be short")


ENDS = pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode is deprecated:FutureWarning")


@ENDS
def test_rows_of_which_no_answer_is_left_are_refused_and_counted(model, tmp_path, capsys):
    rows = [*PAIRS, {"prompt": "a" * 60, "completion": "pet"}, {"prompt": "b" * 70, "completion": "pet"}]
    message = (
        r"of 2 of 22 rows nothing of an answer is left within --max_length 60, the first is row 21, .* after 78 tokens"
    )
    refused(model, tmp_path, message, rows, "--max_length", "60")
    message = r"of 2 of 22 rows nothing of an answer is left"
    for more in ([], ["--truncation_mode", "keep_end"]):  # packing cuts off ends in any case
        refused(model, tmp_path, message, rows, "--max_length", "60", "--packing", "true", *more)
    sft.make_trainer(*sft.parse(line(model, tmp_path, rows[:-1], "--max_length", "80")))
    assert "train.jsonl: 1 answers are cut off at --max_length 80" in capsys.readouterr().out


@ENDS
def test_where_ends_are_kept_no_answer_is_lost_and_the_longest_are_counted(model, tmp_path, capsys):
    rows = [*PAIRS, {"prompt": "a" * 60, "completion": "pet"}, {"prompt": "b", "completion": "pet" * 30}]
    more = ["--truncation_mode", "keep_end", "--max_length", "60", "--test_file", write(tmp_path / "t.jsonl", PAIRS)]
    trainer, _ = sft.make_trainer(*sft.parse(line(model, tmp_path, rows, *more)))
    assert "train.jsonl: 1 answers are cut off at --max_length 60" in capsys.readouterr().out
    learned = [[label for label in labels if label != -100] for labels in trainer.train_dataset["labels"][:]]
    assert trainer.processing_class.batch_decode(learned[-2:]) == ["pet<|im_end|>", ("pet" * 30)[-59:] + "<|im_end|>"]


def test_folders_that_are_used_already_are_not_merged_into(model, tmp_path):
    for folder in (str(tmp_path / "out"), model):
        refused(model, tmp_path, r"--merge_to .*: this folder is used already", CHATS, "--merge_to", folder)


def test_what_is_not_there_is_named(model, tmp_path):
    refused(str(tmp_path / "gone"), tmp_path, r"--model_name_or_path .*gone: ")
    refused(
        model, tmp_path, r"--chat_template_path .*gone: this is neither", CHATS, "--chat_template_path", "gone/gone"
    )


def test_to_dequantize_takes_a_quantized_base_and_a_folder(model, tmp_path):
    message = r"--dequantize says how a quantized base is merged: give --merge_to, and --load_in_4bit"
    refused(model, tmp_path, message, CHATS, "--dequantize", "--merge_to", str(tmp_path / "merged"))
    refused(model, tmp_path, message, CHATS, "--dequantize")


def test_4_bits_without_bitsandbytes_are_refused(model, tmp_path, monkeypatch):
    missing = "transformers.quantizers.quantizer_bnb_4bit.is_bitsandbytes_available"
    monkeypatch.setattr(missing, lambda *versions: False)
    refused(model, tmp_path, r"error: .*bitsandbytes.*pip install", CHATS, "--load_in_4bit")


def test_what_trl_refuses_ends_in_its_words(model, tmp_path):
    refused(model, tmp_path, r"error: The chat template is not training-comp", CHATS, "--assistant_only_loss", "true")


def test_settings_that_do_not_go_together_end_in_one_line(model, tmp_path):
    message = r"error: At most one of fp16 and bf16 can be True, but not both$"
    refused(model, tmp_path, message, CHATS, "--bf16", "true", "--fp16", "true")


def test_a_budget_out_of_reach_is_refused(model, tmp_path):
    with pytest.raises(SystemExit, match=r"target_sparsity must be .* less than 1, got 2.0"):
        sft.main(line(model, tmp_path, CHATS, "--target_sparsity", "2"))


def test_every_answer_of_a_conversation_is_a_row_with_all_before_it():
    messages = chat("a", "b", "c", "d")
    assert answers_of(messages) == [
        {"prompt": messages[:1], "completion": messages[1:2]},
        {"prompt": messages[:3], "completion": messages[3:]},
    ]


def test_a_message_of_the_system_is_put_before_conversations_that_have_none(tmp_path):
    own = [{"role": "system", "content": "be long"}, *CHATS[0]["messages"]]
    file = write(tmp_path / "rows.jsonl", [*CHATS[:1], {"messages": own}])
    found = load_conversations("train_file", file, "prompt", "completion", "be short")
    assert [messages[0]["content"] for messages in found] == ["be short", "be long"]
    assert all(len(messages) == 3 for messages in found)


def test_a_model_in_parts_is_refused(model, tmp_path, monkeypatch):
    message = r"error: {}: each process holds a part of the model, .*: take DDP \("
    for switch in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_PARALLELISM_CONFIG"):
        with monkeypatch.context() as launched:
            launched.setenv(switch, "true")
            refused(model, tmp_path, message.format("FSDP" if "FSDP" in switch else "parallelism_config"))
    refused(model, tmp_path, message.format("FSDP"), CHATS, "--fsdp")
    monkeypatch.setattr("peft_mask.recipes.answers.is_deepspeed_zero3_enabled", lambda: True)
    refused(model, tmp_path, message.format("ZeRO-3"))


def test_the_assistant_may_speak_first_if_the_system_has_before(model, tmp_path):
    greeting = chat("hello", "what is oak", "tree", roles=("assistant", "user", "assistant"))
    more = ["--system", "be short", "--test_file", write(tmp_path / "test.jsonl", CHATS)]
    trainer, _ = sft.make_trainer(*sft.parse(line(model, tmp_path, [{"messages": greeting}], *more)))
    first = trainer.processing_class.decode(trainer.train_dataset[0]["input_ids"])
    assert first == "<|im_start|>system be short<|im_end|><|im_start|>assistant hello<|im_end|>"
    assert len(trainer.train_dataset) == 2


def test_messages_are_taken_where_a_file_has_both_kinds_of_columns(tmp_path):
    file = write(tmp_path / "rows.jsonl", [CHATS[0] | {"prompt": "a", "completion": "b"}])
    assert load_conversations("train_file", file, "prompt", "completion") == [CHATS[0]["messages"]]
