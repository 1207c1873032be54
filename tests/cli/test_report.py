"""The page that `peft-mask report` writes: its numbers, its form, and what strangers cannot do in it."""

import json
import re
import subprocess
import sys
from itertools import pairwise

import pytest
from safetensors.torch import load_file, save_file

from peft_mask import Masks
from peft_mask.cli import charts
from peft_mask.cli.figures import curve_name
from peft_mask.cli.page import card_html
from tests.cli.test_main import copied
from tests.server.browser import CHROMIUM, parse, shown
from tests.server.test_page import HOSTILE, browses

pytest.importorskip("vl_convert", reason="vl-convert, which draws the charts of a report, is not installed")

STATE = {
    "log_history": [
        {"step": 5, "loss": 0.75, "epoch": 0.1, "learning_rate": 1e-3},
        {"step": 10, "loss": 0.5, "epoch": 0.2, "learning_rate": float("nan")},
        {"step": 10, "eval_accuracy": 0.9},
        {"step": 15, "loss": 0.25, "note": HOSTILE, HOSTILE: 1.0},
        {"step": 20, "loss": 10**400, HOSTILE: 2.0},
        {"loss": 1.0},
        None,
    ]
}


@pytest.fixture(scope="module")
def written(place, tmp_path_factory):
    """The page of two adapters with a training log, and its document."""
    from peft_mask.cli.main import main

    folder = tmp_path_factory.mktemp("report")
    first, second = (copied(place.adapters / name, folder / name) for name in ("thin", "thin-too"))
    (first / "trainer_state.json").write_text(json.dumps(STATE))
    out = folder / "report.html"
    arguments = [
        "report",
        str(first),
        str(second),
        "--base",
        str(place.base),
        "--out",
        str(out),
        "--title",
        "Two masks",
    ]
    assert main(arguments) == 0
    return out, parse(out.read_text("utf-8"))


def test_a_report_has_its_parts_and_says_how_large_it_is(place, run, tmp_path):
    said = run("report", place.adapters / "a", place.adapters / "b", "--out", tmp_path / "r.html", "--json")
    assert said.code == 0
    assert said.data["sections"] == ["sparsity", "where", "agreement", "bytes", "card"]
    assert said.data["bytes"] == (tmp_path / "r.html").stat().st_size


def test_the_page_shows_the_figures_of_the_adapters(written, place):
    _, document = written
    thin, other = (Masks.load(place.adapters / name) for name in ("thin", "thin-too"))
    text = document.text
    assert f"{thin.weights:,}" in text
    assert f"{100 * thin.sparsity:.3f} %" in text
    assert f"{thin.entropy:.3f}" in text
    together = sum((thin & other).zeros.values())
    both = sum(thin.zeros.values()) + sum(other.zeros.values()) - together
    assert f"{100 * both / together:.3f} %" in text
    assert "loss" in text
    assert "It ends at 0.25 in thin. The log calls it loss." in text


def test_the_page_needs_nothing_else_and_forbids_everything_else(written):
    out, document = written
    policy = next(each for each in document.all("meta") if each.attributes.get("http-equiv"))
    assert policy.attributes["content"].startswith("default-src 'none'; style-src 'unsafe-inline'")
    assert {each.name for each in document.all()} & {
        "script",
        "img",
        "link",
        "iframe",
        "object",
        "image",
        "use",
    } == set()
    outside = re.findall(r'(?:src|srcset|href)="([^"#][^"]*)"', out.read_text("utf-8"))
    assert all(address.startswith("https://") for address in outside), outside  # links in cards
    assert "@import" not in out.read_text("utf-8")


def test_who_cannot_see_or_point_gets_the_same(written):
    _, document = written
    assert document.one("html").attributes["lang"] == "en"
    assert document.one("head").one("title").text == "Two masks"
    levels = [int(each.name[1]) for each in document.all() if re.fullmatch(r"h[1-6]", each.name)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels)), levels
    pictures = document.all("svg")
    assert len(pictures) >= 8
    assert all(each.attributes["role"] == "img" and each.attributes["aria-label"] for each in pictures)
    for figure in document.all("figure"):
        assert figure.all("table"), "the numbers behind the chart"
    for table in document.all("table"):
        if table.attributes.get("class") is not None:
            assert table.one("caption").text
            assert all(each.attributes.get("scope") in ("col", "row") for each in table.all("th"))
    for region in document.all(role="region"):
        assert region.attributes["tabindex"] == "0"
        assert region.attributes["aria-label"]
    ids = [each.attributes["id"] for each in document.all() if "id" in each.attributes]
    assert len(ids) == len(set(ids))
    links = [each.attributes["href"] for each in document.all("a") if each.attributes["href"].startswith("#")]
    assert {link[1:] for link in links} <= set(ids)


