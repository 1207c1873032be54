"""The page at `/`, as it lies in the package: what needs no browser to be seen."""

import re
from pathlib import Path

import peft_mask.server
from peft_mask.server.tasks import TASKS
from tests.server.browser import parse

PAGE = Path(peft_mask.server.__file__).with_name("page.html").read_text(encoding="utf-8")


def test_it_loads_nothing_and_asks_nobody_but_its_server():
    assert not re.findall(r"(?i)https?:|wss?:|[\"'(]//|@import|\bimport\(|url\(", PAGE)
    page = parse(PAGE)
    outside = {each.attributes.get(name) for each in page.all() for name in ("src", "href", "action")} - {None}
    assert outside == {"data:,"}
    (policy,) = [meta.attributes["content"] for meta in page.all("meta") if "http-equiv" in meta.attributes]
    assert policy.startswith("default-src 'none'; connect-src 'self';")


def test_it_makes_no_html_of_texts():
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|\beval\b|srcdoc", PAGE)


def test_it_knows_every_task():
    kinds = PAGE[PAGE.index("const KINDS") :]
    assert re.findall(r"(?m)^  (\w+): \{$", kinds) == [*TASKS]


def test_what_a_person_fills_in_has_a_label_and_what_the_script_names_is_there():
    page = parse(PAGE)
    named = {label.attributes.get("for") for label in page.all("label")}
    named |= {each.attributes["id"] for label in page.all("label") for each in label.all("input")}
    fields = [each for kind in ("input", "textarea") for each in page.all(kind)]
    assert len(fields) == 5
    for each in fields:
        assert each.attributes["id"] in named or each.attributes.get("aria-label"), each.attributes
    for name in re.findall(r"\$\(\"([\w-]+)\"\)", PAGE):
        assert page.one(id=name)
    assert page.one(id="answered").attributes["role"] == "status"
    assert page.one(id="trouble").attributes["role"] == page.one(id="why").attributes["role"] == "alert"
