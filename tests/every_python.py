"""Sample one bundle with the base install, from a wheel, on every Python >= 3.10 found here, and compare the bytes."""

import hashlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = shutil.ignore_patterns(".*", "*.egg-info", "build", "dist", "runs", "demo")
VERSION = "import sys; print(*sys.version_info[:3], sep='.')"
CHECK = """
import importlib.metadata as m, importlib.util as u, pathlib, sys, ddpm_mlp_pipeline as package
assert pathlib.Path(package.__file__).is_relative_to(sys.prefix), package.__file__
assert not [name for name in ("torch", "diffusers", "onnx") if u.find_spec(name)]
print(f"numpy {m.version('numpy')}, onnxruntime {m.version('onnxruntime')}")
"""


def call(*argv: object, cwd: Path) -> str:
    return subprocess.run([str(word) for word in argv], cwd=cwd, check=True, stdout=subprocess.PIPE, text=True).stdout


def find_pythons(folder: Path) -> dict[str, str]:
    """Return the path of each Python version on the PATH or in pyenv, in ascending order."""
    paths = [shutil.which(name) for name in ("python3", *(f"python3.{minor}" for minor in range(10, 30)))]
    paths += sorted(Path.home().glob(".pyenv/versions/3.*/bin/python"))
    found = {}
    for path in filter(None, paths):
        result = subprocess.run([path, "-c", VERSION], cwd=folder, capture_output=True, text=True)
        if result.returncode == 0:  # pyenv has shims also for versions that are not selected, which fail
            found.setdefault(result.stdout.strip(), str(path))
    versions = {tuple(map(int, version.split("."))): path for version, path in found.items()}
    return {".".join(map(str, key)): versions[key] for key in sorted(versions) if key >= (3, 10)}


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        shutil.copytree(ROOT, folder / "source", ignore=LEFT_OUT)
        call(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder, folder / "source", cwd=folder)
        (wheel,) = folder.glob("*.whl")
        heart = ROOT / "ddpm_mlp_pipeline" / "checkpoints" / "heart"
        options = ("--scheduler", "ddpm", "--num_inference_steps", 50)
        call(Path(sys.executable).parent / "ddpm-export", heart, "bundle", *options, cwd=folder)
        checksums = {}
        for version, python in find_pythons(folder).items():
            venv = folder / f"venv-{version}"
            call(python, "-m", "venv", venv, cwd=folder)
            call(venv / "bin" / "python", "-m", "pip", "install", "--quiet", wheel, cwd=folder)
            call(
                venv / "bin" / "ddpm-sample", "bundle", "--num_samples", 1000, "--output", f"{version}.npy", cwd=folder
            )
            checksums[version] = hashlib.sha256((folder / f"{version}.npy").read_bytes()).hexdigest()
            versions = call(venv / "bin" / "python", "-c", CHECK, cwd=folder).strip()
            print(f"Python {version}, {versions}: SHA-256 {checksums[version][:16]}…", flush=True)
    if len(set(checksums.values())) != 1:
        sys.exit("error: the samples are not the same")
    print(f"{len(checksums)} versions of Python, the same samples byte for byte: {', '.join(checksums)}")


if __name__ == "__main__":
    main()
