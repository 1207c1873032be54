"""The page at `/`, as a browser shows it."""

import json
import re
from pathlib import Path
from urllib.parse import urlencode

import pytest
from fastapi.responses import HTMLResponse

import peft_mask.server
from peft_mask.server.http import create_app
from peft_mask.server.loading import load_batcher
from peft_mask.server.service import Service
from peft_mask.server.settings import ServerSettings
from peft_mask.server.tasks import TASKS
from peft_mask.server.tasks.tagging import entities_of
from peft_mask.serving.errors import AdapterRefusedError
from tests.server.browser import CHROMIUM, shown
from tests.server.fake_backend import FakeBackend, serving
from tests.serving import fleet

PAGE = Path(peft_mask.server.__file__).with_name("page.html").read_text(encoding="utf-8")
DAMAGED = AdapterRefusedError("broken", "its checksum is wrong.")
HOSTILE = "<script>document.title = 'taken'</script><img src=x onerror=\"document.title = 'taken'\">"


def browses(test):
    """Mark a test that starts a browser, a second or two each time."""
    reason = "Chromium, which shows the page, is not installed: apt-get install chromium"
    return pytest.mark.slow(pytest.mark.skipif(CHROMIUM is None, reason=reason)(test))


def labels(**scores):
    return [{"label": label, "score": score} for label, score in scores.items()]


def asked(answers, task, link, **options):
    """What the page shows at a link, and what it asked the server."""
    backend = FakeBackend(answers)
    with serving(create_app(backend, TASKS[task], **options)) as address:
        return shown(f"{address}/?{urlencode(link)}"), backend.asked


def acted(answers, script, task="classify", **options):
    """What the page shows once a person, whom a script plays, has done something; and what it asked the server."""
    backend = FakeBackend(answers)
    app = create_app(backend, TASKS[task], **options)
    wait = (
        "const until = (is) => new Promise((done) => {"
        " const timer = setInterval(() => is() && (clearInterval(timer), done()), 10); });"
    )

    @app.get("/acted")
    async def page() -> HTMLResponse:
        return HTMLResponse(f"{PAGE}<script>{wait} (async () => {{ {script} }})();</script>")

    with serving(app) as address:
        return shown(f"{address}/acted"), backend.asked


def cards(page):
    """The answers by the name above each, in their order."""
    return {card.one("h2").text: card for card in page.all("article")}


def scores(card):
    """The label and the number of each line."""
    return [tuple(span.text for span in line.all("span")[:2]) for line in card.all("div", class_="score")]


# ---- what each task shows ----


@browses
def test_all_tasks_are_asked_in_one_request_and_their_best_labels_shown():
    answers = {
        "mood": labels(negative=0.625, neutral=0.25, positive=0.125),
        "topic": labels(sports=0.9, business=0.1),
        "urgency": labels(LABEL_0=-0.73125),
    }
    page, requests = asked(answers, "classify", {"text": "Where is my card?"})
    assert requests == [([(name, "Where is my card?") for name in answers], {"top_k": 3})]
    assert [*cards(page)] == ["mood", "topic", "urgency"]
    assert scores(cards(page)["mood"]) == [("negative", "62.5 %"), ("neutral", "25.0 %"), ("positive", "12.5 %")]
    assert [bar.attributes["style"] for bar in cards(page)["mood"].all("span", class_="bar")] == [
        f"--share: {share}%" for share in (62.5, 25, 12.5)
    ]
    assert scores(cards(page)["topic"]) == [("sports", "90.0 %"), ("business", "10.0 %")]
    assert scores(cards(page)["urgency"]) == [("LABEL_0", "−0.731")]  # of a regression, and so no share
    assert not cards(page)["urgency"].all(class_="bar")
    assert re.fullmatch(r"3 tasks answered in \d+ ms", page.one(id="answered").text)
    assert "3 tasks of one base model" in page.one(id="about").text
    assert page.one(id="chosen").text == "3 of 3 chosen"


