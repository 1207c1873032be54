"""Sends every hostile adapter through every door, and says what became of it."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from attacks.cases import Case
from attacks.doors import DOORS, Attacker, Outcome, describe, is_clear
from attacks.victim import CODECS, quiet, save_adapter

# Peak memory an attempt may take: a fixed part, mostly what PEFT and transformers take for any adapter of this model,
# and a few copies of the file, which they read whole. What a file claims has no part in it.
FIXED, COPIES = 64 << 20, 3


def attempts(cases: Iterable[Case], doors: Iterable[str] = tuple(DOORS)) -> Iterator[tuple[Case, str, Outcome]]:
    """Try every case by every door; the outcome's problems tell what is not as the case says it is."""
    before = tempfile.tempdir
    with tempfile.TemporaryDirectory() as name:
        top = Path(name)
        good = {codec: save_adapter(top / "good" / codec, codec, seed=1) for codec in CODECS}
        attacker = Attacker(save_adapter(top / "victim", seed=2))
        (top / "bad").mkdir()
        tempfile.tempdir = str(top / "bad")  # so that files left there are seen
        try:
            for case in cases:
                folder = top / "bad" / "adapter"
                shutil.rmtree(folder, ignore_errors=True)
                shutil.copytree(good[case.codec], folder)
                with quiet():
                    case.change(folder)
                size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
                for door in doors:
                    outcome = attacker.attack(DOORS[door], folder)
                    outcome.problems = _judged(case, door, outcome, size)
                    yield case, door, outcome
        finally:
            tempfile.tempdir = before


def _judged(case: Case, door: str, outcome: Outcome, size: int) -> list[str]:
    if door in case.rewrites:  # that it does is known, and written down; if it no longer does, that should be, too
        rewrites = any("base weights" in problem for problem in outcome.problems)
        return [] if rewrites else ["no longer changes the base weights: say so in SECURITY.md and in the table"]
    problems, error = list(outcome.problems), outcome.error
    loads = dict(case.loads)
    if error is None and door not in loads:
        problems.append("silently accepted")
    elif error is not None and door in loads and not case.or_refused:
        problems.append(f"refused, though {loads[door]}: {describe(error)}")
    elif error is not None and not is_clear(error) and not isinstance(error, dict(case.raises).get(door, ())):
        problems.append(f"refused unclearly: {describe(error)}")
    if outcome.peak > FIXED + COPIES * size:
        problems.append(f"took {outcome.peak:,} bytes, for files of {size:,}")
    return problems


def report(cases: Iterable[Case]) -> bool:
    """Print a line for each problem, and the counts; whether there was no problem."""
    refused = loaded = rewritten = problems = worst = 0
    errors: Counter[str] = Counter()
    for case, door, outcome in attempts(cases):
        worst = max(worst, outcome.peak)
        if outcome.error is None:
            loaded += 1
        else:
            refused += 1
            errors[describe(outcome.error).partition(":")[0]] += 1
        rewritten += door in case.rewrites
        for problem in outcome.problems:
            problems += 1
            print(f"{case.name} by {door}: {problem}", flush=True)
    print(f"{refused + loaded} attempts: {refused} refused, {loaded} loaded and harmless or known, {problems} problems")
    print(f"{rewritten} of them by a door of transformers' that lets a file change the base, see SECURITY.md")
    print(f"most memory taken at a time, beyond what was before: {worst / (1 << 20):.0f} MiB")
    for name, count in errors.most_common():
        print(f"{count:6} x {name}")
    return problems == 0