def test_every_mark_says_what_it_stands_for(written):
    said = {each.attributes["aria-label"]: [t.text for t in each.all("title")] for each in written[1].all("svg")}
    (bars,) = [texts for label, texts in said.items() if label == "Bytes of each part of the file"]
    assert "thin, trained beside: 264 bytes" in bars, bars
    (curve,) = [texts for label, texts in said.items() if label.startswith("Loss on the training rows over")]
    assert curve == ["thin, step 5: 0.75", "thin, step 10: 0.5", "thin, step 15: 0.25"]
    (crowded,) = [texts for label, texts in said.items() if label == "How zeros crowd in rows and columns of thin"]
    assert len(crowded) == 4 * 13


def test_colors_are_the_pages_own_by_day_and_by_night(written):
    html = written[0].read_text("utf-8")
    assert "@media (prefers-color-scheme: dark)" in html
    for stand_in in charts._VARIABLES:
        assert f'"{stand_in}"' not in html
    assert 'fill="var(--ink)"' in html
    assert 'stroke="var(--s0)"' in html


def hostile(place, folder):
    """An adapter in which every text that a stranger can write is hostile."""
    made = copied(place.adapters / "a", folder)
    tensors = load_file(made / "adapter_model.safetensors")
    named = {}
    for number, (key, value) in enumerate(tensors.items()):
        named[key.replace("bert.", f"\x1b[2J{HOSTILE}\u202e{number}.") if "bert." in key else f"{HOSTILE}{key}"] = value
    save_file(named, made / "adapter_model.safetensors")
    config = json.loads((made / "adapter_config.json").read_text())
    config |= {"base_model_name_or_path": HOSTILE, "task_type": HOSTILE, "seed": HOSTILE}
    (made / "adapter_config.json").write_text(json.dumps(config))
    (made / "README.md").write_text(
        f"---\nlicense: {HOSTILE}\n---\n# {HOSTILE}\n\n{HOSTILE}\n\n[go](javascript:alert(1)) <b onclick=a()>b</b>\n"
        '![see](https://example.org/spy.png) [web](https://example.org/ "x\\" onmouseover=alert(1)")\n'
        '<style>@import "https://example.org/x.css"</style>\n'
    )
    (made / "trainer_state.json").write_text(json.dumps(STATE))
    return made


def test_what_strangers_wrote_is_text(place, run, tmp_path):
    made = hostile(place, tmp_path / "<b>x")
    assert run("inspect", made, "--matrices").code == 0
    assert "\x1b" not in run("inspect", made, "--matrices").out
    said = run("report", made, "--out", tmp_path / "r.html", "--title", HOSTILE)
    assert said.code == 0, said.err
    html = (tmp_path / "r.html").read_text("utf-8")
    document = parse(html)
    known = {"html", "head", "meta", "title", "style", "body", "a", "header", "main", "nav", "footer", "section", "div"}
    known |= {
        "h1",
        "h2",
        "h3",
        "h4",
        "h5",
        "h6",
        "p",
        "ul",
        "ol",
        "li",
        "figure",
        "details",
        "summary",
        "br",
        "code",
        "pre",
    }
    known |= {"code", "pre", "table", "caption", "thead", "tbody", "tr", "th", "td", "em", "strong", "blockquote", "hr"}
    known |= charts._DRAWN
    assert {each.name for each in document.all()} - {name.lower() for name in known} == set()
    assert len(document.all("style")) == 1
    for each in document.all():
        assert not [name for name in each.attributes if name.startswith("on") or name == "style"], each
        if each.name == "a":
            assert each.attributes["href"].startswith(("#", "https://"))
    assert "\x1b" not in html
    assert "\u202e" not in html
    assert "&lt;script&gt;" in html


def test_long_names_down_the_side_have_room_in_a_wider_font():
    name = "attention.output.dense"
    rows = [{"part": name, "bytes": 3, "said": ""}]
    drawn = charts.svg(charts.bars(rows, x="bytes", y="part"), "a", "b")
    plot = re.search(r'transform="translate\((\d+),', drawn)
    assert plot is not None
    assert int(plot[1]) > 7 * len(name), "DejaVu Sans takes 7 pixels a letter"


def test_names_at_the_end_of_an_axis_are_not_moved_over_others():
    rows = [{"kind": "a", "share": share, "of": "b", "said": ""} for share in (0.17, 0.493)]
    drawn = parse(charts.svg(charts.points(rows, y="kind"), "a", "b"))
    anchors = {each.text: each.attributes.get("text-anchor") for each in drawn.all("text") if each.text.endswith("%")}
    assert anchors["50%"] == anchors["0%"] == anchors["20%"] == "middle"


def test_curves_have_names_in_words():
    assert curve_name("flip_ratio") == "Share of the weights whose mask has changed since the start"
    assert curve_name("eval_loss") == "Loss on the validation rows"
    assert (curve_name("mine"), curve_name("eval_mine")) == ("mine", "eval_mine")


