"""Pages with the paper on the left and the code on the right: of each method, and of common.py.

    python docs/build.py            make docs/*.html and docs/equations.md
    python docs/build.py --check    exit code 1 if one of them is not what would be made
    python docs/build.py --pictures    first copy the pictures that run_all.sh has left in results/

Equations come from equations/*.toml, pictures from pictures.toml, differences to released code from
released.md, benchmarks from README.md, looks from template.html and style.css.  The right column is
the file, byte for byte; the left one has what its comments and docstrings say, and the equations
that they cite.  A fault in any of these is one line with its place, exit code 1, and no page is
written.
"""

import re
import shutil
import sys
import tomllib
from html import escape
from pathlib import Path
from string import Template

from markdown_it import MarkdownIt
from pygments.lexers import PythonLexer
from pygments.token import Token
from sources import ROOT, check_citations, cited_entries, fail, read_paper, read_source

DOCS = ROOT / "docs"
COLOURS = {  # the class of a type of tokens
    "d": Token.Literal.String.Doc,
    "c": Token.Comment,
    "s": Token.Literal.String,
    "k": Token.Keyword,
}


# ---- The left column


def prose(text, without_columns=False):
    """A comment or a docstring as paragraphs; what is set in columns stays so, or is left out."""
    parts = []
    for chunk in re.split(r"\n\s*\n", text):
        lines = chunk.splitlines()
        in_columns = len(lines) > 1 and re.search(r"[^.:;)\s] {2,}\S", chunk)
        if in_columns or all(line.startswith("    ") for line in lines):
            if not without_columns:
                parts.append(f"<pre>{escape(chunk)}</pre>")
            continue
        # A line after an indented one starts a new paragraph, and so does a list item.
        hanging = any(line.startswith("  ") for line in lines)
        for i, line in enumerate(lines):
            if i == 0 or line.startswith("- ") or (hanging and not line.startswith(" ")):
                parts.append("<p>")
            parts.append(escape(line.strip()))
    text = "\n".join(parts).replace("-&gt;", "→")
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", text)


def equation(entry):
    """An equation under its number, with a link to its paper."""
    paper = entry["paper"]
    number = f"our {entry['number']}" if "ours" in paper and entry["number"] else entry["number"]
    label = ", ".join(x for x in (paper["name"], number, entry.get("section")) if x)
    title = f'<a href="{paper["link"]}">{escape(label)}</a>: {escape(entry["name"])}'
    note = f"<p>{escape(entry['note'])}</p>" if "note" in entry else ""
    return f'<div class="eq"><p>{title}</p>\n{entry["mathml"]}{note}</div>'


def notes(source, block):
    """The left side of a paragraph."""
    parts = []
    if block.heading:
        parts.append(f"<h2>{escape(block.heading)}</h2>")
    if block.id in source.spans and block.note:
        parts.append(f"<h3>{block.id}</h3>")
    if block.note:
        parts.append(prose(block.note, block.first == 1))
    elif block.remarks:
        parts.append("<ul>")
        for name, comment in block.remarks:
            label = f"<code>{escape(name)}</code>: " if name else ""
            parts.append(f"<li>{label}{escape(comment)}</li>")
        parts.append("</ul>")
    parts += [equation(entry) for entry in cited_entries(source, block)]
    return "\n".join(parts)


# ---- The right column


def code_of_blocks(source, links):
    """The code of each paragraph as HTML; calls of the functions in links lead to them."""
    text = "".join(source.lines)
    ends = []  # offsets
    for block in source.blocks:
        ends.append(len("".join(source.lines[: block.end - 1])))
    parts = [""] * len(ends)
    i = 0
    before = ""
    for offset, kind, value in PythonLexer().get_tokens_unprocessed(text):
        is_call = text[offset + len(value) :].startswith("(") and before not in ("def", "class", ".")
        if kind in Token.Name and is_call and value in links:
            start, stop = f'<a href="{links[value]}">', "</a>"
        else:
            start, stop = "", ""
            for name, coloured in COLOURS.items():
                if kind in coloured and value.strip():
                    start, stop = f'<span class="{name}">', "</span>"
                    break
        # A token may go on in the next paragraph, as white space does.
        while offset + len(value) > ends[i]:
            cut = ends[i] - offset
            parts[i] += start + escape(value[:cut], quote=False) + stop
            offset, value = ends[i], value[cut:]
            i += 1
        parts[i] += start + escape(value, quote=False) + stop
        before = value if value.strip() else before
    return parts


# ---- Pages


def first_line(note):
    """What a docstring says first."""
    line = note.partition("\n")[0].partition(".  ")[0]
    return escape(line.removesuffix(".") + (" ..." if line[-1:] not in ".)" else ""))


def contents(source):
    """The functions and classes of a file, under its sections."""
    parts = ["<h2>Functions</h2>\n<ul>"]
    for block in source.blocks:
        if block.heading:
            parts.append(f"</ul>\n<p>{escape(block.heading)}</p>\n<ul>")
        elif block.id in source.spans and "." not in block.id and not block.id.isupper():
            parts.append(f'<li><a href="#{block.id}">{block.id}</a> {first_line(block.note)}</li>')
    return "\n".join(parts) + "\n</ul>"


