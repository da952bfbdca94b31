"""The contract of every file: how it reads, its docstring, options, presets, and what it shares.

`python tests/test_contract.py [FILE ...]` prints the figures of a file and its densest places.
"""

import ast
import difflib
import importlib
import os
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
METHODS = sorted((ROOT / "methods").glob("*.py"))
FILES = [ROOT / "common.py", *METHODS]
SIBLINGS = ["cal_dpo.py", "dpo_gamma.py"]  # what dpo.py is without their equation
STAGES = ("sft", "generate")  # the stages before and after the papers' equations

# What model code of the field holds (CleanRL, nanoGPT, blackjax), measured in the same way.
MOST = {
    "nodes a statement": 8.5,
    "largest statement": 40,
    "nodes a line": 8.0,
    "expression depth": 3.4,
    "comprehensions per 100 lines": 5,
    "nested comprehensions": 0,
    "conditional expressions per 100 lines": 2,
    "lambdas per 100 lines": 0.3,
    "targets of 3 and more per 100 lines": 1,
    "parallel assignments per 100 lines": 1,
    "statements of a function": 60,
    "names of a function": 30,
    "options of a command": 32,
}
LEAST_COMMENTS = 6  # comment lines of their own per 100 code lines

NOT_COUNTED = (ast.expr_context, ast.operator, ast.unaryop, ast.boolop, ast.cmpop)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
NOT_CODE = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
NOT_OWN = ("body", "orelse", "finalbody", "handlers", "annotation", "returns")


def own_expressions(statement):
    """The expressions of one statement, without those of the statements inside it."""
    found = []
    for field, value in ast.iter_fields(statement):
        if field in NOT_OWN:
            continue
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, ast.expr):
                found.append(item)
            elif isinstance(item, ast.withitem):
                found.append(item.context_expr)
            elif isinstance(item, ast.keyword):
                found.append(item.value)
            elif isinstance(item, ast.arguments):
                found += [x for x in item.defaults + item.kw_defaults if x is not None]
    return found


def is_docstring(statement):
    value = getattr(statement, "value", None)
    return (
        isinstance(statement, ast.Expr)
        and isinstance(value, ast.Constant)
        and isinstance(value.value, str)
    )


def is_table(statement):
    """A constant in capitals: what it holds is data, not a step of the program."""
    target = statement.targets[0] if isinstance(statement, ast.Assign) else None
    return isinstance(target, ast.Name) and target.id.isupper()


def size(statement):
    """Syntax nodes of a statement; a compound one counts its header only."""
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return 2
    nodes = [node for e in own_expressions(statement) for node in ast.walk(e)]
    return 1 + sum(not isinstance(node, NOT_COUNTED) for node in nodes)


def depth(node):
    inner = max([depth(child) for child in ast.iter_child_nodes(node)], default=0)
    return inner + isinstance(node, ast.expr)


def is_nested(node):
    """A comprehension with two `for`, or with another comprehension inside."""
    inner = [x for x in ast.walk(node) if isinstance(x, COMPREHENSIONS) and x is not node]
    return len(node.generators) > 1 or bool(inner)


