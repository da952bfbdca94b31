"""The pages of docs/: current, complete, valid, readable, and the same in a real browser.

A look at the pages themselves: `chromium --headless --screenshot=page.png docs/dpo.html`.
"""

import html.parser
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("pygments", reason="docs/requirements.txt is not installed")
pytest.importorskip("latex2mathml", reason="docs/requirements.txt is not installed")
pytest.importorskip("markdown_it", reason="docs/requirements.txt is not installed")

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
sys.path.insert(1, str(DOCS))
import sources  # noqa: E402

PAGES = sorted(path for path in DOCS.glob("*.html") if path.name != "template.html")
CODE_PAGES = [path for path in PAGES if path.name != "index.html"]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
LARGEST = 400_000  # bytes of a page, without pictures
EMPTY_LINES = 25  # of code with nothing beside them


def file_of(page):
    """The file that a page shows."""
    name = f"{page.stem}.py"
    return ROOT / name if page.stem == "common" else ROOT / "methods" / name


class Reader(html.parser.HTMLParser):
    """What a page holds: the text of its right column, anchors, links, pictures, headings."""

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.ids, self.links, self.loads, self.alts, self.headings = [], [], [], [], []
        self.code = []
        self.open = []
        self.feed(page.read_bytes().decode())

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        if "id" in attributes:
            self.ids.append(attributes["id"])
        if tag == "a":
            self.links.append(attributes["href"])
        if tag in ("img", "script", "link", "iframe", "source"):
            self.loads.append(attributes.get("src", attributes.get("href", "")))
        if tag == "img":
            self.alts.append(attributes.get("alt", ""))
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if self.open[:5] == ["html", "body", "main", "div", "pre"]:  # a row's notes are in a div
            self.code.append(data)


@pytest.fixture(scope="module")
def readers():
    return {page.name: Reader(page) for page in PAGES}


def test_every_file_has_a_page():
    names = {path.stem for path in (ROOT / "methods").glob("*.py")}
    assert {page.stem for page in PAGES} == names | {"common", "index"}


