"""Packaging of audiopress: the repository root *is* the package `audiopress` (see the layout in README.md)."""

from setuptools import setup
from setuptools.command.build_py import build_py

SUBPACKAGES = (
    "kernels",
    "compression",
    "models",
    "data",
    "benchmarks",
    "benchmarks.accuracy",
    "benchmarks.alignment",
    "benchmarks.page",
    "benchmarks.speed",
    "benchmarks.times",
    "benchmarks.words",
)

DEMO = ["gguf>=0.17", "matplotlib>=3.10.7", "tensorboard>=2.16", "rich>=13"]
SPEECH = ["num2words>=0.5.13"]
CHECKS = ["ruff>=0.12", "mypy>=1.13", "pre-commit>=4", "pre-commit-hooks>=5"]
TEST = [*DEMO, *SPEECH, "pytest>=8.3.4", "pytest-xdist>=3.6", "hypothesis>=6.100", *CHECKS]
BENCH = [*DEMO, *SPEECH, "pandas>=2.1", "pycocoevalcap>=1.2", "altair>=6", "vl-convert-python>=1.9"]


class BuildPy(build_py):
    """Leaves the scripts that stand beside the package's `__init__.py` out of it."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        """Gives (package, module, file) of each module."""
        modules = super().find_package_modules(package, package_dir)
        return [m for m in modules if package != "audiopress" or m[1] == "__init__"]


setup(
    name="audiopress",
    version="0.1.0",
    description="Pluggable audio-token compressors for Qwen2.5-Omni: train, time and compare them honestly.",
    license="Apache-2.0",
    python_requires=">=3.10",
    cmdclass={"build_py": BuildPy},
    package_dir={"audiopress": "."},
    packages=["audiopress", *(f"audiopress.{name}" for name in SUBPACKAGES)],
    package_data={
        "audiopress.benchmarks.page": ["page.html", "page.css", "page.js"],
        "audiopress.models": ["weights/*"],
    },
    install_requires=[
        "torch>=2.11",
        "torchvision>=0.26",  # the video processor of transformers resizes frames with it
        "transformers>=5.17,<6",
        "accelerate>=1.10",
        "peft>=0.19.1",
        "timm>=1.0.20",
        "einops>=0.8",
        "triton>=3.6; platform_system == 'Linux'",
        "tokenizers>=0.23",
        "jinja2>=3.1.4",  # the chat templates of transformers
        "numpy>=1.26",
        "scipy>=1.15",
        "av>=14",
        "jiwer>=4",
        "safetensors>=0.8",
        "filelock>=3.15",
        "tqdm>=4.66",
        "pyyaml>=6",
        "pillow>=10",
    ],
    extras_require={"demo": DEMO, "test": TEST, "bench": BENCH},
)
