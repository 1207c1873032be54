"""What holds for all commands: help, exit codes, and errors of one line."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib
from peft import LoraConfig, get_peft_model

from peft_mask import Masks
from peft_mask.cli import main as commands
from peft_mask.cli.answer import Answer, columns, one_line, plain
from peft_mask.cli.main import COMMANDS, build
from tests.hub_server import HubServer

ROOT = Path(__file__).parents[2]
NAMES = [command.__name__.rpartition(".")[2] for command in COMMANDS]


def test_the_help_fits_a_screen_and_names_every_command(run):
    said = run("--help")
    assert said.code == 0
    lines = said.out.splitlines()
    assert 24 <= len(lines) <= 40
    assert max(map(len, lines)) <= 100
    assert [name for name in NAMES if f"    {name} " not in said.out] == []


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"serve", "train"}))
def test_the_help_of_a_command_fits_a_screen_and_has_examples_that_parse(name, run):
    said = run(name, "--help")
    assert said.code == 0
    assert len(said.out.splitlines()) <= 40
    examples = [line.strip() for line in said.out.splitlines() if line.startswith(f"  peft-mask {name}")]
    assert examples
    for example in examples:
        build().parse_args(example.split()[1:])


@pytest.mark.slow
def test_the_script_and_the_module_are_the_same_command():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["scripts"]
    module, _, function = scripts["peft-mask"].partition(":")
    assert getattr(importlib.import_module(module), function) is commands.main
    ran = subprocess.run(
        [sys.executable, "-m", "peft_mask", "inspect", "nowhere"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr == (
        "peft-mask inspect: error: there is no folder 'nowhere', and it is no id on the Hub like 'user/name': "
        "check the name.\n"
    )


def test_what_is_no_command_is_refused_in_one_line(refused):
    assert refused("inspekt", "a").endswith("(see peft-mask --help)")
    assert "the following arguments are required: ADAPTER" in refused("inspect")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "inspect a --matrix",
            "peft-mask inspect: error: there is no flag --matrix; did you mean --matrices? "
            "(see peft-mask inspect --help)",
        ),
        (
            "merge a --bsae b --out c",
            "peft-mask merge: error: there is no flag --bsae; did you mean --base? (see peft-mask merge --help)",
        ),
        ("env --qqq=3", "peft-mask env: error: there is no flag --qqq (see peft-mask env --help)"),
        ("inspect a b", "peft-mask inspect: error: b is more than it takes (see peft-mask inspect --help)"),
    ],
)
def test_a_flag_that_is_none_is_refused_with_the_nearest_and_the_help_of_its_command(line, message, refused):
    assert refused(*line.split()) == message


def test_a_flag_may_be_shortened(place, run):
    assert "by matrix" in run("inspect", place.adapters / "a", "--matri").out


@pytest.mark.parametrize(
    "command", ["inspect", "verify --base b", "merge --base b --out out", "convert --portable --out out"]
)
def test_a_folder_that_is_not_there_is_refused_by_each(command, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name, *rest = command.split()
    assert "there is no folder 'nowhere'" in refused(name, "nowhere", *rest)
    assert list(tmp_path.iterdir()) == []


def test_an_id_on_the_hub_that_cannot_be_had_is_refused_with_advice(refused):
    message = refused("inspect", "nobody/nothing")
    assert "there is no folder 'nobody/nothing', and 'nobody/nothing' cannot be downloaded" in message
    assert message.endswith("Check the name, the network and your login, or give a folder.")


def test_an_id_on_the_hub_is_downloaded(place, tmp_path):
    with HubServer({"hf_alice": "alice"}) as hub:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path), "HF_TOKEN": "hf_alice"}
        environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": str(ROOT)}
        push = "import sys; from huggingface_hub import HfApi as A; A().create_repo('alice/mask'); "
        push += "A().upload_folder(repo_id='alice/mask', folder_path=sys.argv[1], ignore_patterns=['README.md'])"
        processes = {"env": environment, "capture_output": True, "text": True, "cwd": tmp_path, "check": True}
        subprocess.run([sys.executable, "-c", push, str(place.adapters / "a")], **processes)
        command = [sys.executable, "-m", "peft_mask", "inspect", "alice/mask@main", "--json"]
        said = json.loads(subprocess.run(command, **processes).stdout)
    assert said["adapter"] == "alice/mask@main"
    assert said["zeros"] == sum(Masks.load(place.adapters / "a").zeros.values())


def test_an_adapter_of_another_method_is_refused(place, refused, tmp_path):
    get_peft_model(place.load(2), LoraConfig(task_type="SEQ_CLS")).save_pretrained(tmp_path / "lora")
    assert "is no mask but an adapter of PEFT's method 'LORA'" in refused("inspect", tmp_path / "lora")
    (tmp_path / "lora" / "adapter_config.json").unlink()
    assert "Is it the adapter of another method?" in refused("inspect", tmp_path / "lora")


def test_a_file_that_is_no_adapter_is_refused(refused, tmp_path):
    (tmp_path / "notes.txt").write_text("")
    assert "notes.txt' is no adapter: give the folder that holds" in refused("inspect", tmp_path / "notes.txt")
    assert f"'{tmp_path}' holds no adapter_model.safetensors" in refused("inspect", tmp_path)


def test_a_damaged_file_is_refused(place, refused, tmp_path):
    folder = copied(place.adapters / "a", tmp_path / "cut")
    whole = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(whole[:-100])
    assert "it is not a whole safetensors file" in refused("inspect", folder)
    flipped = bytearray(whole)
    flipped[whole.index(b"PMSK") + 60] ^= 1
    (folder / "adapter_model.safetensors").write_bytes(flipped)
    assert "its checksum is wrong" in refused("inspect", folder)
    (folder / "adapter_model.safetensors").write_bytes(whole)
    (folder / "adapter_config.json").write_text("{")
    assert "is not JSON" in refused("inspect", folder)


@pytest.mark.parametrize("command", ["combine", "convert", "merge"])
def test_a_folder_that_is_there_is_not_written_into(command, place, refused, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    a, b = place.adapters / "a", place.adapters / "b"
    rest = {"combine": [b, "--how", "union"], "convert": ["--portable"], "merge": ["--base", place.base]}[command]
    message = refused(command, a, *rest, "--out", tmp_path / "out")
    assert "exists already: name a new folder with --out, or remove that one." in message
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]


def test_an_error_inside_is_one_line_unless_its_place_is_asked_for(refused, run, monkeypatch):
    def fails(options):
        raise LookupError("no\nluck")

    monkeypatch.setattr("peft_mask.cli.env.run", fails)
    assert refused("env") == "peft-mask env: error: LookupError: no luck"
    with pytest.raises(LookupError):
        run("env", "--traceback")


def test_an_interrupted_command_ends_as_shells_expect(run, monkeypatch):
    def interrupted(options):
        raise KeyboardInterrupt

    monkeypatch.setattr("peft_mask.cli.env.run", interrupted)
    assert run("env").code == 130


def test_serve_hands_its_arguments_to_the_server(run, refused):
    assert "--max_new_tokens" in run("serve", "--help").out
    assert "task must be one of" in refused("serve", "--base", "b", "--adapters", "a", "--task", "sing")


def test_the_environment_has_versions_and_devices_and_no_secret(run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    said = run("env")
    assert said.code == 0
    assert "torch  " in said.out
    assert "hf_secret" not in said.out
    data = run("env", "--json").data
    assert data["packages"]["torch"] is not None
    assert data["packages"]["vllm"] is None or isinstance(data["packages"]["vllm"], str)
    assert data["devices"][-1] == "cpu"


def test_what_strangers_wrote_cannot_move_the_cursor():
    assert plain("a\x1b[2J\u202eb\ud800") == r"a\x1b[2J\u202eb\ud800"
    assert one_line("first\n  second\x07") == r"first second\x07"
    assert one_line("x" * 9999) == f"{'x' * 1500} ..."
    assert columns([{"name": "\x1b[31m", "bytes": 1200}]).splitlines() == ["name      bytes", r"\x1b[31m  1,200"]


def test_numbers_that_json_lacks_are_null():
    assert json.loads(Answer({"a": float("nan"), "b": [float("inf"), 1.5]}, "").json()) == {"a": None, "b": [None, 1.5]}


def copied(source, target):
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target
