"""What build.py makes pages of: papers with their equations, and files with their paragraphs.

Each fault is one line with its place: a formula that cannot be converted, a citation that has no
entry, an entry that is not cited at its place, a file that cannot be split.
"""

import ast
import inspect
import io
import re
import tokenize
import tomllib
from dataclasses import dataclass
from pathlib import Path

from latex2mathml.converter import convert

ROOT = Path(__file__).resolve().parents[1]
SHORT = {"Eqs.": "Eq.", "Figure": "Fig.", "Thm.": "Theorem", "Algorithm": "Alg.", "Tables": "Table"}
NUMBER = r"[A-Z]?\.?\d+(?:\.\d+)?"
THIN_SPACE = '<mspace width="0.167em"></mspace>'
DIRECTIVES = ("isort:", "fmt:", "ruff:")  # comments for tools
GAP = r"[\s#]*"  # a list of numbers may go on in the next comment line
CITATION = re.compile(
    r"\b(Eqs?\.|Theorem|Thm\.|Prop\.|Lemma|Def\.|Alg\.|Algorithm|Fig\.|Figure|Tables?)"
    rf"{GAP}({NUMBER}(?:{GAP}(?:,|and|to|-){GAP}{NUMBER}\b)*)"
)


@dataclass
class Block:
    """A paragraph of a file, from line `first` to before line `end`."""

    id: str  # its anchor
    owner: str  # the function or class it is in, or ""
    first: int
    end: int
    heading: str  # of the section that starts here
    note: str  # what its comment and its docstring say
    remarks: list  # (name, comment) of lines that end in a comment


@dataclass
class Source:
    """A file."""

    path: str
    lines: list
    spans: dict  # of what has a name: (first line, line after, docstring)
    blocks: list
    papers: list  # those it cites; a number is the first one's that has it


def fail(place, problem):
    raise SystemExit(f"{place}: {problem}")


# ---- Papers


def to_mathml(latex, place):
    """Each line of a formula, displayed."""
    formulas = []
    for line in latex.strip().splitlines():
        try:
            formula = convert(line, display="block")
        except Exception as error:  # the library raises many kinds
            fail(place, f"cannot convert {line}: {error!r}")
        if "\\" in formula or line.count("{") != line.count("}"):
            fail(place, f"cannot convert {line}: an unknown command, or braces without their pair")
        formula = formula.replace(' xmlns="http://www.w3.org/1998/Math/MathML"', "")
        factor = r"(</mi>|</msub>|&#x00029;</mo>)(?=<mi>log</mi>)"  # a letter or a parenthesis
        formula = re.sub(factor, rf"\1{THIN_SPACE}", formula)
        formulas.append(formula.replace("<mi>log</mi>", "<mi>log</mi>" + THIN_SPACE))
    return "\n".join(formulas)


def read_paper(path):
    """A paper with its entries: each gets its line and its MathML."""
    name = path.relative_to(ROOT)
    text = path.read_text()
    try:
        paper = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        fail(name, error)
    starts = [n for n, line in enumerate(text.splitlines(), 1) if line == "[[entry]]"]
    for n, entry in zip(starts, paper["entry"]):
        entry["from"] = f"{name}:{n}"
        if ("place" in entry) == ("reason" in entry):
            fail(entry["from"], f"{entry['name']}: a place in the code, or a reason why not")
        entry["mathml"] = to_mathml(entry.get("latex", ""), entry["from"])
        # What its places must cite.
        entry["key"] = entry.get("cite") or entry["number"] or entry.get("section", "")
        entry["lines"] = []  # (source, line) of its places
        entry["paper"] = paper
    return paper


def all_entries(papers):
    """The entries of several papers, in one list."""
    entries = []
    for paper in papers:
        entries += paper["entry"]
    return entries


# ---- Citations


def cited(text):
    """All citations: (offset, "Eq. 4"), one for each number of a list or a range."""
    found = []
    for match in CITATION.finditer(text):
        numbers = re.findall(NUMBER, match[2])
        for low, high in re.findall(rf"(\d+){GAP}(?:-|to){GAP}(\d+)", match[2]):
            numbers += map(str, range(int(low) + 1, int(high)))
        kind = SHORT.get(match[1], match[1])
        found += [(match.start(), f"{kind} {number}") for number in numbers]
    return found


def cited_entries(source, block):
    """The entries that a paragraph cites, and those that have their place in it."""
    text = "".join(source.lines[block.first - 1 : block.end - 1])
    found = []
    for _, number in cited(text):
        for paper in source.papers:
            same = [entry for entry in paper["entry"] if entry["number"] == number]
            found += [entry for entry in same if entry not in found]
            if same:
                break
    for entry in all_entries(source.papers):
        for its_source, line in entry["lines"]:
            here = its_source is source and block.first <= line < block.end
            if here and entry not in found:
                found.append(entry)
    return found