def code_and_comment_lines(path, tree):
    """Numbers of lines with code (no docstrings), and of lines with nothing but a comment."""
    code, comments = set(), set()
    with open(path, "rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.type == tokenize.COMMENT:
                comments.add(token.start[0])
            elif token.type not in (*NOT_CODE, tokenize.ENCODING):
                code.update(range(token.start[0], token.end[0] + 1))
    for statement in ast.walk(tree):
        if isinstance(statement, ast.stmt) and is_docstring(statement):
            code -= set(range(statement.lineno, statement.end_lineno + 1))
    return len(code), len(comments - code)


def count_options(tree):
    """Options of the largest command: the fields of a class whose name holds Args."""
    counts = [0]
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and "Args" in node.name:
            counts.append(sum(isinstance(field, ast.AnnAssign) for field in node.body))
    return max(counts)


def function_size(function):
    """Statements in it, and names it takes or makes."""
    inside = [x for x in ast.walk(function) if isinstance(x, ast.stmt) and not is_docstring(x)]
    names = {x.arg for x in ast.walk(function) if isinstance(x, ast.arg)}
    for node in ast.walk(function):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return len(inside) - 1, len(names)


def figures(path):
    """The figures of MOST for a file, its comment lines per 100, and its worst places."""
    tree = ast.parse(path.read_text())
    statements = [x for x in ast.walk(tree) if isinstance(x, ast.stmt) and not is_docstring(x)]
    code, comments = code_and_comment_lines(path, tree)
    sizes = [size(s) for s in statements]
    depths = [max(map(depth, own_expressions(s))) for s in statements if own_expressions(s)]
    nodes = [node for s in statements for e in own_expressions(s) for node in ast.walk(e)]
    comprehensions = [x for x in nodes if isinstance(x, COMPREHENSIONS)]
    assignments = [s for s in statements if isinstance(s, ast.Assign)]
    tuples = [s for s in assignments if isinstance(s.targets[0], ast.Tuple)]
    functions = [x for x in ast.walk(tree) if isinstance(x, ast.FunctionDef)]
    plain = [(size(s), s.lineno) for s in statements if not is_table(s)]
    found = {
        "nodes a statement": sum(sizes) / len(sizes),
        "largest statement": max(plain)[0],
        "nodes a line": sum(sizes) / code,
        "expression depth": sum(depths) / len(depths),
        "comprehensions per 100 lines": 100 * len(comprehensions) / code,
        "nested comprehensions": sum(map(is_nested, comprehensions)),
        "conditional expressions per 100 lines": 100
        * sum(isinstance(x, ast.IfExp) for x in nodes)
        / code,
        "lambdas per 100 lines": 100 * sum(isinstance(x, ast.Lambda) for x in nodes) / code,
        "targets of 3 and more per 100 lines": 100
        * sum(len(s.targets[0].elts) > 2 for s in tuples)
        / code,
        "parallel assignments per 100 lines": 100
        * sum(isinstance(s.value, ast.Tuple) for s in tuples)
        / code,
        "statements of a function": max([function_size(f)[0] for f in functions], default=0),
        "names of a function": max([function_size(f)[1] for f in functions], default=0),
        "options of a command": count_options(tree),
    }
    places = [f"{path.name}:{line}: {n} nodes" for n, line in sorted(plain)[-5:][::-1]]
    for function in functions:
        inside, names = function_size(function)
        if inside > 60 or names > 30:
            places.append(f"{path.name}:{function.lineno}: {inside} statements, {names} names")
    for s in statements:
        if any(
            isinstance(x, COMPREHENSIONS) and is_nested(x)
            for e in own_expressions(s)
            for x in ast.walk(e)
        ):
            places.append(f"{path.name}:{s.lineno}: nested comprehension")
    return found, 100 * comments / code, places


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_file_is_plain(path):
    found, comments, places = figures(path)
    too_much = {name: value for name, value in found.items() if value > MOST[name]}
    assert not too_much, "\n".join([str(too_much), *places])
    assert comments >= LEAST_COMMENTS, f"{comments:.1f} comment lines per 100 code lines"


def test_the_figures_see_density():
    """Folded code is told from plain code: each figure answers to the fault it stands for."""
    folded = ROOT / "tests" / "test_contract.py"
    tree = ast.parse("x, y, z = [a for a in b for c in a], 1 if x else 2, lambda: 0")
    statement = tree.body[0]
    assert size(statement) == 21
    assert depth(statement.value) == 3
    assert is_nested(statement.value.elts[0])
    assert code_and_comment_lines(folded, ast.parse(folded.read_text()))[0] > 100


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=" ".join)
def test_ruff(command):
    ruff = [sys.executable, "-m", "ruff", *command, "."]
    done = subprocess.run(ruff, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]


