"""What a report shows of adapters, part by part: numbers, a chart of them, and the table behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from peft_mask.cli import charts
from peft_mask.cli.adapter import CODEC_NAMES, Adapter, Matrix
from peft_mask.cli.answer import percent, plain
from peft_mask.cli.figures import agreements, agreements_by_layer, crowding, curve_name, curves, magnitudes, positions
from peft_mask.cli.inspect import described, grouped, kind_of, layer_of
from peft_mask.cli.page import Figure, Section, Table, card_html
from peft_mask.format.masks import Masks

_PAIRS = 6  # drawn layer by layer
_ROWS = 3000  # of a table
_COUNTED = {True: "portable", False: "read with its base alone"}

Adapters = Mapping[str, Adapter]  # by the names that the page calls them


def facts_of(adapters: Adapters) -> Table:
    """Return what each adapter is, a column for each."""
    said = [described(adapter) for adapter in adapters.values()]
    rows = {
        "base": [str(data["base_model"] or "not named") for data in said],
        "task": [str(data["task_type"] or "none named") for data in said],
        "format": [f"{_COUNTED[data['portable']]}, version {data['format_version']}" for data in said],
        "masks": [f"{data['masks']:,}" for data in said],
        "masked weights": [f"{data['weights']:,}" for data in said],
        "off": [percent(data["sparsity"]) for data in said],
        "bits a masked weight": [f"{data['bits_per_weight']:.3f}" for data in said],
        "bytes of the masks": [f"{data['bytes']['masks']:,}" for data in said],
        "bytes of the file": [f"{data['bytes']['file']:,}" for data in said],
    }
    return Table("The adapters of this report", ("", *adapters), [(name, *cells) for name, cells in rows.items()])


def sparsity(adapters: Adapters) -> Section:
    """Return how much is off, by layer and kind of matrix."""
    figures = []
    cells = {
        name: grouped(adapter.masks, lambda mask: f"{layer_of(mask.name)}\n{kind_of(mask.name)}", "cell")
        for name, adapter in adapters.items()
    }
    most = max((cell["sparsity"] for own in cells.values() for cell in own), default=0.0)
    for place, (name, adapter) in enumerate(adapters.items()):
        rows = []
        for group in cells[name]:
            layer, _, kind = group["cell"].partition("\n")
            share = group["sparsity"]
            said = plain(f"layer {layer}, {kind}: {percent(share)} of {group['weights']:,} weights off")
            rows.append({"layer": layer, "kind": kind, "off": share, "said": said})
        layers = sorted({row["layer"] for row in rows}, key=lambda each: (each == "-", each.zfill(9)))
        rows.sort(key=lambda row: layers.index(row["layer"]))
        chart = charts.heat(rows, x="layer", y="kind", value="off", most=most)
        table = Table(
            "Share of the weights that are off", ("matrix", "layer", "off", "of weights", "bytes"), _matrices(adapter)
        )
        figures.append(
            Figure(
                f"By layer and matrix: {name}",
                "A column a layer, a row a kind of matrix; what is in no layer has the last column, “-”.",
                charts.svg(
                    chart, f"sparsity{place}", f"Share of weights off in each layer and kind of matrix of {name}"
                ),
                table,
            )
        )
    return Section("sparsity", "How much is off", "", figures)


def where(adapters: Adapters, masks: Mapping[str, Masks], base: nn.Module | None) -> Section:
    """Return where in the matrices zeros lie; by magnitude if there is a base."""
    figures: list[Figure] = []
    for place, name in enumerate(masks):
        figures += _where_of(name, masks[name], base, place)
    missing = [name for name in adapters if name not in masks]
    text = "" if base is not None else "With --base, the report also says how large the weights are that are off."
    if missing:
        text = f"{', '.join(missing)}: cannot be read without the base, so this part lacks it. Give it with --base."
    return Section("where", "Where in a matrix", text, figures)


def _where_of(name: str, masks: Masks, base: nn.Module | None, place: int) -> list[Figure]:
    cells = [row | {"said": plain(f"{row['kind']}: {row['ratio']:.2f} times the mean")} for row in positions(masks)]
    crowded = crowding(masks)
    if not cells or not crowded:
        return []
    points = [
        {"kind": row["kind"], "share": row[key], "of": said, "said": plain(f"{row['name']}: {row[key]:.1%} in {said}")}
        for row in crowded
        for key, said in (
            ("rows", "outputs"),
            ("columns", "inputs"),
            ("rows_at_random", "outputs, at random"),
            ("columns_at_random", "inputs, at random"),
        )
    ]
    kinds = list(dict.fromkeys(row["kind"] for row in cells))
    extremes = [
        (kind, f"{min(of):.2f}", f"{max(of):.2f}")
        for kind in kinds
        for of in [[row["ratio"] for row in cells if row["kind"] == kind]]
    ]
    shares = [
        (row["name"], *(f"{row[key]:.1%}" for key in ("rows", "rows_at_random", "columns", "columns_at_random")))
        for row in crowded[:_ROWS]
    ]
    figures = [
        Figure(
            f"Zeros by their place: {name}",
            "A square is a kind of matrix, all layers together, in 16 by 16 cells; 1 is as many zeros as on average.",
            charts.svg(charts.places(cells), f"places{place}", f"Where zeros lie in each kind of matrix of {name}"),
            Table("Fewest and most zeros in a cell, times the mean", ("kind", "fewest", "most"), extremes),
        ),
        Figure(
            f"Crowded rows and columns: {name}",
            "A point a matrix: the share of its zeros in that tenth of its outputs (rows) or inputs (columns) which "
            "has most of them; beside it the same of as many zeros drawn at random.",
            charts.svg(
                charts.points(points, y="kind"), f"crowded{place}", f"How zeros crowd in rows and columns of {name}"
            ),
            Table(
                "Share of zeros in the fullest tenth",
                ("matrix", "outputs", "outputs, at random", "inputs", "inputs, at random"),
                shares,
            ),
        ),
    ]
    if base is not None:
        figures.append(_by_magnitude(name, masks, base, place))
    return figures


def _by_magnitude(name: str, masks: Masks, base: nn.Module, place: int) -> Figure:
    rows = [
        row | {"said": plain(f"{row['kind']}, {row['weights']}: {row['share']:.1%} of the zeros")}
        for row in magnitudes(masks, base)
    ]
    kinds, classes = (list(dict.fromkeys(row[key] for row in rows)) for key in ("kind", "weights"))
    chart = charts.heat(rows, x="weights", y="kind", value="share", step=44)
    shares = [(kind, *(f"{row['share']:.1%}" for row in rows if row["kind"] == kind)) for kind in kinds]
    return Figure(
        f"Zeros by magnitude: {name}",
        "The weights of each matrix from the smallest to the largest, in classes: which share of the zeros is in each. "
        "Zeros drawn at random would be half in the first, 30 % in the second, and so on.",
        charts.svg(chart, f"magnitude{place}", f"Share of zeros by the magnitude of their weights in {name}"),
        Table("Share of the zeros by class of magnitude", ("kind", *classes), shares),
    )


def agreement(masks: Mapping[str, Masks]) -> Section:
    """Return how far every two adapters agree."""
    pairs = agreements(masks)
    rows = [
        row | {"said": plain(f"{row['a']} and {row['b']}: {percent(row['agreement'])}")}
        for row in pairs
        if row["agreement"] == row["agreement"]
    ]
    names = list(masks)
    found = {(row["a"], row["b"]): percent(row["agreement"]) for row in pairs}
    figures = [
        Figure(
            "Every two adapters",
            "The Jaccard index of what is off: |off in both| / |off in one or both|. 100 % is the same mask. Masks "
            "that switch off a share p of the same candidates at random agree by about p / 2: with the default, 0.005 "
            "of all weights and so 0.05 of the candidates, by 2.6 %.",
            charts.svg(charts.table_of_pairs(rows), "agreement", "Agreement of every two adapters") if rows else "",
            Table("Agreement", ("", *names), [(a, *(found[a, b] for b in names)) for a in names]),
        )
    ]
    layers = agreements_by_layer(masks)
    drawn = [row for row in layers if row["layer"] != "-" and row["agreement"] == row["agreement"]]
    if drawn and len({row["pair"] for row in drawn}) <= _PAIRS and len({row["layer"] for row in drawn}) > 1:
        points = [
            row | {"layer": int(row["layer"]), "said": plain(f"{row['pair']}, layer {row['layer']}")} for row in drawn
        ]
        chart = charts.lines(points, x="layer", y="agreement", of="pair", percent=True)
        rows_by_layer = [(row["pair"], row["layer"], percent(row["agreement"])) for row in layers]
        figures.append(
            Figure(
                "Layer by layer",
                "A line a pair.",
                charts.svg(chart, "layers", "Agreement of every two adapters, layer by layer"),
                Table("Agreement by layer", ("pair", "layer", "agreement"), rows_by_layer),
            )
        )
    return Section("agreement", "How they agree", "", figures)


def coding(adapters: Adapters, masks: Mapping[str, Masks]) -> Section:
    """Return what takes the bytes, and how masks are coded."""
    rows, table, codecs = [], [], []
    for name, adapter in adapters.items():
        parts = {row["kind"]: row["bytes"] for row in grouped(adapter.masks, lambda mask: kind_of(mask.name), "kind")}
        beside = sum(held for _, _, held in adapter.beside.values())
        parts |= {"trained beside": beside, "scores": adapter.scores}
        parts["names and the like"] = adapter.file_bytes - sum(parts.values())
        for part, held in parts.items():
            if held > 0:
                said = plain(f"{name}, {part}: {held:,} bytes")
                rows.append({"part": part, "bytes": held, "of": name, "said": said})
                table.append((name, part, f"{held:,}", percent(held / adapter.file_bytes)))
        bits = 8 * adapter.mask_bytes / max(adapter.weights, 1)
        least = f"{masks[name].entropy:.3f}" if name in masks else "-"
        for codec, said in CODEC_NAMES.items():
            own = [mask for mask in adapter.masks if mask.header.codec == codec]
            if own:
                held = f"{sum(mask.bytes for mask in own):,}"
                codecs.append((name, said, f"{len(own):,}", held, f"{bits:.3f}", least))
    chart = charts.bars(rows, x="bytes", y="part", of="of" if len(adapters) > 1 else None)
    heads = ("adapter", "coded as", "masks", "bytes", "bits a weight, of all masks", "entropy")
    return Section(
        "bytes",
        "What takes the bytes",
        "",
        [
            Figure(
                "Parts of the file",
                "adapter_model.safetensors, by what for.",
                charts.svg(chart, "bytes", "Bytes of each part of the file"),
                Table("Bytes by part", ("adapter", "part", "bytes", "of the file"), table),
            ),
            Figure(
                "Ways of coding",
                "Each mask is stored in the shortest of these ways. The entropy is what a code needs at least that "
                "knows the number of zeros in each matrix and nothing of where they are.",
                "",
                Table("How masks are coded", heads, codecs),
            ),
        ],
    )


def training(adapters: Adapters) -> Section | None:
    """Return what trainings have logged; None if no folder holds a log."""
    logged = {name: found for name, adapter in adapters.items() if (found := curves(adapter))}
    figures = []
    for place, key in enumerate(dict.fromkeys(key for found in logged.values() for key in found)):
        rows: list[dict[str, Any]] = [
            {"step": step, "value": value, "of": name, "said": plain(f"{name}, step {step:g}: {value:.6g}")}
            for name, found in logged.items()
            for step, value in found.get(key, [])
        ]
        chart = charts.lines(rows, x="step", y="value", of="of" if len(logged) > 1 else None)
        title = curve_name(key)
        last = ", ".join(f"{found[key][-1][1]:.4g} in {name}" for name, found in logged.items() if key in found)
        figures.append(
            Figure(
                title,
                f"It ends at {last}." if title == key else f"It ends at {last}. The log calls it {key}.",
                charts.svg(chart, f"curve{place}", f"{title} over the steps of training"),
                Table(title, ("adapter", "step", "value"), _points(rows)),
            )
        )
    text = "What Trainer has logged, in trainer_state.json."
    return Section("training", "Training", text, figures) if figures else None


def cards(adapters: Adapters) -> Section | None:
    """Return the adapters' model cards; None if there is none."""
    shown = []
    for name, adapter in adapters.items():
        path = adapter.folder / "README.md"
        if path.is_file():
            with path.open(encoding="utf-8", errors="replace") as file:
                text = file.read(1 << 20)
            shown.append((name, card_html(text)))
    if not shown:
        return None
    from markupsafe import escape

    html = "\n".join(f'<h3>{escape(plain(name))}</h3>\n<div class="card">\n{card}</div>' for name, card in shown)
    return Section("card", "Model card", "As it lies beside the adapter, without its metadata.", [], html)


def _points(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    return [(row["of"], f"{row['step']:g}", f"{row['value']:.6g}") for row in rows[:_ROWS]]


def _off(mask: Matrix) -> str:
    return percent(mask.header.zeros / max(mask.weights, 1))


def _matrices(adapter: Adapter) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [
        (mask.name, layer_of(mask.name), _off(mask), f"{mask.weights:,}", f"{mask.bytes:,}")
        for mask in adapter.masks[:_ROWS]
    ]
    left = len(adapter.masks) - len(rows)
    return rows + ([(f"and {left:,} more", "", "", "", "")] if left else [])
