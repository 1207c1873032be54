"""HTTP: what is sent and answered, and what is refused."""

import asyncio
from functools import partial

import pytest
from fastapi.testclient import TestClient

from peft_mask.server import Limits, Service, create_app, load_batcher
from peft_mask.server.body import LimitedBody
from peft_mask.server.tasks import Classification
from tests.server.places import KINDS, NAMES, TEXTS, Place


@pytest.fixture
def service(places):
    return Service(load_batcher(places["classify"].settings()))


@pytest.fixture
def client(service):
    with TestClient(create_app(service, Classification)) as own:
        yield own
        own.portal.call(service.batcher.close)


def client_of(service, **fields):
    token = fields.pop("token", None)
    return TestClient(create_app(service, Classification, Limits(**fields), token), raise_server_exceptions=False)


class Broken(Service):
    """A backend of which every call ends alike."""

    def __init__(self, error=None):
        self.error = error

    async def answers(self, questions, options):
        if self.error is None:
            await asyncio.sleep(30)
        raise self.error

    async def check(self):
        await self.answers((), {})

    async def figures(self):
        return []


def test_one_question_has_one_answer(client, expected):
    response = client.post("/v1/classify", json={"model": "a", "input": TEXTS[0], "top_k": 2})
    assert response.status_code == 200
    (entry,) = response.json()["data"]
    assert (entry["index"], entry["model"]) == (0, "a")
    assert [each["label"] for each in entry["labels"]] == [
        each["label"] for each in expected["classify"]["a"][TEXTS[0]]
    ]


@pytest.mark.parametrize(
    ("models", "texts"),
    [("a", TEXTS), (list(NAMES), TEXTS[0]), (["a", "b", "a"], TEXTS[:3])],
    ids=["one adapter", "one text", "pairs"],
)
def test_what_stands_once_is_for_all_rows(client, expected, models, texts):
    response = client.post("/v1/classify", json={"model": models, "input": texts})
    entries = response.json()["data"]
    count = max(len(each) for each in (models, texts) if isinstance(each, list))
    assert [entry["index"] for entry in entries] == [*range(count)]
    for place, entry in enumerate(entries):
        name = models if isinstance(models, str) else models[place]
        text = texts if isinstance(texts, str) else texts[place]
        assert entry["model"] == name
        assert entry["labels"][0]["label"] == expected["classify"][name][text][0]["label"]


def test_a_row_that_is_refused_stands_beside_the_answers_of_others(client):
    response = client.post("/v1/classify", json={"model": ["a", "nobody"], "input": TEXTS[0]})
    assert response.status_code == 200
    good, bad = response.json()["data"]
    assert "labels" in good
    assert bad["error"] == {"message": bad["error"]["message"], "type": "UnknownAdapterError", "code": 404}
    assert bad["error"]["message"].startswith("there is no adapter 'nobody'")


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"model": "nobody", "input": "w5"}, 404, "there is no adapter 'nobody'"),
        ({"model": "../base", "input": "w5"}, 404, "there is no adapter '../base'"),
        ({"model": "a", "input": ""}, 422, "an input is empty"),
        ({"model": "a", "input": "w5 " * 65}, 422, "a text of 65 tokens is too long"),
        ({"model": "a", "input": 5}, 422, "Input should be a valid string"),
        ({"model": "a"}, 422, "input: Field required"),
        ({"model": "a", "input": "w5", "temperature": 1}, 422, "temperature: Extra inputs are not permitted"),
        ({"model": "a", "input": "w5", "top_k": 0}, 422, "top_k must be a whole number"),
        ({"model": [], "input": "w5"}, 422, "expected at least one model"),
        ({"model": ["a", "b"], "input": ["w5", "w6", "w7"]}, 422, "got 2 models for 3"),
        ({"model": "a", "input": ["w5"] * 9}, 422, "a request of 9 rows is too large: expected at most 8"),
        ({"model": "__base__", "input": "w5"}, 422, "the base has no head"),
    ],
)
def test_a_question_without_meaning_is_refused_in_words(service, body, status, message):
    with client_of(service, questions=8) as client:
        response = client.post("/v1/classify", json=body)
    assert response.status_code == status
    assert message in response.json()["error"]["message"]
    assert response.json()["error"]["code"] == status


def test_what_is_no_json_is_refused(client):
    response = client.post("/v1/classify", content=b"{", headers={"content-type": "application/json"})
    assert response.status_code == 422
    assert response.json()["error"]["message"] == "body: JSON decode error."


def test_an_error_does_not_tell_where_adapters_are(tmp_path):
    place = Place(tmp_path, KINDS["classify"], ("a",))
    (place.adapters / "empty").mkdir()
    service = Service(load_batcher(place.settings()))
    with client_of(service) as client:
        for name, message in (
            ("nobody", "has no folder of that name"),
            ("empty", "adapter_config.json' does not exist"),
        ):
            error = client.post("/v1/classify", json={"model": name, "input": "w5"}).json()["error"]
            assert message in error["message"]
            assert str(tmp_path) not in error["message"]


