"""The endpoint's answers, with an engine that only writes down. `test_server.py` asks a real one."""

import asyncio
import json

import pytest

from peft_mask.vllm.endpoint import FOLDER, MaskEndpoint
from tests.vllm.pretend import pretend_vllm
from tests.vllm.test_switching_order import AsyncSteps


@pytest.fixture
def root(tmp_path, monkeypatch):
    pretend_vllm(monkeypatch)
    for name in ("a", "b"):
        (tmp_path / "adapters" / name).mkdir(parents=True)
        (tmp_path / "adapters" / name / "adapter_config.json").write_text("{}")
    (tmp_path / "adapters" / "notes").mkdir()
    monkeypatch.setenv(FOLDER, str(tmp_path / "adapters"))
    return tmp_path / "adapters"


def plugin(engine):
    made = MaskEndpoint()
    asyncio.run(made.init_state(engine, None, None))
    return made


def post(engine, body):
    made = plugin(engine)
    return asyncio.run(made.respond(made.switch, body if isinstance(body, bytes) else json.dumps(body).encode()))


def test_answers_name_adapters_by_their_names(root):
    in_force = {"adapter": str(root / "a"), "digest": "d", "zeros": 5}
    engine = AsyncSteps(mask_apply=[in_force])
    answer = {"adapter": "a", "digest": "d", "zeros": 5, "adapters": ["a", "b"]}
    assert post(engine, {"adapter": "a"}) == (answer, 200)
    made = plugin(engine)
    assert asyncio.run(made.respond(made.in_force, b"")) == (answer, 200)


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        ({"adapter": "c"}, 404, "has no folder of that name"),
        ({"adapter": "../adapters/a"}, 404, "names are of up to 128"),
        ({"adapter": ""}, 404, "names are of up to 128"),
        ({"adapter": 1}, 400, '{"adapter": "name"}'),
        ({}, 400, '{"adapter": "name"}'),
        ({"adapter": "a", "b": 1}, 400, '{"adapter": "name"}'),
        (["a"], 400, '{"adapter": "name"}'),
        (b"\xff", 400, '{"adapter": "name"}'),
        (b"[" * 4000, 400, '{"adapter": "name"}'),
        (b" " * 4097, 400, "at most 4096 bytes"),
    ],
)
def test_what_is_no_request_reaches_no_engine(root, body, status, reason):
    engine = AsyncSteps()
    answer, answered = post(engine, body)
    assert answered == status
    assert reason in answer["error"]
    assert str(root) not in answer["error"]
    assert engine.steps == []


@pytest.mark.parametrize(
    ("answers", "status", "reason"),
    [
        ({"mask_prepare": [{"refused": "its checksum is wrong"}]}, 422, "the adapter 'a' is refused: its checksum"),
        ({"mask_apply": [{"broken": "it stopped halfway."}]}, 503, "restart vLLM"),
        (
            {"mask_prepare": NotImplementedError("Method 'mask_prepare' is not implemented.")},
            501,
            "--worker-extension-cls",
        ),
    ],
)
def test_errors_have_a_status_and_words_and_no_path(root, answers, status, reason):
    answer, answered = post(AsyncSteps(**answers), {"adapter": "a"})
    assert answered == status
    assert reason in answer["error"]
    assert str(root) not in answer["error"]


def test_a_server_without_an_engine_says_so(root):
    assert post(None, {"adapter": "a"}) == ({"error": "this server has no engine."}, 501)


def test_the_plugin_is_what_vllm_asks_for(root):
    made = MaskEndpoint()
    assert (made.name, made.required_tasks) == ("peft_mask", None)


def test_no_folder_or_another_vllm_is_refused_at_the_start(root, monkeypatch):
    monkeypatch.setenv(FOLDER, str(root / "nowhere"))
    with pytest.raises(ValueError, match="there is no folder"):
        MaskEndpoint()
    monkeypatch.delenv(FOLDER)
    with pytest.raises(ValueError, match=f"set {FOLDER} to the folder"):
        MaskEndpoint()
    pretend_vllm(monkeypatch, version="0.31.4")
    with pytest.raises(ImportError, match=r"made for vLLM 0.32 .* this is 0.31.4"):
        MaskEndpoint()