def line_citing(source, name, key):
    """The line of a function, class, constant or __doc__ that cites key; 0 if none does."""
    first, end, docstring = source.spans.get(name, (1, 1, ""))
    found = 0
    for n in range(first, end):
        line = source.lines[n - 1]
        text = "".join(source.lines[n - 1 : n + 1])  # a list may go on in the next line
        numbers = [number for offset, number in cited(text) if offset < len(line)]
        if key in numbers or (key in line and not CITATION.match(key)):
            found = found or n
            if line.strip() not in docstring:
                return n  # at the code
    return found


def check_citations(sources, papers):
    """Every number that is cited has an entry; every entry is cited at its places."""
    for source in sources:
        text = "".join(source.lines)
        known = {entry["number"] for entry in all_entries(source.papers)}
        for offset, number in cited(text):
            if number not in known and source.papers:
                line = text.count("\n", 0, offset) + 1
                fail(f"{source.path}:{line}", f"{number} has no entry in docs/equations")
    modules = {Path(source.path).stem: source for source in sources}
    for entry in all_entries(papers):
        for place in entry.get("place", []):
            module, _, name = place.partition(".")
            line = 0
            if module in modules:
                line = line_citing(modules[module], name, entry["key"])
            if not line:
                fail(entry["from"], f"{entry['name']}: {place} does not cite {entry['key']!r}")
            entry["lines"].append((modules[module], line))


# ---- Files


def add_spans(spans, node, prefix=""):
    """The spans of functions, classes, methods and constants of a module."""
    for child in node.body:
        if isinstance(child, ast.FunctionDef | ast.ClassDef):
            first = min([child.lineno] + [x.lineno for x in child.decorator_list])
            docstring = ast.get_docstring(child, clean=False) or ""
            spans[prefix + child.name] = (first, child.end_lineno + 1, docstring)
            add_spans(spans, child, f"{prefix}{child.name}.")
        elif isinstance(child, ast.Assign) and isinstance(node, ast.Module):
            # Of several names the first.
            name = ast.unparse(child.targets[0]).strip("(").partition(",")[0]
            spans[name] = (child.lineno, child.end_lineno + 1, "")


def read_source(path, papers):
    """Split a file at blank lines and at comments, but not within a string."""
    text = (ROOT / path).read_text()
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        fail(f"{path}:{error.lineno}", f"cannot be split: {error.msg}")
    lines = list(io.StringIO(text))
    own = [paper for paper in papers if path in paper["files"]]
    source = Source(path, lines, {}, [], own)
    add_spans(source.spans, tree)
    docstring = ast.get_docstring(tree, clean=False) or ""
    source.spans["__doc__"] = (1, docstring.count("\n") + 2, docstring)

    within = set()  # lines that begin within a string
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant | ast.JoinedStr):
            within.update(range(node.lineno + 1, node.end_lineno + 1))
    cuts = [1]
    for n in range(2, len(lines) + 1):
        line, before = lines[n - 1].strip(), lines[n - 2].strip()
        new_comment = line.startswith("#") and not before.startswith("#")
        if line and n not in within and (new_comment or not before):
            cuts.append(n)

    comments = {}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.string
    for first, end in zip(cuts, cuts[1:] + [len(lines) + 1]):
        source.blocks.append(make_block(source, comments, first, end))
    return source


def make_block(source, comments, first, end):
    """A paragraph; its comment is its note, or first a heading if a blank line follows it."""
    n = first
    while n < end and source.lines[n - 1].lstrip().startswith("#"):
        n += 1
    # Without the rules around a heading; "--flag" keeps its dashes.
    own = [comments[i].lstrip("#").removeprefix(" ") for i in range(first, n)]
    own = [re.sub(r"^[-=]+( |$)|( |^)[-=]+$", "", line).rstrip() for line in own]
    own = [line for line in own if line and not line.startswith(DIRECTIVES)]
    heading = ""
    stands_alone = n == end or not source.lines[n - 1].strip()
    if own and stands_alone and (len(own) == 1 or "----" in source.lines[first - 1]):
        heading = own.pop(0)
    notes = ["\n".join(own)]
    owner = ""
    for name, (start, stop, docstring) in source.spans.items():
        if start <= min(n, end - 1) < stop and name != "__doc__":
            owner = name
        if first <= start < end:
            notes.append(inspect.cleandoc(docstring))
    count = sum(block.owner == owner for block in source.blocks) + 1
    anchor = owner if owner and count == 1 else f"{owner or 'part'}.{count}"
    block = Block(anchor, owner, first, end, heading, "\n\n".join(notes).strip(), [])
    for i in range(n, end):
        if i in comments:
            line = source.lines[i - 1]
            name = re.match(r'\s*"?([\w.]+)"?(?=[:=]| =)', line)
            # An import: the name of what is imported; of several the name of the module.
            name = name or re.match(r"from \w+ import (\w+)  #", line)
            name = name or re.match(r"from (\w+) import", line)
            remark = (name[1] if name else "", comments[i].lstrip("# "))
            if remark not in block.remarks:
                block.remarks.append(remark)
    return block
