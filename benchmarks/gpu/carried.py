"""Says what has to be carried to the GPU machine, and checks that all of it is there.

python benchmarks/gpu/carried.py list REQUIREMENTS...    # those that machine.txt does not have
python benchmarks/gpu/carried.py check                   # imports, the needs of the wheels, and the size
"""

import ast
import sys
import zipfile
from email.parser import Parser
from pathlib import Path
from subprocess import check_output

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HERE = Path(__file__).parent
CARRIED = HERE.parents[1] / ".gpu"
LIMIT = 64  # MiB, of the checkout and what is carried together
PYTHON = {"python_version": "3.12", "python_full_version": "3.12.3", "sys_platform": "linux", "extra": ""}
# Where the module of a package in machine.txt has another name than the package.
MODULES = {"pillow": ["PIL"], "pyyaml": ["yaml"], "pytorch-lightning": ["pytorch_lightning", "lightning_fabric"]}
OPTIONAL = {"wandb", "submitit", "pillow_heif"}  # imported only under a logger, a launcher and for HEIC images
# Needs of carried packages that nothing here imports (pyproject.toml leaves them out too).
UNUSED = {("gym", "gym-notices"), ("gym", "gym_notices"), ("learn2learn", "gsutil"), ("learn2learn", "qpth")}


def machine() -> set[str]:
    """The names of the packages that the machine has already."""
    lines = (line.split("#")[0].strip() for line in (HERE / "machine.txt").read_text().splitlines())
    return {canonicalize_name(Requirement(line).name) for line in lines if line}


def missing(files: list[str]) -> list[str]:
    """The pinned requirements in the files that the machine lacks; CUDA's own libraries come with its torch."""
    lines = (line.strip() for file in files for line in Path(file).read_text().splitlines())
    wanted = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return [
        f"{package.name}{package.specifier}"
        for package in wanted
        if (package.marker is None or package.marker.evaluate(PYTHON))
        and canonicalize_name(package.name) not in machine()
        and not package.name.startswith("nvidia-")
    ]


def check() -> None:
    """
    Raises:
        SystemExit: an import, a wheel's need or a file is not there, or it does not fit.
    """
    there, modules, needs = machine(), set(), []
    for wheel in sorted((CARRIED / "wheels").glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
            modules |= {
                name.split("/")[0].removesuffix(".py").split(".")[0] for name in names if ".dist-info" not in name
            }
            metadata = next(name for name in names if name.endswith(".dist-info/METADATA"))
            about = Parser().parsestr(archive.read(metadata).decode())
        there.add(canonicalize_name(about["Name"]))
        needs += [(about["Name"], Requirement(need)) for need in about.get_all("Requires-Dist", [])]
    faults = [
        f"{name} needs {need}, which is neither carried nor on the machine"
        for name, need in needs
        if (need.marker is None or need.marker.evaluate(PYTHON))
        and canonicalize_name(need.name) not in there
        and (name, need.name) not in UNUSED
    ]
    modules |= set(sys.stdlib_module_names)
    for name in machine():
        modules |= set(MODULES.get(name, [name.replace("-", "_")]))
    sources = [HERE.parents[1] / "train.py", *(HERE.parents[1] / "src").rglob("*.py"), *HERE.parent.rglob("*.py")]
    own = {"fewshot", *(source.stem for source in sources)}
    for source in sources:
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            else:
                continue
            absent = {name.split(".")[0] for name in names} - modules - own - OPTIONAL
            faults += [f"{source.relative_to(HERE.parents[1])} imports {name}, which is nowhere" for name in absent]
    tree = check_output(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=HERE, text=True)
    files = [HERE / name for name in tree.split("\0") if name] + [file for file in CARRIED.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files if file.exists()) / 2**20
    if size > LIMIT:
        faults.append(f"{size:.0f} MiB with the checkout, above {LIMIT}")
    if faults:
        raise SystemExit("\n".join(sorted(set(faults))))
    print(
        f".gpu: {len(list((CARRIED / 'wheels').iterdir()))} wheels, {size:.0f} MiB with the checkout; all imports found"
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["list"]:
        print("\n".join(missing(sys.argv[2:])))
    elif sys.argv[1:] == ["check"]:
        check()
    else:
        raise SystemExit(__doc__)
