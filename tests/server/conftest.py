"""Folders that all tests of the server read and none changes, and what each adapter answers alone."""

import pytest

from tests.server.places import KINDS, TEXTS, Place


@pytest.fixture(scope="session")
def places(tmp_path_factory):
    return {name: Place(tmp_path_factory.mktemp(f"server-{name}"), kind) for name, kind in KINDS.items()}


@pytest.fixture(scope="session")
def expected(places):
    """kind -> adapter -> text -> the answer of transformers alone."""
    answers = {}
    for kind, place in places.items():
        asks = {name: place.alone(name, number) for number, name in enumerate(place.names)}
        answers[kind] = {name: {text: ask(text) for text in TEXTS} for name, ask in asks.items()}
        for text in TEXTS:  # else no test here could fail
            together = [str(answers[kind][name][text]) for name in place.names]
            assert len(set(together)) == len(together), (kind, text, together)
    return answers