def test_a_request_that_is_too_large_is_refused(service):
    with client_of(service, body=1000) as client:
        response = client.post("/v1/classify", content=b'{"model": "a", "input": "' + b"w" * 2000 + b'"}')
    assert response.status_code == 413
    assert "expected at most 1,000 bytes" in response.json()["error"]["message"]


@pytest.mark.parametrize(("chunks", "status"), [(9, 200), (11, 413)])
def test_a_request_in_pieces_is_put_together_or_refused_while_it_comes(chunks, status):
    received, sent = iter(range(chunks)), []

    async def receive():
        number = next(received)
        return {"type": "http.request", "body": b"x" * 100, "more_body": number < chunks - 1}

    async def send(message):
        sent.append(message)

    async def app(scope, receive, send):
        message = await receive()
        assert message == {"type": "http.request", "body": b"x" * 100 * chunks, "more_body": False}
        await send({"type": "http.response.start", "status": 200, "headers": []})

    asyncio.run(LimitedBody(app, 1000)({"type": "http", "headers": []}, receive, send))
    assert sent[0]["status"] == status


def test_a_token_is_asked_for_if_there_is_one(service):
    with client_of(service, token="secret") as client:
        for path in ("/v1/models", "/metrics"):
            assert client.get(path).status_code == 401
            assert client.get(path, headers={"Authorization": "Bearer wrong"}).status_code == 401
            assert client.get(path, headers={"Authorization": "secret"}).status_code == 401
            assert client.get(path, headers={"Authorization": "Bearer secret"}).status_code == 200
            assert client.get(path, headers={"Authorization": "bearer secret"}).status_code == 200
        refused = client.post("/v1/classify", json={"model": "a", "input": "w5"})
        assert refused.status_code == 401
        assert "Authorization: Bearer" in refused.json()["error"]["message"]
        assert client.post("/v1/models/a/refresh").status_code == 401
        assert client.get("/").status_code == 200
        client.portal.call(service.batcher.close)


def test_the_models_are_the_names_of_the_source(client):
    answer = client.get("/v1/models").json()
    assert [each["id"] for each in answer["data"]] == [*NAMES]
    assert (answer["task"], answer["path"]) == ("classify", "/v1/classify")


def test_a_new_version_is_read_by_refresh(tmp_path):
    place = Place(tmp_path, KINDS["classify"], ("a",))
    service = Service(load_batcher(place.settings()))
    with client_of(service) as client:
        ask = partial(client.post, "/v1/classify", json={"model": "a", "input": TEXTS[0]})
        before = ask().json()
        assert client.post("/v1/models/a/refresh").json() == {"model": "a", "changed": False}
        place.save("a", 0, target_sparsity=0.5)
        assert ask().json() == before
        assert client.post("/v1/models/a/refresh").json() == {"model": "a", "changed": True}
        after = ask().json()
        assert after != before
        (place.adapters / "a" / "adapter_model.safetensors").write_bytes(b"damaged")
        refused = client.post("/v1/models/a/refresh")
        assert refused.status_code == 422
        assert "the adapter 'a' is refused" in refused.json()["error"]["message"]
        assert ask().json() == after
        client.portal.call(service.batcher.close)


def test_the_figures_count_what_was_asked(client):
    for _ in range(2):
        client.post("/v1/classify", json={"model": ["a", "b"], "input": "w5"})
    client.get("/v1/some/path/that/nobody/knows")
    text = client.get("/metrics").text
    assert 'peft_mask_requests_total{path="/v1/classify",status="200"} 2.0' in text
    assert 'peft_mask_requests_total{path="other",status="404"} 1.0' in text
    assert 'peft_mask_rows_total{replica="0"} 4.0' in text
    assert 'peft_mask_cache_loads_total{replica="0"} 2.0' in text
    assert text.count("# TYPE peft_mask_rows_total counter") == 1


def test_health_computes_a_row(client, service, monkeypatch):
    assert client.get("/health").json() == {"status": "ok"}
    assert service.batcher.statistics.rows == 1
    monkeypatch.setattr(Classification, "answers", lambda *args: 1 / 0)
    failing = client.get("/health")
    assert failing.status_code == 503
    assert failing.json()["status"] == "failing"


def test_openapi_names_the_task_and_its_options(client):
    schema = client.get("/openapi.json").json()
    assert "/v1/classify" in schema["paths"]
    assert set(schema["components"]["schemas"]["ClassificationRequest"]["properties"]) == {
        "model",
        "input",
        "top_k",
        "user",
    }


def test_a_request_that_takes_too_long_is_given_up():
    with client_of(Broken(), seconds=0.05) as client:
        response = client.post("/v1/classify", json={"model": "a", "input": "w5"})
        assert response.status_code == 504
        assert "within 0.05 seconds" in response.json()["error"]["message"]
        assert client.get("/health").status_code == 503


def test_an_error_of_the_server_itself_is_told_by_its_kind_alone():
    with client_of(Broken(KeyError("/secret/path"))) as client:
        response = client.post("/v1/classify", json={"model": "a", "input": "w5"})
        text = client.get("/metrics").text
    assert response.status_code == 500
    assert response.json()["error"]["message"] == "the server failed at this row (KeyError)."
    assert 'peft_mask_requests_total{path="/v1/classify",status="500"} 1.0' in text