@pytest.mark.parametrize("path", METHODS, ids=lambda p: p.stem)
def test_docstring_and_launcher(path):
    text = path.read_text()
    tree = ast.parse(text)
    doc = ast.get_docstring(tree)
    assert "arxiv.org/abs/" in doc and f"python methods/{path.name}" in doc
    assert "Eq." in doc or path.stem in STAGES
    assert len(doc.splitlines()) <= 35
    assert path.name in (ROOT / "README.md").read_text()
    assert path.name in (ROOT / "run_all.sh").read_text()
    assert text.count("sys.path.insert(1, str(Path(__file__).resolve().parents[1]))") == 1
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert [f.name for f in functions if not ast.get_docstring(f) and f.name != "main"] == []


REFERENCE = re.compile(
    r"\b(Eq\.|Theorem|Prop\.|Alg\.) ?([A-Z]?\.?\d+(?:\.\d+)?)(?:(?:-| and |, )(\d+))?"
)


def references(text):
    """The numbered equations, theorems and propositions that a text names: {("Eq.", "7"), ...}"""
    found = set()
    for kind, number, last in REFERENCE.findall(text):
        found.add((kind, number))
        if last and number.isdigit():
            for n in range(int(number), int(last) + 1):
                found.add((kind, str(n)))
    return found


@pytest.mark.parametrize("path", METHODS, ids=lambda p: p.stem)
def test_every_equation_of_the_docstring_is_found_in_the_code(path):
    """Searching the file for `Eq. 7` leads from the docstring to the line that computes it."""
    doc, code = path.read_text().split('"""', 2)[1:]
    assert references(doc) - references(code) == set()