@pytest.mark.parametrize(
    ("text", "holds", "lacks"),
    [
        ("a\n\n<!-- peft_mask: x\n\n## y -->\n\n## b", "<h4>b</h4>", "peft_mask"),
        ("a <!-- b --> c", "<p>a  c</p>", "!--"),
        ("<!-- a --><script>alert(1)</script>", "<p>&lt;script&gt;", "<script"),
        ("```\n<!-- kept -->\n```", "&lt;!-- kept --&gt;", "<!--"),
        ("---\na: b\n---\n# One\n\n## Two", "<h4>One</h4>", "a: b"),
        ("## One\n\n#### Two", "<h4>One</h4>\n<h5>Two</h5>", "h6"),
        ("[x](https://a.org)", 'rel="noopener noreferrer nofollow"', "<img"),
        ("[x](javascript:x)", "[x](javascript:x)", "<a"),
        ("[x](file:///etc/passwd)", "[x](file:", "<a"),
        ("![x](https://a.org/x.png)", ">x</a>", "<img"),
        ("<iframe src=x></iframe>", "&lt;iframe", "<iframe"),
        ("| a | b |\n|---|---|\n| 1 | 2 |", "<td>1</td>", "|"),
    ],
)
def test_cards_bring_words_tables_and_links_and_nothing_active(text, holds, lacks):
    html = card_html(text)
    assert holds in html
    assert lacks not in html


@browses
def test_a_browser_shows_it_and_nothing_hostile_runs(place, written, run, tmp_path):
    document = shown(written[0].as_uri())
    assert document.one("head").one("title").text == "Two masks"
    marks = [each for each in document.all("svg") if each.all("path")]
    assert len(marks) >= 8
    assert document.one(id="training").text == "Training"
    made = hostile(place, tmp_path / "hostile")
    assert run("report", made, "--out", tmp_path / "r.html", "--title", "calm").code == 0
    assert shown((tmp_path / "r.html").as_uri()).one("head").one("title").text == "calm"


@browses
@pytest.mark.parametrize(("width", "night"), [(1200, False), (1200, True), (500, False)])
def test_it_is_light_by_day_dark_by_night_and_no_wider_than_a_phone(width, night, written, tmp_path):
    from PIL import Image

    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    if night:
        options += ["--force-dark-mode", "--blink-settings=preferredColorScheme=0"]
    picture = tmp_path / "page.png"
    command = [CHROMIUM, *options, f"--user-data-dir={tmp_path / 'profile'}", "--hide-scrollbars"]
    command += [f"--window-size={width},2000", f"--screenshot={picture}", written[0].as_uri()]
    subprocess.run([str(part) for part in command], check=True, capture_output=True, timeout=120)
    image = Image.open(picture).convert("L")
    assert image.size == (width, 2000)
    margin = image.crop((0, 0, 12, 2000))
    low, high = margin.getextrema()
    assert (high < 60) if night else (low > 200), "the paper, on which nothing is drawn at the edge"
    right = image.crop((width - 6, 0, width, 2000)).getextrema()
    assert right == (low, high), "nothing reaches over the right edge"


# ---- refusals ----


def test_an_adapter_that_needs_its_base_is_shown_without_its_places(place, run, tmp_path):
    said = run("report", place.adapters / "bound", "--out", tmp_path / "r.html")
    assert said.code == 0
    text = parse((tmp_path / "r.html").read_text("utf-8")).text
    assert "bound: cannot be read without the base, so this part lacks it." in text
    assert "ranks against the base" in text


def test_what_cannot_be_a_report_is_refused(place, refused, tmp_path):
    a = place.adapters / "a"
    assert "this is a folder, name a file such as report.html" in refused("report", a, "--out", tmp_path)
    assert "is given twice: name each adapter once" in refused("report", a, a, "--out", tmp_path / "r.html")
    assert list(tmp_path.iterdir()) == []


def test_adapters_of_one_name_are_told_apart_by_what_they_lie_in(place, run, tmp_path):
    for seed in ("one", "two"):
        (tmp_path / seed).mkdir()
        copied(place.adapters / "a", tmp_path / seed / "trec")
    said = run("report", tmp_path / "one" / "trec", tmp_path / "two" / "trec", "--out", tmp_path / "r.html", "--json")
    assert list(said.data["adapters"]) == ["one/trec", "two/trec"]


def test_names_that_begin_or_end_alike_stay_apart(place, run, tmp_path):
    long = "a name so long that no axis has room for all of it, number"
    folders = [copied(place.adapters / name, tmp_path / f"{long} {name}") for name in ("a", "b", "c")]
    assert run("report", *folders, "--out", tmp_path / "r.html").code == 0
    document = parse((tmp_path / "r.html").read_text("utf-8"))
    (chart,) = [each for each in document.all("svg") if "layer by layer" in each.attributes["aria-label"]]
    said = {each.text for each in chart.all("title")}
    assert len(said) == 3 * 2, "three pairs in two layers, each with a point of its own"
    lines = [each for each in chart.all("path") if each.attributes.get("stroke", "").startswith("var(--s")]
    assert len({each.attributes["stroke"] for each in lines}) == 3


@pytest.mark.parametrize("package", ["vl_convert", "jinja2", "markdown_it"])
def test_a_package_that_is_missing_is_named_with_what_to_install(package, place, refused, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    message = refused("report", place.adapters / "a", "--out", tmp_path / "r.html")
    assert "pip install 'peft-mask[report]'" in message