@browses
def test_a_task_that_is_refused_says_why_beside_the_answers_of_the_others():
    page, _ = asked({"broken": DAMAGED, "mood": labels(good=0.75, bad=0.25)}, "classify", {"text": "Hello"})
    assert [*cards(page)] == ["mood", "broken"]  # what failed comes last
    assert (
        cards(page)["broken"].one("p", class_="wrong").text == "the adapter 'broken' is refused: its checksum is wrong."
    )
    assert scores(cards(page)["mood"])[0] == ("good", "75.0 %")
    assert page.one(id="answered").text.startswith("1 of 2 tasks answered in ")
    assert "hidden" in page.one(id="trouble").attributes


@browses
def test_texts_and_labels_are_shown_as_they_are_and_never_run():
    answers = {
        "tags": lambda text: {
            "words": [{"word": text[:8], "label": HOSTILE, "score": 0.5, "start": 0, "end": 8}],
            "entities": [{"text": HOSTILE, "label": HOSTILE, "score": 0.5, "start": 0, "end": 8}],
        },
        "broken": AdapterRefusedError("broken", HOSTILE),
    }
    page, _ = asked(answers, "tag", [("text", HOSTILE), ("model", "tags"), ("model", "broken")])
    assert page.one("title").text == "One text, every task: 2 tasks"
    assert not page.all("img")
    assert len(page.all("script")) == 1
    assert cards(page)["tags"].one("strong").text == HOSTILE
    assert cards(page)["tags"].one("mark").text == f"<script>{HOSTILE}"
    assert HOSTILE in cards(page)["broken"].text

    page, _ = asked({"mood": labels(**{HOSTILE: 0.9, "x": 0.1})}, "classify", {"text": HOSTILE})
    assert scores(cards(page)["mood"])[0] == (HOSTILE, "90.0 %")
    assert not page.all("img")
    assert len(page.all("script")) == 1


@browses
def test_words_have_the_color_of_their_label_also_behind_letters_of_two_units():
    text = "😀 Ada Lovelace left London. 𝒜!"
    places = {"Ada": "B-PER", "Lovelace": "I-PER", "left": "O", "London": "B-LOC"}
    found = [
        {"word": word, "label": label, "score": 0.9, "start": text.index(word), "end": text.index(word) + len(word)}
        for word, label in places.items()
    ]
    verbs = [each | {"label": "VERB" if each["word"] == "left" else "PROPN"} for each in found]
    page, _ = asked(
        {
            "entities": {"words": found, "entities": entities_of(text, found)},
            "verbs": {"words": verbs},
            "none": {"words": [each | {"label": "O"} for each in found], "entities": []},
        },
        "tag",
        {"text": text},
    )
    entities, words, none = cards(page).values()
    assert [mark.text for mark in entities.all("mark")] == ["Ada LovelacePER", "LondonLOC"]
    assert entities.one("p", class_="text").text == "😀 Ada LovelacePER left LondonLOC. 𝒜!"
    assert entities.one("ul", **{"aria-label": "Labels"}).text == "PER × 1LOC × 1"
    assert entities.one("ul", **{"aria-label": "Entities"}).text == "Ada Lovelace PER, 90.0 %London LOC, 90.0 %"

    assert words.one("p", class_="text").text == "😀 AdaPROPN LovelacePROPN leftVERB LondonPROPN. 𝒜!"
    colors = [mark.attributes["style"] for mark in words.all("mark")]
    assert colors[0] == colors[1] == colors[3] != colors[2]
    swatches = [item.attributes["style"] for item in words.one("ul").all("li")]
    assert swatches == [colors[0], colors[2]]
    assert words.one("ul").text == "PROPN × 3VERB × 1"

    assert none.one("p", class_="text").text == text
    assert not none.all("mark")
    assert "No word has a label here." in none.text


