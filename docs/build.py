"""Pages with the paper on the left and the code on the right: of each method, and of common.py.

    python docs/build.py               make docs/*.html and docs/equations.md
    python docs/build.py --check       exit code 1 if one of them is not what would be made
    python docs/build.py --pictures    first copy the pictures that run_all.sh has left in results/

Equations come from equations/*.toml, pictures from pictures.toml, differences to released code from
released.md, benchmarks from README.md, looks from template.html and style.css.  The right column is
the file, byte for byte; the left one has what its comments and docstrings say, and the equations
that they cite.  A fault in any of these is one line, exit code 1, and no page is written.
"""

import re
import shutil
import sys
import tomllib
from html import escape
from itertools import groupby
from pathlib import Path
from string import Template
from textwrap import dedent

from equation_map import HEAD_OF_MAP, equation_map
from markdown_it import MarkdownIt
from pygments.lexers import PythonLexer
from pygments.token import Token
from sources import ROOT, check_citations, cited_entries, fail, read_paper, read_source

DOCS = ROOT / "docs"
COLOURS = [  # types of tokens, and what stands before and after them: short, there are thousands
    (Token.Literal.String.Doc, "<i>", "</i>"),
    (Token.Comment, "<i>", "</i>"),
    (Token.Literal.String, "<q>", "</q>"),
    (Token.Keyword, "<b>", "</b>"),
]
ROOM = 80  # characters that any line of a comment or a docstring has room for


# ---- The left column


def prose(text, is_top=False):
    """A comment or a docstring as paragraphs; what is set in columns stays so."""
    parts = []
    for chunk in re.split(r"\n\s*\n", text):
        lines = chunk.splitlines()
        in_columns = len(lines) > 1 and re.search(r"[^.:;)\s] {2,}\S", chunk)
        if in_columns or all(line.startswith("    ") for line in lines):
            # At the top of a page commands, equations and functions are there already.
            is_there = re.search(r"^ *(python|torchrun) |Eq\. \d|response_logps: ", chunk, re.M)
            if not (is_top and is_there):
                parts.append(f"<pre>{escape(dedent(chunk))}</pre>")
            continue
        if is_top and chunk.startswith("Contents, "):
            continue
        parts += paragraphs(lines)
    return with_marks("\n".join(parts))


def paragraphs(lines):
    """Lines of prose; those that stand four spaces in, a formula or code, stay as they are."""
    parts = []
    # Where lines hang, as those of parameters do, each that does not starts a paragraph.
    hanging = any(line.startswith("  ") and not stands_apart(line) for line in lines)
    for is_apart, group in groupby(lines, stands_apart):
        group = list(group)
        if is_apart:
            apart = dedent("\n".join(group))
            parts.append(f"<pre>{escape(apart)}</pre>")
            continue
        for i, line in enumerate(group):
            if i == 0 or line.startswith("- ") or (hanging and not line.startswith(" ")):
                parts.append("<p>")
            elif not hanging and is_cut_short(group[i - 1], line):
                parts.append("<p>")
            parts.append(escape(line.strip()))
    return parts


def is_cut_short(line, following):
    """Whether a line ends with its sentence, although the word that follows had room in it."""
    word = following.split()[0]
    return line.endswith(".") and len(line) + 1 + len(word) <= ROOM


def stands_apart(line):
    """Whether a line of prose, which stands four spaces in, is a formula or code."""
    return re.match(r" {4}\S", line) is not None


def with_marks(text):
    """Escaped text with its arrows, and with `names` as code."""
    text = text.replace("-&gt;", "→")
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", text)


def is_definition(source, block):
    """Whether a paragraph begins with a function or a class."""
    return source.lines[block.first - 1].lstrip().startswith(("def ", "class ", "@"))


def equation(entry):
    """An equation under its number, with a link to its paper."""
    paper = entry["paper"]
    number = entry["number"]
    if number and "ours" in paper:
        number = f"our {number}"
    label = ", ".join(x for x in (paper["name"], number, entry.get("section")) if x)
    title = f'<a href="{paper["link"]}">{escape(label)}</a>: {escape(entry["name"])}'
    note = f"<p>{escape(entry['note'])}</p>" if "note" in entry else ""
    return f'<div class="eq"><p>{title}</p>\n{entry["mathml"]}{note}</div>'


def notes(source, block):
    """The left side of a paragraph: its comment or docstring, or what its lines' comments say."""
    parts = []
    if block.heading:
        parts.append(f"<h2>{escape(block.heading)}</h2>")
    if block.id in source.spans and (block.note or is_definition(source, block)):
        parts.append(f"<h3>{block.id}</h3>")
    if block.note:
        parts.append(prose(block.note, block.first == 1))
    # A comment above one field of a class says nothing of the fields below it.
    in_class = re.fullmatch(r"[A-Z]+[a-z]\w*", block.owner)
    if block.remarks and (in_class or not block.note):
        parts.append("<ul>")
        for name, comment in block.remarks:
            label = f"<code>{escape(name)}</code>: " if name else ""
            parts.append(f"<li>{label}{escape(comment)}</li>")
        parts.append("</ul>")
    parts += [equation(entry) for entry in cited_entries(source, block)]
    return "\n".join(parts)


# ---- The right column


def tags(kind, value, is_call, links):
    """What stands before and after a token: a link for a call, an element, or nothing."""
    if is_call and kind in Token.Name and value in links:
        return f'<a href="{links[value]}">', "</a>"
    for coloured, start, stop in COLOURS:
        if kind in coloured and value.strip():
            return start, stop
    return "", ""


