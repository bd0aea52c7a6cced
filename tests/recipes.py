"""Follows the recipes of CONTRIBUTING.md word by word in a new clone: python tests/recipes.py FOLDER

FOLDER is where the clone goes, which must not exist yet. It takes some minutes; tests/test_docs.py only looks at the
files of the recipes.
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILE = re.compile(r"^`(\S+)`:\n\n```(?:python|yaml)\n(.+?)^```$", flags=re.MULTILINE | re.DOTALL)
STEP = re.compile(rf"{FILE.pattern}|^```bash\n(?P<calls>.+?)^```$", flags=re.MULTILINE | re.DOTALL)


def main() -> None:
    clone = Path(sys.argv[1])
    subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
    for step in STEP.finditer((clone / "CONTRIBUTING.md").read_text(encoding="utf-8")):
        if step[1]:
            (clone / step[1]).write_text(step[2], encoding="utf-8")
            print(f"{step[1]} written", flush=True)
            continue
        for call in step["calls"].splitlines():
            print(f"$ {call}", flush=True)
            subprocess.run(["bash", "-c", call], cwd=clone, check=True)


if __name__ == "__main__":
    main()
