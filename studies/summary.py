"""What the runs in a folder have shown: a table on the screen, and index.html with every figure.

    python studies/summary.py                    of results/, which run_all.sh fills

Each run ends with its claim: what the paper says, what this run shows, where the files are. They
are read from the claim.txt of the runs, and the seconds from the last line of their log.txt.
"""

import html
import re
from dataclasses import dataclass
from pathlib import Path

import tyro

TITLE = "What the default runs show"
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }
img { max-width: 100%; }
td, th { padding: 0.2rem 0.8rem; text-align: left; vertical-align: top; }
pre { overflow-x: auto; font-size: 0.8rem; }
"""


@dataclass
class Args:
    folder: str = "results"  # whose sub-folders hold runs


@dataclass
class Run:
    """What a finished run left."""

    name: str  # of its folder, below that of all runs
    folder: Path
    paper: str  # what the paper says
    verdict: str  # holds, does not hold, too few to tell
    shown: str  # the sentence after the verdict, without the number
    number: str  # with its interval
    log: list  # the lines that it printed


def read_run(folder, claim):
    """The Run of a claim.txt; None if it is not one."""
    lines = claim.read_text().splitlines()
    found = re.fullmatch(r"here:  ([\w ]+): (.*) \((.*)\)", lines[1]) if len(lines) == 2 else None
    if found is None:
        return None
    log = claim.parent / "log.txt"
    printed = log.read_text().splitlines() if log.exists() else []
    name = str(claim.parent.relative_to(folder))
    return Run(name, claim.parent, lines[0].removeprefix("paper: "), *found.groups(), printed)


def print_table(runs):
    """A line for each run: name, verdict, number, seconds."""
    print(f"\n{'run':28} {'claim':16} {'number [95 % interval]':36} time")
    for run in runs:
        seconds = run.log[-1] if run.log else ""
        print(f"{run.name:28} {run.verdict:16} {run.number:36} {seconds}")


def section(run, folder):
    """The HTML of one run: its claim, its figures, the end of what it printed."""
    parts = [f"<h2 id='{html.escape(run.name)}'>{html.escape(run.name)}</h2>"]
    parts.append(f"<p>The paper: {html.escape(run.paper)}.</p>")
    sentence = f"{run.shown} ({run.number})"
    parts.append(f"<p>Here: <b>{html.escape(run.verdict)}</b>: {html.escape(sentence)}.</p>")
    for figure in sorted((run.folder / "figures").glob("*.png")):
        place = html.escape(str(figure.relative_to(folder)))
        parts.append(f"<p><img src='{place}' alt='{html.escape(sentence)}'></p>")
    if run.log:
        end = html.escape("\n".join(run.log[-40:]))
        parts.append(f"<details><summary>The end of its log</summary><pre>{end}</pre></details>")
    return "\n".join(parts)


def main(args):
    folder = Path(args.folder)
    runs = []
    for claim in sorted(folder.rglob("claim.txt")):
        run = read_run(folder, claim)
        if run is not None:
            runs.append(run)
    if not runs:
        raise SystemExit(f"{folder}: no finished runs; bash run_all.sh makes them")
    print_table(runs)

    # The page: a table of all claims, then the runs.
    rows = []
    for run in runs:
        cells = [f"<a href='#{html.escape(run.name)}'>{html.escape(run.name)}</a>"]
        for text in (run.verdict, run.shown, run.number):
            cells.append(html.escape(text))
        rows.append("<tr><td>" + "</td><td>".join(cells) + "</td></tr>")
    head = "<tr><th>run</th><th>claim</th><th>what it shows</th><th>number</th></tr>"
    page = [
        "<!doctype html>",
        f"<html lang='en'><head><meta charset='utf-8'><title>{TITLE}</title>",
        f"<style>{STYLE}</style></head><body>",
        f"<h1>{TITLE}</h1>",
        "<p>The tiny world is made up; none of these numbers is a result of the papers.</p>",
        f"<table>{head}{''.join(rows)}</table>",
    ]
    for run in runs:
        page.append(section(run, folder))
    page.append("</body></html>")
    (folder / "index.html").write_text("\n".join(page))
    print(f"all figures with their sentences: {folder / 'index.html'}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
