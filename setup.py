"""The optional C++ part; all else is in setup.cfg. Without a compiler the install goes on."""

from glob import glob

from setuptools import Extension, setup

NATIVE = "fastserve_mega/worker/native"

setup(
    ext_modules=[
        Extension(
            "fastserve_mega.worker.native._stage",
            sources=sorted(glob(f"{NATIVE}/*.cpp")),
            depends=sorted(glob(f"{NATIVE}/*.h") + glob(f"{NATIVE}/*.inl")),
            language="c++",
            optional=True,
            extra_compile_args=[
                "-std=gnu++17",
                "-O3",
                "-g0",
                "-Wall",
                "-Wextra",
                "-Wno-psabi",  # vectors are never passed between files
                "-fvisibility=hidden",
                "-fno-math-errno",
                "-fno-strict-aliasing",
                # A row must be rounded alike in every kernel, so that it does not depend on
                # its batch.
                "-ffp-contract=off",
                "-pthread",
            ],
            extra_link_args=["-pthread"],
        )
    ]
)
