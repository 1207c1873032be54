"""Where adapters come from: folders, mappings, callables, the Hub."""

import pytest

from peft_mask import AdapterCache, AdapterRefusedError, UnknownAdapterError
from tests.serving.fleet import NAMES, ask


@pytest.mark.parametrize("kind", ["folder", "text", "mapping", "callable"])
def test_sources(folder, model, expected, kind):
    source = {
        "folder": folder,
        "text": str(folder),
        "mapping": {name: str(folder / name) for name in NAMES},
        "callable": lambda name: {name: folder / name for name in NAMES}[name],
    }[kind]
    cache = AdapterCache(model, source, slots=2)
    ask(cache, model, NAMES[1:3], expected)
    with pytest.raises(UnknownAdapterError, match="there is no adapter 'none'"), cache.lease(["none"]):
        pass


def test_ids_on_the_hub_are_downloaded_at_their_revision(folder, model, expected, monkeypatch):
    calls = []

    def download(repo_id, revision=None, allow_patterns=None):
        calls.append((repo_id, revision, sorted(allow_patterns)))
        if repo_id == "someone/gone":
            raise OSError("404")
        return str(folder / repo_id.split("/")[1])

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    places = {"a": f"someone/{NAMES[1]}@v1.2", "b": f"someone/{NAMES[2]}", "c": "someone/gone", "d": "../what/ever"}
    cache = AdapterCache(model, places)
    ask(cache, model, ["a", "b"], {"a": expected[NAMES[1]], "b": expected[NAMES[2]]})
    files = ["adapter_config.json", "adapter_model.safetensors", "labels.json"]
    assert calls == [(f"someone/{NAMES[1]}", "v1.2", files), (f"someone/{NAMES[2]}", None, files)]
    with pytest.raises(AdapterRefusedError, match=r"'c' is refused: 'someone/gone' cannot be downloaded \(404\)"):
        cache.pin("c")
    with pytest.raises(AdapterRefusedError, match=r"'\.\./what/ever' is no folder, nor an id on the Hub"):
        cache.pin("d")
    assert len(calls) == 3


def test_what_a_source_raises_in_its_own_words_is_kept(folder, model):
    def source(name):
        raise UnknownAdapterError(name, "it was withdrawn.")

    with pytest.raises(UnknownAdapterError, match=r"^there is no adapter 'x': it was withdrawn\.$"):
        AdapterCache(model, source).pin("x")