def test_the_pages_are_what_their_sources_make():
    start = time.time()
    check = [sys.executable, str(DOCS / "build.py"), "--check"]
    found = subprocess.run(check, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert time.time() - start < 20


@pytest.mark.parametrize("page", CODE_PAGES, ids=lambda page: page.stem)
def test_the_right_column_is_the_file(page):
    assert "".join(Reader(page).code).encode() == file_of(page).read_bytes()


@pytest.mark.parametrize("page", CODE_PAGES, ids=lambda page: page.stem)
def test_the_left_column_says_something(page):
    papers = [sources.read_paper(path) for path in sorted((DOCS / "equations").glob("*.toml"))]
    source = sources.read_source(str(file_of(page).relative_to(ROOT)), papers)
    silent = 0
    for block in source.blocks:
        if source.lines[block.first - 1].startswith(("import ", "from ")):
            continue
        silent += block.end - block.first
        if block.heading or block.note or block.remarks:
            silent = 0
        place = f"{source.path}:{block.end - silent}"
        assert silent <= EMPTY_LINES, f"{place}: {silent} lines with nothing beside them"


def test_a_page_needs_nothing_but_itself_and_its_pictures(readers):
    for name, reader in readers.items():
        assert (DOCS / name).stat().st_size <= LARGEST, name
        for target in reader.loads:
            assert (DOCS / target).is_file(), f"{name} loads {target}"
        assert "<script" not in (DOCS / name).read_text()
        assert "@import" not in (DOCS / name).read_text()


def test_pictures_have_words_and_headings_have_an_order(readers):
    for name, reader in readers.items():
        assert all(len(alt) > 30 for alt in reader.alts), name
        assert reader.headings[0] == 1 and reader.headings.count(1) == 1, name
        for before, after in zip(reader.headings, reader.headings[1:]):
            assert after <= before + 1, f"{name}: h{after} after h{before}"


def test_links_within_the_pages_lead_somewhere(readers):
    for name, reader in readers.items():
        assert len(set(reader.ids)) == len(reader.ids), name
        for link in reader.links:
            if link.startswith("https://"):
                continue
            path, _, anchor = link.partition("#")
            path = path or name
            assert path in readers or (DOCS / path).exists(), f"{name}: {link}"
            assert not anchor or anchor in readers[path].ids, f"{name}: {link}"


def test_calls_of_common_lead_to_their_place(readers):
    assert "common.html#response_logps" in readers["dpo.html"].links
    assert "#dpo_loss" in readers["dpo.html"].links


def test_the_map_has_a_row_for_every_entry():
    text = (DOCS / "equations.md").read_text()
    rows = 0
    for path in sorted((DOCS / "equations").glob("*.toml")):
        for entry in sources.read_paper(path)["entry"]:
            rows += 1
            assert entry["name"].replace("^", "\\^") in text
    assert rows > 100
    assert len(re.findall(r"^\| (?!number|---)", text, re.M)) == rows


def listed_numbers(name):
    """The numbers that a paper's rows have, those of a range one by one: {"Eq. 2", "Eq. 3", ...}"""
    numbers = set()
    for entry in sources.read_paper(DOCS / "equations" / f"{name}.toml")["entry"]:
        numbers.add(entry["number"])
        numbers.update(number for _, number in sources.cited(entry["number"]))
    return numbers


PAPERS = {  # the name of a specification: the files with its rows
    "cal_dpo": ("cal_dpo", "dpo"),
    "dpl": ("dpl",),
    "imh_adaptors": ("imh_adaptors",),
    "ranking_accuracy": ("ranking",),
    "twisted_smc": ("twisted_smc",),
}


@pytest.mark.parametrize("name", [name for names in PAPERS.values() for name in names])
def test_the_map_leaves_no_number_out(name):
    """From 1 to the last one that has a row, each equation, figure, table and algorithm has one."""
    numbers = listed_numbers(name)
    for kind in ("Eq.", "Fig.", "Table", "Alg."):
        own = [int(n.split()[1]) for n in numbers if re.fullmatch(rf"{re.escape(kind)} \d+", n)]
        if name == "cal_dpo" and kind == "Eq.":
            own.remove(17)  # of Azar et al.
        missing = set(range(1, max(own, default=0))) - set(own)
        assert not missing, f"{name}: no row for {kind} {sorted(missing)}"


SPECIFICATIONS = ROOT.parent / "shared" / "specs"
WORDS = {  # how specifications write a kind, beside what files may cite
    "Eqs": "Eq.",
    "Figs.": "Fig.",
    "Thm": "Theorem",
    "Corollary": "Cor.",
    "Cor.": "Cor.",
    "Remark": "Remark",
    "Example": "Example",
    **sources.SHORT,
}


def named_numbers(text):
    """What a specification says of a paper's numbered parts: {"Eq. 4", "Remark 2.5", ...}"""
    kinds = r"Eqs?\.?|Theorem|Thms?\.?|Prop\.|Lemma|Cor\.|Corollary|Def\.|Alg\.|Algorithm|Figs?\."
    kinds += r"|Figures?|Tables?|Remark|Example"
    found = set()
    for kind, numbers in re.findall(
        rf"\b({kinds}) ([A-Z]?\.?\d[\d.]*(?:(?:, |–|-|/)(?:[A-Z]\.)?\d+)*)", text
    ):
        single = re.findall(r"[A-Z]?\.?\d+(?:\.\d+)?", numbers)
        for low, high in re.findall(r"(\d+)[–-](\d+)", numbers):
            single += map(str, range(int(low), int(high)))
        found.update(f"{WORDS.get(kind, kind)} {number}" for number in single)
    return found


@pytest.mark.parametrize("name", PAPERS)
def test_the_map_has_what_a_specification_names(name):
    """Each equation, statement, figure and table of the paper has a place or a reason."""
    path = SPECIFICATIONS / f"{name}.md"
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    named = named_numbers(path.read_text())
    assert len(named) > 10 or name == "imh_adaptors"  # of that paper no number is known
    known = set()
    for rows in PAPERS[name]:
        known |= listed_numbers(rows)
    assert named - known == set()


def test_a_missing_number_is_seen():
    named = named_numbers("Tables 2–4, Fig. 2/5, Eqs 11–12, Prop. A.7/A.8, Remark 2.5, Thm 4.1.")
    assert named == {
        *("Table 2", "Table 3", "Table 4", "Fig. 2", "Fig. 5", "Eq. 11", "Eq. 12"),
        *("Prop. A.7", "Prop. A.8", "Remark 2.5", "Theorem 4.1"),
    }


def test_the_map_says_which_numbers_are_ours():
    text = (DOCS / "equations.md").read_text()
    ours = text[text.index("arxiv.org/abs/2406.10203") :]
    ours = ours[: ours.index("\n### ")]
    assert re.findall(r"^\| Eq\. (\d) \(ours\)", ours, re.M) == list("12345")
    assert text.count("(ours)") == 5


def test_the_constant_of_a_proposition_is_the_papers_beside_ours():
    row = re.search(r"^\| Prop\. 2\.6 .*$", (DOCS / "equations.md").read_text(), re.M)[0]
    code = (ROOT / "methods" / "ranking_accuracy.py").read_text()
    comment = re.search(r"# Prop\. 2\.6 .*\n.*", code)[0]
    for text in (row, comment):
        assert "0.6" in text and "log 2" in text


def test_lists_and_ranges_of_numbers_are_citations():
    found = sources.cited("By Eq. 2 and 3, Tables 2,\n# 3 and Eq. 21-23.")
    numbers = [number for _, number in found]
    assert numbers == ["Eq. 2", "Eq. 3", "Table 2", "Table 3", "Eq. 21", "Eq. 23", "Eq. 22"]
    assert sources.cited("Figure 3, Prop. A.7")[1][1] == "Prop. A.7"
    assert sources.cited("Prop. A.7 of Sec. 3") == [(0, "Prop. A.7")]


# ---- Released code and equations


def test_every_difference_to_released_code_is_in_the_table():
    table = (DOCS / "released.md").read_text()
    released = (ROOT / "tests" / "released.py").read_text()
    for name in re.findall(r"^def (\w+)", released, re.M):
        assert f"`{name}`" in table, f"docs/released.md does not name {name} of tests/released.py"


@pytest.mark.parametrize("name", ["docs/released.md", "README.md"])
def test_each_difference_has_a_test_that_exists(name):
    """Every row of a table of differences ends with a link to its test."""
    text = (ROOT / name).read_text()
    rows = []
    table_of = r"^\|(?: here \|)? in the released code \|.*?(?=^$|\Z)"
    for table in re.findall(table_of, text, re.M | re.S):
        rows += table.strip().splitlines()[2:]
    assert len(rows) > 5
    for row in rows:
        found = re.search(r"\[(test_\w+)\]\((?:\.\./)?(tests/\w+\.py)\) \|$", row)
        assert found, f"{name}: no test in the row {row}"
        test, path = found.groups()
        assert f"def {test}(" in (ROOT / path).read_text(), f"{path} has no {test}"


# ---- Faults


@pytest.fixture
def copy(tmp_path):
    """The files that build.py reads, to be broken."""
    for name in ("docs", "methods"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("common.py", "README.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


FAULTS = {  # file, what is replaced in it, by what; the line that is printed
    "a formula": ("docs/equations/dpo.toml", "\\sigma(\\beta h)", "\\sigmoid(x)", "cannot convert"),
    "braces": ("docs/equations/dpo.toml", "\\sigma(\\beta h)", "\\frac{1", "cannot convert"),
    "no toml": ("docs/equations/dpl.toml", "[[entry]]", "[[entry", "dpl.toml"),
    "neither": ("docs/equations/dpo.toml", 'place = ["dpo.Args"]', "", "a reason why not"),
    "no entry": ("methods/dpo.py", "Eq. 7", "Eq. 77", "Eq. 77 has no entry"),
    "no citation": ("docs/equations/dpo.toml", '["dpo.Args"]', '["dpo.evaluate"]', "does not cite"),
    "no function": ("docs/equations/dpo.toml", '["dpo.Args"]', '["dpo.nothing"]', "does not cite"),
    "no split": ("methods/dpo.py", "def main(", "def main(:", "cannot be split"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_one_line_with_its_place_and_nothing_is_written(name, copy):
    path, old, new, message = FAULTS[name]
    text = (copy / path).read_text()
    assert old in text
    (copy / path).write_text(text.replace(old, new, 1))
    for page in (copy / "docs").glob("*.html"):
        if page.name != "template.html":
            page.write_text("old")
    found = subprocess.run(
        [sys.executable, str(copy / "docs" / "build.py")], capture_output=True, text=True
    )
    assert found.returncode == 1
    assert re.match(rf"{path}(:\d+)?: ", found.stderr), found.stderr
    assert message in found.stderr and found.stderr.count("\n") == 1
    assert (copy / "docs" / "dpo.html").read_text() == "old"


def test_a_changed_file_is_noticed(copy):
    file = copy / "methods" / "dpo.py"
    file.write_text(file.read_text() + "# the end\n")
    found = subprocess.run(
        [sys.executable, str(copy / "docs" / "build.py"), "--check"], capture_output=True, text=True
    )
    assert found.returncode == 1
    assert "differs from its sources: run python docs/build.py" in found.stderr


# ---- Readable


def luminance(colour):
    """Relative luminance of #rrggbb, by WCAG."""
    total = 0
    for weight, start in ((0.2126, 1), (0.7152, 3), (0.0722, 5)):
        c = int(colour[start : start + 2], 16) / 255
        total += weight * (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4)
    return total


def test_the_contrast_of_every_colour_is_enough_in_light_and_dark():
    style = (DOCS / "style.css").read_text()
    schemes = re.findall(r":root \{(.*?)\}", style, re.S)
    assert len(schemes) == 2
    for scheme in schemes:
        colours = dict(re.findall(r"--(\w+): (#\w{6});", scheme))
        for name in ("text", "soft", "link", "word", "quote"):
            for back in ("back", "panel"):
                light, dark = sorted([luminance(colours[name]), luminance(colours[back])])[::-1]
                assert (light + 0.05) / (dark + 0.05) >= 4.5, f"{name} on {back}"  # WCAG AA


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_is_valid_html(page):
    html5lib = pytest.importorskip("html5lib", reason="docs/requirements.txt is not installed")
    html5lib.HTMLParser(strict=True).parse(page.read_text())


# ---- In a browser

MEASURE = """
<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>measure</title><body><script>
const found = [];
async function measure(page, width) {
  const frame = document.createElement("iframe");
  frame.style.width = width + "px";
  frame.style.height = "900px";
  frame.style.border = 0;
  const loaded = new Promise(resolve => frame.onload = resolve);
  frame.src = page;
  document.body.append(frame);
  await loaded;
  const doc = frame.contentDocument;
  const formulas = [...doc.querySelectorAll("math")];
  const boxes = formulas.map(f => f.getBoundingClientRect());
  const blocks = [...doc.querySelectorAll("pre, .eq, .row > div, table, p, li, img")];
  const resources = frame.contentWindow.performance.getEntriesByType("resource");
  found.push({
    page: page, width: width,
    formulas: formulas.length,
    without_size: boxes.filter(b => b.width < 1 || b.height < 1).length,
    scroll: doc.documentElement.scrollWidth - frame.clientWidth,
    too_wide: blocks.filter(b => b.scrollWidth > b.clientWidth + 1 && b.clientWidth > 0)
                    .map(b => b.textContent.slice(0, 80)),
    pictures: [...doc.images].filter(i => !i.naturalWidth).length,
    outside: resources.map(r => r.name).filter(name => !name.startsWith("file:")),
  });
  frame.remove();
}
async function all() {
  for (const page of PAGES) for (const width of [390, 1024, 1600]) await measure(page, width);
  const out = document.createElement("pre");
  out.id = "found";
  out.textContent = JSON.stringify(found);
  document.body.append(out);
}
all();
</script></body></html>
"""


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """What Chromium says of every page at three widths, and its console."""
    if CHROMIUM is None:
        pytest.skip("there is no chromium here")
    folder = tmp_path_factory.mktemp("browser")
    script = folder / "measure.html"
    script.write_text(MEASURE.replace("PAGES", json.dumps([page.as_uri() for page in PAGES])))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-sync"]
    command += ["--disable-background-networking", "--disable-component-update"]
    command += ["--allow-file-access-from-files", f"--user-data-dir={folder}/profile"]
    command += ["--enable-logging=stderr", "--virtual-time-budget=60000", "--dump-dom"]
    found = subprocess.run([*command, script.as_uri()], capture_output=True, text=True, timeout=300)
    result = re.search(r'<pre id="found">(.*?)</pre>', found.stdout, re.S)
    assert result, found.stderr[-2000:]
    console = []
    for line in found.stderr.splitlines():
        # Chromium says of its own pages, too, that a font comes late, where the machine is busy.
        if "CONSOLE" in line and "source: chrome://" not in line:
            console.append(line)
    return json.loads(html.unescape(result[1])), console


def test_the_console_is_silent_and_nothing_is_requested_from_outside(measured):
    found, console = measured
    assert not console
    assert len(found) == 3 * len(PAGES)
    assert not [page for page in found if page["outside"]]
    assert not [page for page in found if page["pictures"]]


def test_every_formula_has_a_size(measured):
    found, _ = measured
    assert sum(page["formulas"] for page in found) > 300
    assert not [page for page in found if page["without_size"]]


def test_nothing_scrolls_to_the_side(measured):
    found, _ = measured
    for page in found:
        place = f"{page['page']} at {page['width']} pixels"
        assert page["scroll"] <= 0, place
        assert not page["too_wide"], f"{place}: {page['too_wide'][:3]}"
