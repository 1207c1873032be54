"""What a vLLM of another release is told, and what happens without any."""

import importlib.util
import subprocess
import sys

import pytest

from peft_mask.vllm.release import check_release
from tests.vllm.pretend import pretend_vllm

HERE = importlib.util.find_spec("vllm") is not None


@pytest.mark.skipif(
    not HERE, reason="vLLM wants an environment of its own (make vllm); nor are its contract, engines and server tested"
)
def test_the_vllm_that_is_here_is_of_the_release_that_all_is_made_for():
    check_release()


@pytest.mark.parametrize("version", ["0.31.9", "0.33.0", "1.32.0", "0.3", "0.320.1"])
def test_other_minor_releases_are_refused_in_words(monkeypatch, version):
    pretend_vllm(monkeypatch, version)
    with pytest.raises(ImportError, match=rf"made for vLLM 0.32 .* this is {version}, .* serve merged models"):
        check_release()


@pytest.mark.parametrize("version", ["0.32.0", "0.32.7+cpu"])
def test_the_minor_release_it_is_made_for_is_taken(monkeypatch, version):
    pretend_vllm(monkeypatch, version)
    check_release()


def test_without_vllm_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match=r"pip install 'vllm==0\.32"):
        check_release()


@pytest.mark.parametrize("extension", ["MaskExtension", "MixedMasks"])
def test_workers_of_another_release_get_no_extension(monkeypatch, extension):
    pretend_vllm(monkeypatch, "0.33.0")
    import peft_mask.vllm

    with pytest.raises(ImportError, match=r"this is 0\.33\.0"):
        getattr(peft_mask.vllm, extension)


@pytest.mark.slow
@pytest.mark.skipif(HERE, reason="vLLM is here")
def test_the_room_is_imported_without_vllm():
    code = "import sys, peft_mask.vllm as room; room.MaskExtension, room.switch_mask; assert 'vllm' not in sys.modules"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_a_name_that_is_not_there_is_said_to_be_missing():
    import peft_mask.vllm

    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = peft_mask.vllm.Nothing
