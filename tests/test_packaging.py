import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def wheel_names(folder: Path) -> set[str]:
    source = folder / "source"  # a build leaves its traces in the tree
    for name in ("curate", "finetune", "configs"):
        shutil.copytree(ROOT / name, source / name, symlinks=True)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source)]
    subprocess.run(build, check=True, capture_output=True, timeout=120)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as content:
        return set(content.namelist())


def test_the_wheel_holds_both_packages_whole_with_recipes_and_templates_and_nothing_else(tmp_path: Path) -> None:
    names = wheel_names(tmp_path)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"curate", "finetune", "cliptailor"}
    packages = [ROOT / "curate", ROOT / "finetune"]
    assert {str(path.relative_to(ROOT)) for package in packages for path in package.rglob("*.py")} <= names
    assert {"curate/recipes/default.yaml", "curate/py.typed", "finetune/py.typed"} <= names
    assert {"curate/report/report.html.j2", "curate/report/page.css", "curate/report/page.js"} <= names
