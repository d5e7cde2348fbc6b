"""Packaging: the repository's `kernels/` folder is installed as `segfast.kernels`."""

from setuptools import find_packages, setup

setup(
    # `segfast/kernels` is a link to `kernels`: leave it out, or that folder is found twice.
    packages=[
        *find_packages(include=["segfast", "segfast.*"], exclude=["segfast.kernels", "segfast.kernels.*"]),
        "segfast.kernels",
        *(f"segfast.kernels.{name}" for name in find_packages("kernels")),
    ],
    package_dir={"segfast": "segfast", "segfast.kernels": "kernels"},
    package_data={
        "segfast": ["py.typed", "measured/*.json"],
        "segfast._profile": ["*.html"],
        "segfast.data": ["*.npz", "*.safetensors", "*.jpg", "*.md"],
        "segfast.kernels": ["py.typed"],
    },
)
