"""Packaging: the repository's `kernels/` folder is installed as `segfast.kernels`."""

from setuptools import setup

setup(
    # An explicit list: `segfast/kernels` is a link to `kernels`, and discovery would find that folder twice.
    packages=[
        "segfast",
        "segfast.data",
        "segfast.kernels",
        "segfast.kernels.configs",
        "segfast.kernels.conv_transpose2d",
        "segfast.models",
        "segfast.nn",
        "segfast.ops",
        "segfast.train",
    ],
    package_dir={"segfast": "segfast", "segfast.kernels": "kernels"},
    package_data={
        "segfast": ["py.typed"],
        "segfast.data": ["*.npz", "*.md"],
        "segfast.kernels": ["py.typed"],
        "segfast.kernels.configs": ["*.json"],
    },
)