def figure(picture):
    """The picture of a default run, with its sentence."""
    image = f'<img src="{picture["file"]}" alt="{escape(picture["alt"])}">'
    return f"<figure>{image}\n<figcaption>{escape(picture['sentence'])}</figcaption></figure>"


def top(source, pictures):
    """Above the two columns: the paper, the commands, the picture, the functions."""
    parts = []
    for paper in source.papers:
        parts.append(f'<p><a href="{paper["link"]}">{escape(paper["title"])}</a><br>')
        parts.append(f"{escape(paper['authors'])}. {escape(paper['note'])}</p>")
    commands = re.findall(r"^ {4}((?:python|torchrun) .*)$", source.blocks[0].note, re.M)
    if commands:
        parts.append(f"<pre>{escape(chr(10).join(commands))}</pre>")
    name = Path(source.path).stem
    if name in pictures:
        parts.append(figure(pictures[name]))
    parts.append(f"<nav>{contents(source)}</nav>")
    return "<div class='top'>" + "\n".join(parts) + "</div>"


def page(source, pictures, common):
    """The body of a file's page."""
    links = {}
    for name in common.spans:
        links[name] = f"common.html#{name}"
    for name in source.spans:
        links[name] = f"#{name}"
    rows = []
    for block, code in zip(source.blocks, code_of_blocks(source, links)):
        anchor = f'<a class="line" href="#{block.id}">{block.first}</a>'
        left = f'<div class="notes">{anchor}\n{notes(source, block)}</div>'
        row = f'<div class="row" id="{block.id}">{left}\n<pre><code>{code}</code></pre></div>'
        rows.append(row)
    return f"{top(source, pictures)}\n<main>\n" + "\n".join(rows) + "\n</main>"


def equation_map(papers, for_page):
    """The table of all equations, in Markdown: links to paragraphs of pages, or to lines of files."""
    parts = []
    for paper in papers:
        parts.append(f"\n### [{paper['title']}]({paper['link']})\n\n{paper['note']}\n")
        parts.append("| number | what | where |\n|---|---|---|")
        for entry in paper["entry"]:
            where = []
            for source, line in entry["lines"]:
                block = [b for b in source.blocks if b.first <= line < b.end][0]
                target = f"../{source.path}#L{line}"
                if for_page:
                    target = f"{Path(source.path).stem}.html#{block.id}"
                where.append(f"[{source.path}:{line}]({target})")
            place = ", ".join(where) or f"Not here. {entry['reason']}"
            number = entry["number"] or entry.get("section", "")
            parts.append(f"| {number} | {entry['name']} | {place} |")
    return "\n".join(parts).replace("^", "\\^") + "\n"


def index(sources, papers, pictures):
    """The body of the first page."""
    parts = ["<main class='wide'>", "<h2>Methods</h2>"]
    for source in sources:
        name = Path(source.path).stem
        first = escape(source.blocks[0].note.partition("\n")[0])
        parts.append(f'<h3><a href="{name}.html">{source.path}</a></h3>\n<p>{first}</p>')
        if name in pictures:
            parts.append(figure(pictures[name]))
    readme = (ROOT / "README.md").read_text()
    speed = re.search(r"^## Speed.*?(?=^## )", readme, re.M | re.S)
    if speed is None:
        fail("README.md", "there is no section Speed")
    released = (DOCS / "released.md").read_text()
    text = f"## Equations\n{equation_map(papers, True)}\n{released}\n{speed[0]}"
    parts.append(MarkdownIt("commonmark").enable("table").render(text))
    return "\n".join(parts) + "</main>"


def build():
    """Everything that is made: {path: text}."""
    papers = [read_paper(path) for path in sorted((DOCS / "equations").glob("*.toml"))]
    pictures = tomllib.loads((DOCS / "pictures.toml").read_text())
    paths = [f"methods/{name}.py" for name in pictures] + ["common.py"]
    sources = [read_source(path, papers) for path in paths]
    check_citations(sources, papers)
    template = Template((DOCS / "template.html").read_text())
    style = (DOCS / "style.css").read_text()

    made = {"equations.md": f"# Equations\n\nMade by build.py.\n{equation_map(papers, False)}"}
    body = index(sources, papers, pictures)
    made["index.html"] = template.substitute(title="Paper and code", style=style, body=body)
    for source in sources:
        body = page(source, pictures, sources[-1])
        name = f"{Path(source.path).stem}.html"
        made[name] = template.substitute(title=source.path, style=style, body=body)
    return made


def main():
    if "--pictures" in sys.argv:
        for picture in tomllib.loads((DOCS / "pictures.toml").read_text()).values():
            shutil.copy(ROOT / picture["from"], DOCS / picture["file"])
    made = build()
    for name, text in made.items():
        path = DOCS / name
        if "--check" not in sys.argv:
            path.write_text(text)
        elif not path.exists() or path.read_text() != text:
            fail(f"docs/{name}", "differs from its sources: run python docs/build.py")


if __name__ == "__main__":
    main()
