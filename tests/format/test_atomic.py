"""Saving: whoever is interrupted, killed or out of disk space leaves the old adapter or the new."""

import contextlib
import errno
import os
import shutil
import signal
import stat
import subprocess

import pytest
import torch
from peft import PeftModel, get_peft_model

from attacks import kill
from attacks.victim import CONFIG, WEIGHTS, base_model, logits, save_adapter
from peft_mask import MaskConfig, Masks, hotswap_adapter
from peft_mask.format.atomic import replace_files
from tests.versions import LOADS_BY_NAME, REPLACES_FILES

CARD = "README.md"
replaces_files = pytest.mark.skipif(not REPLACES_FILES, reason="this safetensors writes into the old file")
resource = pytest.importorskip("resource", reason="the size of files can be limited on Unix only")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_files_are_replaced_and_nothing_else_is_left(tmp_path):
    (tmp_path / "a").write_bytes(b"old")
    replace_files({tmp_path / "a": b"new", tmp_path / "b": b"other"})
    assert contents(tmp_path) == {"a": b"new", "b": b"other"}


def test_new_files_have_the_permissions_of_any_other(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    replace_files({tmp_path / "ours": b""})
    assert stat.S_IMODE((tmp_path / "ours").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


@pytest.mark.parametrize("failing", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr)
def test_what_fails_leaves_every_file_as_it_was(tmp_path, monkeypatch, failing, error):
    for name in "ab":
        (tmp_path / name).write_bytes(b"old")
    original, calls = getattr(os, failing), []

    def fails(*args):
        calls.append(args)
        if len(calls) == (2 if failing == "fsync" else 1):  # after the first file was written, before any was replaced
            raise error
        return original(*args)

    monkeypatch.setattr(os, failing, fails)
    with pytest.raises(type(error)):
        replace_files({tmp_path / "a": b"new", tmp_path / "b": b"new"})
    assert contents(tmp_path) == {"a": b"old", "b": b"old"}


def test_a_link_is_replaced_and_not_written_through(tmp_path):
    (tmp_path / "secret").write_bytes(b"untouched")
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name in (WEIGHTS, CONFIG, f"{WEIGHTS}.tmp", f"{CONFIG}.tmp"):
        (folder / name).symlink_to(tmp_path / "secret")
    Masks({"0": torch.ones(3, 4, dtype=torch.bool)}).save(folder)
    assert (tmp_path / "secret").read_bytes() == b"untouched"
    assert len(Masks.load(folder)) == 1
    (folder / CONFIG).unlink()
    (folder / CONFIG).symlink_to(tmp_path / "secret")
    MaskConfig().save_pretrained(folder)
    assert (tmp_path / "secret").read_bytes() == b"untouched"


@contextlib.contextmanager
def files_of_at_most(size):
    """Writing more fails, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def two(tmp_path, **fields):
    """A model with another adapter than the one saved in a folder."""
    save_adapter(tmp_path / "adapter", seed=1)
    return PeftModel.from_pretrained(base_model(), save_adapter(tmp_path / "other", seed=2, **fields)).eval()


@pytest.mark.parametrize("size", [0, 10, 300, 1000])
def test_a_full_disk_raises_and_leaves_the_old_masks(tmp_path, size):
    masks = Masks.load(save_adapter(tmp_path / "other", seed=2))
    folder = save_adapter(tmp_path / "adapter", seed=1)
    before = contents(folder)
    with files_of_at_most(size), pytest.raises(OSError, match="File too large"):
        masks.save(folder)
    assert contents(folder) == before


# of the card, which PEFT writes first, and of the tensors
@pytest.mark.parametrize("size", [0, 500, pytest.param(6000, marks=replaces_files)])
def test_a_full_disk_raises_and_leaves_the_old_adapter(tmp_path, size):
    config = MaskConfig(task_type="SEQ_CLS", trainable_token_indices=list(range(60)))  # tensors larger than the card
    model = get_peft_model(base_model(), config)
    folder = save_adapter(tmp_path / "adapter", seed=1)
    before = contents(folder)
    with files_of_at_most(size), pytest.raises(Exception, match=r"File too large|I/O error"):
        model.save_pretrained(folder)
    after = contents(folder)
    assert {name: after[name] for name in (WEIGHTS, CONFIG)} == {name: before[name] for name in (WEIGHTS, CONFIG)}
    assert after.keys() == before.keys()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 200 kB, with an adapter on it."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("file systems cannot be mounted here; the limit on the size of a file stands in for a full disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("way", ["Masks.save", pytest.param("save_pretrained", marks=replaces_files)])
@pytest.mark.parametrize("left", [0, 4096, 16384])  # pages: for nothing, for the card, and for a part of the tensors
def test_a_file_system_that_is_full_raises_and_keeps_the_old_adapter(small_disk, tmp_path, way, left):
    config = MaskConfig(task_type="SEQ_CLS", trainable_token_indices=list(range(60)), portable=True)
    model = get_peft_model(large := base_model(), config)
    large.classifier.modules_to_save["default"].weight.data = torch.randn(1000, 32)  # tensors larger than what is left
    masks = Masks({f"{number}": torch.rand(512, 512) >= 0.5 for number in range(2)})
    folder = save_adapter(small_disk / "adapter", seed=1)
    before = contents(folder)
    free = shutil.disk_usage(small_disk).free
    (small_disk / "filling").write_bytes(bytes(free - left))
    with pytest.raises(Exception, match=r"No space left|I/O error"):
        masks.save(folder) if way == "Masks.save" else model.save_pretrained(folder)
    after = contents(folder)
    assert {name: after[name] for name in (WEIGHTS, CONFIG)} == {name: before[name] for name in (WEIGHTS, CONFIG)}
    assert after.keys() == before.keys()  # nothing unfinished takes the room that is left
    (small_disk / "filling").unlink()
    assert torch.equal(
        logits(PeftModel.from_pretrained(base_model(), folder)),
        logits(PeftModel.from_pretrained(base_model(), save_adapter(tmp_path / "same", seed=1))),
    )


def test_a_configuration_that_cannot_be_written_leaves_the_new_masks_under_the_old_one(tmp_path, monkeypatch):
    model = two(tmp_path)
    old = (tmp_path / "adapter" / CONFIG).read_bytes()

    def full(contents):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("peft_mask.settings.config.replace_files", full)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / CONFIG).read_bytes() == old
    loaded = PeftModel.from_pretrained(base_model(), tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded), logits(model))


def test_a_card_that_cannot_be_filled_in_is_warned_of(tmp_path, monkeypatch):
    model = two(tmp_path)

    def full(contents):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("peft_mask.settings.card.replace_files", full)
    with pytest.warns(UserWarning, match=r"the model card in .* is not filled in: .*No space left"):
        model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(base_model(), tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded), logits(model))


class TestNewTensorsUnderTheOldConfiguration:
    """What a kill between the two files leaves."""

    def pair(self, tmp_path, **fields):
        model = two(tmp_path, **fields)
        shutil.copy(tmp_path / "other" / WEIGHTS, tmp_path / "adapter" / WEIGHTS)
        return model, tmp_path / "adapter"

    @pytest.mark.parametrize("sparsity", [0.05, 0.2])  # records of the same lengths, or nearly, and of others
    def test_of_the_same_modules_is_the_new_adapter(self, tmp_path, sparsity):
        model, folder = self.pair(tmp_path, target_sparsity=sparsity)
        assert torch.equal(logits(PeftModel.from_pretrained(base_model(), folder).eval()), logits(model))
        assert Masks.load(folder) == Masks.load(tmp_path / "other")
        swapped = PeftModel.from_pretrained(base_model(), save_adapter(tmp_path / "third", seed=3)).eval()
        hotswap_adapter(swapped, str(folder), "default")
        assert torch.equal(logits(swapped), logits(model))

    @pytest.mark.skipif(not LOADS_BY_NAME, reason="this transformers loads adapters through PEFT's hooks")
    def test_of_records_of_other_lengths_is_refused_by_transformers(self, tmp_path):
        _, folder = self.pair(tmp_path, target_sparsity=0.2)
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            base_model().load_adapter(folder)

    def test_of_other_modules_is_refused(self, tmp_path):
        _, folder = self.pair(tmp_path, target_modules=["query"])
        with pytest.raises(
            ValueError, match=r"(?s)its file and the model do not mask the same layers.*interrupted.*save it again"
        ):
            PeftModel.from_pretrained(base_model(), folder)

    def test_without_the_head_of_the_old_is_refused(self, tmp_path):
        _, folder = self.pair(tmp_path, task_type=None, modules_to_save=[])
        with pytest.raises(KeyError, match=r"base_model.model.classifier.weight"):  # so says PEFT
            PeftModel.from_pretrained(base_model(), folder)

    def test_with_a_head_that_the_old_had_not_is_refused(self, tmp_path):
        _, folder = self.pair(tmp_path)
        shutil.copy(save_adapter(tmp_path / "headless", task_type=None, modules_to_save=[]) / CONFIG, folder / CONFIG)
        with pytest.raises(ValueError, match=r"its file holds \['base_model.model.classifier.bias'"):
            PeftModel.from_pretrained(base_model(), folder)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Python 3.12 and later, of a fork where there are threads
@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("way", ["save_pretrained", "Masks.save"])
def test_killed_processes_leave_whole_adapters(way, alike):
    found = kill.kill(20, seed=0, way=way, alike=alike)
    assert not [outcome for outcome in found if outcome[0] == kill.BROKEN]
    if alike:
        assert {then for _, then in found} == {"loads whole", "of no consequence"}
