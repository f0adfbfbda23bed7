"""The optional C++ part; all else is in setup.cfg. Without a compiler the install goes on."""

from glob import glob

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

NATIVE = "fastserve_mega/worker/native"


class BuildLibrary(build_ext):
    """Names the library alike for every Python: it is loaded by ctypes and knows none."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"


class PlatformWheel(bdist_wheel):
    """Makes one wheel for all versions of Python on this platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


setup(
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel},
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
    ],
)
