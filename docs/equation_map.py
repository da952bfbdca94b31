"""The map of the papers' equations: where each is in the code, or why it is not."""

from pathlib import Path

HEAD_OF_MAP = """Made by build.py from equations/*.toml. A row for every numbered equation,
statement, algorithm, figure and table of the five papers: its place in the code, or why it is not
here. Numbers are the papers'; where they are not known to us, a row has none, or says ours."""


def equation_map(papers, for_page):
    """All equations as tables in Markdown, with links to paragraphs of pages or lines of files."""
    parts = []
    for paper in papers:
        parts.append(f"\n### [{paper['title']}]({paper['link']})\n\n{paper['note']}\n")
        parts.append("| number | what | where |\n|---|---|---|")
        for entry in paper["entry"]:
            where = []
            for source, line in entry["lines"]:
                where.append(f"[{source.path}:{line}]({target(source, line, for_page)})")
            place = ", ".join(where) or f"Not here. {entry['reason']}"
            number = entry["number"] or entry.get("section", "")
            if entry["number"] and "ours" in paper:
                number = f"{number} (ours)"
            what = entry["name"]
            if "note" in entry:
                what = f"{what}. {entry['note']}"
            parts.append(f"| {number} | {what} | {place} |")
    return "\n".join(parts).replace("^", "\\^") + "\n"


def target(source, line, for_page):
    """The address of a line: of its paragraph on the file's page, or in the file."""
    if not for_page:
        return f"../{source.path}#L{line}"
    for block in source.blocks:
        if block.first <= line < block.end:
            return f"{Path(source.path).stem}.html#{block.id}"