def options_of(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and "Args" in node.name:
            for item in node.body:
                if isinstance(item, ast.AnnAssign):
                    yield item


@pytest.mark.parametrize("path", METHODS, ids=lambda p: p.stem)
def test_every_option_is_used(path):
    """An option that is parsed and never read is worse than a missing one."""
    text = path.read_text()
    common = (ROOT / "common.py").read_text()
    for item in options_of(ast.parse(text)):
        name = item.target.id
        used = re.search(rf"args\.{name}\b", text) or re.search(rf'"{name}"', common)
        assert used, f"{path.name}: --{name} is never read"


def printed_help(path, *command):
    """What `python methods/X.py [command] --help` prints, wide enough that no option is folded."""
    environment = dict(os.environ, COLUMNS="400", TERM="dumb")
    help_of = [sys.executable, str(path), *command, "--help"]
    done = subprocess.run(help_of, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def unexplained(printed):
    """The options of a printed help that come without a word of explanation."""
    blocks = re.split(r"^│ (?=-)", printed, flags=re.M)[1:]
    found = []
    for block in blocks:
        option = block.split()[0].rstrip(",")
        text = "  ".join(line.strip("│ ") for line in block.splitlines() if line[:1] not in "╭╰")
        text = re.sub(r"\((default|repeatable|required)[^()]*(\([^()]*\)[^()]*)*\)", "", text)
        explained = re.split(r"\s{2,}|(?<=[A-Z\]}]) (?=[a-z0-9(])", text.strip(), maxsplit=1)
        if len(explained) < 2 or not re.search("[a-z]{2}", explained[1]):
            found.append(option)
    return found


@pytest.mark.parametrize("path", METHODS, ids=lambda p: p.stem)
def test_help_explains_every_option(path):
    """Read from what --help prints, of every command of the file."""
    first = printed_help(path)
    commands = re.search(r"usage: \S+ \[-h\] \{([\w,-]+)\}", first)
    if commands is None:
        assert unexplained(first) == []
        return
    for command in commands[1].split(","):
        assert unexplained(printed_help(path, command)) == [], command


def test_an_option_without_help_is_seen():
    """The check of printed help fails on a bare option, and passes one with a word."""
    box = "│ --beta FLOAT  strength (default: 0.1) │\n│ --thin INT    (default: 1)   │\n"
    assert unexplained(box) == ["--thin"]


@pytest.mark.parametrize("path", METHODS, ids=lambda p: p.stem)
def test_presets_are_listed(path):
    module = importlib.import_module(path.stem)
    for preset in getattr(module, "PRESETS", {}):
        assert re.search(rf"\b{re.escape(preset)}\b", module.__doc__), (
            f"{preset}: not in the docstring"
        )


def method_statements(name):
    """The statements of a method file without its docstring and its presets, in order, as text."""
    text = (ROOT / "methods" / name).read_text()
    found = []

    def walk(body):
        for statement in body:
            if is_docstring(statement) or is_table(statement):
                continue
            lines = ast.unparse(statement).splitlines()
            inner = getattr(statement, "body", [])
            found.append(lines[0] if inner else " ".join(lines))
            walk(inner)
            for handler in getattr(statement, "handlers", []):
                walk(handler.body)
            walk(getattr(statement, "orelse", []))

    walk(ast.parse(text).body)
    return found


@pytest.mark.parametrize("name", SIBLINGS)
def test_the_diff_is_the_paper(name):
    """A replaced statement counts once."""
    old, new = method_statements("dpo.py"), method_statements(name)
    changes = difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
    changed = sum(max(i2 - i1, j2 - j1) for tag, i1, i2, j1, j2 in changes if tag != "equal")
    diff = [line for line in difflib.ndiff(old, new) if line[:2] in ("- ", "+ ")]
    assert changed <= 45, "\n".join([str(changed), *diff])


def test_training_loops_are_copies():
    """From the first optimiser step to the checkpoint, the four files are the same by letter."""

    def loop(name):
        text = (ROOT / "methods" / name).read_text()
        return text[text.index("grad_norm = clip_gradients") : text.index("raise SystemExit(143)")]

    assert loop("sft.py") == loop("dpo.py")
    assert loop("cal_dpo.py") == loop("dpo.py")
    assert loop("dpo_gamma.py") == loop("dpo.py")


SECTIONS = [
    "log-probabilities",
    "sampling",
    "tokenization",
    "data",
    "models",
    "the tiny world",
    "processes",
]


def test_common_has_its_sections():
    """In the order in which a reader of a paper needs them, each with the reasons at its head."""
    text = (ROOT / "common.py").read_text()
    assert re.findall(r"^# ---- (.+)$", text, flags=re.M) == SECTIONS
    contents = ast.get_docstring(ast.parse(text))
    for section in SECTIONS:
        assert section in contents, f"{section}: not in the table of contents"
        head = text.split(f"# ---- {section}\n", 1)[1]
        reasons = re.match(r"(\s*#.*\n)+", head)[0].strip().splitlines()
        assert 3 <= len(reasons) <= 10, f"{section}: {len(reasons)} lines say why it is as it is"


def test_common_is_shared():
    """A public function of common.py serves a method, or a function that does."""
    tree = ast.parse((ROOT / "common.py").read_text())
    texts = {path.name: path.read_text() for path in METHODS}
    public = [
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    ]
    own = (
        ROOT / "common.py"
    ).read_text() + "tokenize_pair"  # of one row: for those who carry it away
    unused = []
    for name in public:
        callers = [file for file, text in texts.items() if re.search(rf"\b{name}\b", text)]
        if not callers and len(re.findall(rf"\b{name}\b", own)) < 2:
            unused.append(name)
    assert unused == []


def test_requirements_are_pinned():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pins = [line for line in lines if line and line[0] != "#"]
    assert all(re.fullmatch(r"[a-z-]+==[\d.]+", line) for line in pins)
    assert "torch==2.13.0" in pins


if __name__ == "__main__":
    for path in [Path(name) for name in sys.argv[1:]] or FILES:
        found, comments, places = figures(path)
        print(f"{path}: {comments:.0f} comment lines per 100 ({LEAST_COMMENTS})")
        for name, value in found.items():
            mark = "  <-- too much" if value > MOST[name] else ""
            print(f"    {name:38} {value:6.2f} ({MOST[name]}){mark}")
        print("   ", "\n    ".join(places))