@browses
def test_two_texts_are_compared_by_each_task_the_most_similar_first():
    others = {"far": [-3.0, 4.0], "near": [2.0, 0.0], "__base__": [4.0, 3.0]}
    answers = {name: {"one": [1.0, 0.0], "other": vector}.get for name, vector in others.items()} | {"broken": DAMAGED}
    page, requests = asked(answers, "embed", [("text", "one"), ("text", "other")])
    names = ["far", "near", "broken", "__base__"]  # the server names the base last
    assert requests == [([(name, text) for name in names for text in ("one", "other")], {})]
    assert [*cards(page)] == ["near", "the base model alone", "far", "broken"]
    numbers = [card.one("span", class_="number").text for name, card in cards(page).items() if name != "broken"]
    assert numbers == ["1.00", "0.80", "−0.60"]
    assert cards(page)["far"].one("span", class_="bar").attributes["style"] == "--share: 0%"
    assert "checksum" in cards(page)["broken"].text
    assert page.one(id="answered").text.startswith("3 of 4 answered in ")
    assert "Second text" in page.one("form", id="question").text


@browses
def test_each_task_goes_on_with_the_text_for_as_many_tokens_as_are_asked_for():
    answers = {
        "poems": {"text": " is\n  <b>blue", "finish_reason": "stop", "prompt_tokens": 2, "completion_tokens": 1},
        "news": {"text": " fell", "finish_reason": "length", "prompt_tokens": 2, "completion_tokens": 7},
        "__base__": {"text": "", "finish_reason": "stop", "prompt_tokens": 2, "completion_tokens": 0},
    }
    page, requests = asked(answers, "generate", {"text": "The sky", "max_tokens": 7, "model": "news"})
    assert requests == [([("news", "The sky")], {"max_tokens": 7})]
    assert cards(page)["news"].one("p", class_="text").text == "The sky fell"
    assert cards(page)["news"].one("p", class_="quiet").text == "7 tokens, as many as asked for"

    page, requests = asked(answers, "generate", {"text": "The sky"})
    assert requests == [([(name, "The sky") for name in answers], {"max_tokens": 32})]
    assert cards(page)["poems"].one("ins").children == [" is\n  <b>blue"]
    assert cards(page)["poems"].one("p", class_="quiet").text == "1 token, then it ended"
    assert cards(page)["the base model alone"].one("p", class_="text").text == "The sky"


# ---- who has many tasks, no token, or a question that cannot be answered ----


@browses
def test_of_many_tasks_the_first_are_chosen_and_it_says_so():
    answers = {f"task-{number:02d}": labels(yes=0.75, no=0.25) for number in range(30)}
    page, requests = asked(answers, "classify", {"text": "Hello"})
    assert [name for name, _ in requests[0][0]] == [*answers][:24]
    assert "The first 24 are chosen; choose others below." in page.one(id="about").text
    assert page.one(id="chosen").text == "24 of 30 chosen"


@browses
def test_a_request_that_is_refused_as_a_whole_says_why_and_what_to_do():
    answers = {f"task-{number:03d}": labels(yes=0.75, no=0.25) for number in range(257)}
    page, requests = asked(answers, "classify", [("text", "Hello"), *(("model", name) for name in answers)])
    assert page.one(id="trouble").text == (
        "The server says: a request of 257 rows is too large: expected at most 256. Choose fewer tasks."
    )
    assert not requests
    assert not page.all("article")

    page, _ = asked({"broken": DAMAGED}, "classify", {"text": "Hello"})
    assert page.one(id="trouble").text == "The server says: the adapter 'broken' is refused: its checksum is wrong."

    page, _ = asked({"mood": labels(good=1.0)}, "classify", {"text": " "})
    assert page.one(id="trouble").text == "Type a text first."


@browses
def test_a_server_that_is_gone_is_said_to_be_and_earlier_answers_go_away():
    page, _ = acted(
        {"mood": labels(good=0.75, bad=0.25)},
        """
        await until(() => !$("question").hidden);
        $("text").value = "Hello";
        $("question").requestSubmit();
        await until(() => document.querySelector("article"));
        fetch = () => Promise.reject(new TypeError("Failed to fetch"));
        $("question").requestSubmit();
        """,
    )
    assert page.one(id="trouble").text == "The server cannot be reached. Is it running?"
    assert not page.all("article")
    assert page.one(id="answered").text == ""