def code_of_blocks(source, links):
    """The code of each paragraph as HTML; calls of the functions in links lead to them."""
    text = "".join(source.lines)
    ends = []  # offsets of the paragraphs' ends
    for block in source.blocks:
        length = sum(map(len, source.lines[block.first - 1 : block.end - 1]))
        ends.append(length + (ends[-1] if ends else 0))
    parts = [""] * len(ends)
    i = 0
    before = ""
    for offset, kind, value in PythonLexer().get_tokens_unprocessed(text):
        is_call = text.startswith("(", offset + len(value)) and before not in ("def", "class", ".")
        start, stop = tags(kind, value, is_call, links)
        before = value if value.strip() else before
        # A token may go on in the next paragraph, as white space does.
        while offset + len(value) > ends[i]:
            cut = ends[i] - offset
            parts[i] += start + escape(value[:cut], quote=False) + stop
            offset = ends[i]
            value = value[cut:]
            i += 1
        parts[i] += start + escape(value, quote=False) + stop

    # The tokens of a string have one colour: one element is enough for all of them.
    return [re.sub(r"(?<=<q>)(?:[^<]|</q><q>)*", joined, part) for part in parts]


def joined(found):
    """A match of tokens of one colour as one token."""
    return found[0].replace("</q><q>", "")


# ---- Pages


def contents(source):
    """The functions and classes of a file, under its sections."""
    parts = ["<h2>Functions</h2>\n<ul>"]
    for block in source.blocks:
        if block.heading:
            parts.append(f"</ul>\n<p>{escape(block.heading)}</p>\n<ul>")
        elif block.id in source.spans and "." not in block.id and not block.id.isupper():
            if block.id.startswith("_"):
                continue  # a helper is found where it is called
            line = block.note.partition("\n\n")[0].replace("\n", " ")
            line = line.partition(".  ")[0].rstrip(".")
            line = with_marks(escape(line))
            parts.append(f'<li><a href="#{block.id}">{block.id}</a> {line}</li>')
    return "\n".join(parts) + "\n</ul>"


def figure(picture):
    """The picture of a default run, with its sentence."""
    image = f'<img src="{picture["file"]}" alt="{escape(picture["alt"])}">'
    return f"<figure>{image}\n<figcaption>{escape(picture['sentence'])}</figcaption></figure>"


def top(source, pictures):
    """Above the two columns: the papers, the commands, the picture, the functions."""
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
    links = {block.id: f"common.html#{block.id}" for block in common.blocks}
    links |= {block.id: f"#{block.id}" for block in source.blocks}
    rows = []
    for block, code in zip(source.blocks, code_of_blocks(source, links)):
        anchor = f"<a class=line href=#{block.id}>{block.first}</a>"
        left = f"<div>{anchor}\n{notes(source, block)}</div>"
        right = f"<pre>{code}</pre>"
        rows.append(f"<div class=row id={block.id}>{left}\n{right}</div>")
    return f"{top(source, pictures)}\n<main>\n" + "\n".join(rows) + "\n</main>"


def index(sources, papers, pictures):
    """The body of the first page."""
    parts = ["<main class='wide'>", "<h2>Methods</h2>"]
    for source in sources:
        name = Path(source.path).stem
        first = escape(source.blocks[0].note.partition("\n")[0])
        parts.append(f'<h3><a href="{name}.html">{source.path}</a></h3>\n<p>{first}</p>')
        if name in pictures:
            parts.append(figure(pictures[name]))
    speed = re.search(r"^## Speed.*?(?=^## )", (ROOT / "README.md").read_text(), re.M | re.S)
    if speed is None:
        fail("README.md", "there is no section Speed, whose tables the first page shows")
    released = (DOCS / "released.md").read_text()
    text = f"## Equations\n{equation_map(papers, True)}\n{released}\n{speed[0]}"
    parts.append(MarkdownIt("commonmark").enable("table").render(text))
    return "\n".join(parts) + "</main>"


def build():
    """Everything that is made: {name of the file in docs/: text}."""
    papers = [read_paper(path) for path in sorted((DOCS / "equations").glob("*.toml"))]
    pictures = tomllib.loads((DOCS / "pictures.toml").read_text())
    paths = [f"methods/{name}.py" for name in pictures] + ["common.py"]
    sources = [read_source(path, papers) for path in paths]
    check_citations(sources, papers)

    bodies = {"index": ("Paper and code", index(sources, papers, pictures))}
    for source in sources:
        body = page(source, pictures, sources[-1])
        bodies[Path(source.path).stem] = (source.path, body)
    template = Template((DOCS / "template.html").read_text())
    style = (DOCS / "style.css").read_text()
    made = {"equations.md": f"# Equations\n\n{HEAD_OF_MAP}\n{equation_map(papers, False)}"}
    for name, (title, body) in bodies.items():
        made[f"{name}.html"] = template.substitute(title=title, style=style, body=body)
    return made


def main():
    if "--pictures" in sys.argv:
        for picture in tomllib.loads((DOCS / "pictures.toml").read_text()).values():
            shutil.copy(ROOT / picture["from"], DOCS / picture["file"])
    for name, text in build().items():
        path = DOCS / name
        if "--check" not in sys.argv:
            path.write_text(text)
        elif not path.exists() or path.read_text() != text:
            fail(f"docs/{name}", "differs from its sources: run python docs/build.py")


if __name__ == "__main__":
    main()
