"""Run several commands in one process, one after the other, as if each were typed.

    python tests/drive.py JOBS.json DONE.json

JOBS.json: a list of {"folder": where it is typed, "argv": [the file, its arguments, ...]}.
DONE.json: for each {"code": exit code, "message": the line it ends with, "traceback": "" or the
traceback, "stdout", "stderr": what it printed, "seconds": of the processor}.  torch and
transformers are imported once for all of them.
"""

import contextlib
import io
import json
import os
import runpy
import sys
import time
import traceback
from pathlib import Path

TEST_FOLDER = str(Path(__file__).resolve().parent)


def run_one(folder, argv):
    """Run the file argv[0] as __main__ in the folder -> what DONE.json says of it."""
    path = str(Path(folder, argv[0]).resolve())
    paths = list(sys.path)
    sys.path[:] = [str(Path(path).parent), *(p for p in paths if p != TEST_FOLDER)]
    sys.modules.pop("common", None)  # each file has the one beside it, or one folder up
    started = time.process_time()
    sys.argv = [path, *argv[1:]]
    os.chdir(folder)
    done = {"code": 0, "message": "", "traceback": ""}
    printed = io.StringIO()
    complaints = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(complaints):
        try:
            runpy.run_path(path, run_name="__main__")
        except SystemExit as end:
            done["code"] = 0 if end.code is None else end.code
            if isinstance(end.code, str):  # python prints it and has exit code 1
                done.update(code=1, message=end.code)
        except BaseException:
            done.update(code=1, traceback=traceback.format_exc())

    # A process that ends lets go of its run folders.
    for descriptor in getattr(sys.modules.get("common"), "_locks", {}).values():
        os.close(descriptor)
    sys.path[:] = paths
    done["seconds"] = time.process_time() - started
    done["stdout"] = printed.getvalue()
    done["stderr"] = complaints.getvalue()
    return done


if __name__ == "__main__":
    jobs = json.loads(Path(sys.argv[1]).read_text())
    out = Path(sys.argv[2]).resolve()
    done = [run_one(job["folder"], job["argv"]) for job in jobs]
    out.write_text(json.dumps(done))