@browses
def test_a_token_is_asked_for_and_kept_for_the_tab():
    answers = {"mood": labels(good=0.75, bad=0.25)}
    page, requests = asked(answers, "classify", {"text": "Hello"}, token="right")
    assert "hidden" not in page.one("form", id="token").attributes
    assert "hidden" in page.one("form", id="question").attributes
    assert page.one(id="why").text.startswith("This server answers only with a token.")
    assert not requests

    enter = """
        const enter = async (token) => {
          await until(() => !$("token").hidden);
          $("secret").value = token;
          $("token").requestSubmit();
        };
        await enter("wrong");
    """
    page, _ = acted(answers, enter, token="right")
    assert page.one(id="why").text == "The server does not accept this token. Try another one."

    page, requests = acted(
        answers,
        enter
        + """
        await enter("right");
        await until(() => !$("question").hidden);
        $("text").value = `kept: ${sessionStorage.token}, ${localStorage.length}`;
        $("question").requestSubmit();
        """,
        token="right",
    )
    assert requests == [([("mood", "kept: right, 0")], {"top_k": 3})]
    assert scores(cards(page)["mood"])[0] == ("good", "75.0 %")
    assert "hidden" in page.one("form", id="token").attributes


@browses
@pytest.mark.parametrize("key", ["ctrlKey", "metaKey"])
def test_tasks_are_found_and_chosen_and_asked_from_the_keyboard(key):
    answers = {f"{kind}-{number}": labels(yes=0.75, no=0.25) for kind in ("bank", "news") for number in range(5)}
    page, requests = acted(
        answers,
        """
        await until(() => !$("question").hidden);
        $("none").click();
        $("filter").value = " NEWS";
        $("filter").dispatchEvent(new Event("input"));
        $("all").click();
        $("tasks").querySelector("[value=news-3]").click();
        const press = (id, held) =>
          $(id).dispatchEvent(new KeyboardEvent("keydown", {key: "Enter", bubbles: true, cancelable: true, ...held}));
        $("text").value = `goes on: ${press("filter", {})}, ${press("text", {})}`;
        press("text", {KEY: true});
        """.replace("KEY", key),
    )
    text = "goes on: false, true"  # Enter asks nothing: in the filter it does nothing, in the text it makes a line
    names = ["news-0", "news-1", "news-2", "news-4"]
    assert requests == [([(name, text) for name in names], {"top_k": 3})]
    assert page.one(id="chosen").text == "4 of 10 chosen"
    link = page.one(id="link").attributes["href"]
    assert link == "?" + urlencode([("text", text), *(("model", name) for name in names)])


@browses
def test_a_folder_without_tasks_says_so():
    page, _ = asked({}, "classify", {})
    assert page.one(id="about").text.startswith("There is no task yet.")


@browses
def test_it_shows_what_a_real_server_answers(tiny_bert, tmp_path):
    from transformers import AutoModelForSequenceClassification

    names = ["mood", "topic"]
    fleet.save(tmp_path, names, bare=AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=3))
    for name in names:
        (tmp_path / name / "labels.json").write_text(json.dumps([f"{name}-{number}" for number in range(3)]))
    batcher = load_batcher(ServerSettings(base=tiny_bert, adapters=str(tmp_path)))
    with serving(create_app(Service(batcher), type(batcher.task))) as address:
        link = urlencode([("text", "hello"), *(("model", name) for name in [*names, "nobody"])])
        page = shown(f"{address}/?{link}")
    assert [*cards(page)] == ["mood", "topic", "nobody"]
    for name in names:
        found = dict(scores(cards(page)[name]))
        assert found.keys() == {f"{name}-{number}" for number in range(3)}
        assert sum(float(share.removesuffix(" %")) for share in found.values()) == pytest.approx(100, abs=0.2)
    assert "nobody" in cards(page)["nobody"].one("p", class_="wrong").text
