"""Building the library and the distributions: what is compiled when, and what is said where it cannot be."""

import shutil
import tarfile
from fnmatch import fnmatchcase

import pytest
from installed import EXTENSION, PACKAGE, ROOT, SUFFIX, needs_compiler, run_python, write

needs_ninja = pytest.mark.skipif(shutil.which("ninja") is None, reason="needs ninja")


def build(tree, **environment):
    return run_python("setup.py", "-q", "build_ext", cwd=tree, **environment)


def last_error(result):
    """The message after `error: `, all its lines."""
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    return ("\n" + result.stderr).rpartition("\nerror: ")[2]


SOURCES = """
import runpy, setuptools
setuptools.setup = lambda **_: None
build = runpy.run_path("setup.py")
print(*build["cpp_sources"](), *build["cpu_kernels"](), *build["find_sources"](build["AMX_KERNELS"]), *sum(build["cuda_sources"](), []))
"""


def test_every_source_is_compiled_and_nothing_of_the_simulated_device():
    result = run_python("-c", SOURCES, cwd=ROOT)
    compiled = result.stdout.split()
    sources = {path.relative_to(ROOT) for suffix in ("cpp", "cu") for path in ROOT.glob(f"csrc/**/*.{suffix}")}
    assert sorted(compiled) == sorted(str(path) for path in sources if path.parts[1] != "simt"), result.stderr


def test_wheel_and_sdist_have_the_marker_of_type_annotations(source_tree):
    (source_tree / "densenet_ext" / "__init__.py").touch()
    shutil.copy(PACKAGE / "py.typed", source_tree / "densenet_ext")
    result = run_python("setup.py", "-q", "build_py", "--build-lib", "lib", "sdist", cwd=source_tree)
    assert (source_tree / "lib" / "densenet_ext" / "py.typed").exists(), result.stderr
    (sdist,) = (source_tree / "dist").iterdir()
    with tarfile.open(sdist) as archive:
        assert f"{sdist.name.removesuffix('.tar.gz')}/densenet_ext/py.typed" in archive.getnames()


# the environment, in which a path starts with the tree's; files in the tree; the error
FAILURES = {
    "no compiler": (
        {"CXX": "/nonexistent/g++"},
        {},
        "the C++ compiler '/nonexistent/g++' cannot be run: set CXX to the path of a C++17 compiler, or unset it\n",
    ),
    "compiler too old": (
        {"CXX": "{tree}/old"},
        {"old": '#!/bin/sh\ncase "$*" in *--version*) echo "g++ 4.8.5";; *) exit 1;; esac\n'},
        "g++ 4.8.5 does not compile C++17: install g++ 9, clang 10 or newer and set CXX to it\n",
    ),
    "torch too old": (
        {"PYTHONPATH": "{tree}/path"},
        {"path/torch/__init__.py": "", "path/torch/version.py": "__version__ = '2.9.1'\ncuda = None\n"},
        "PyTorch 2.11 or newer is needed, but this is 2.9.1: pip install --upgrade torch\n",
    ),
    "an error in a source": (
        {"MAX_JOBS": "1"},
        {"csrc/cpu/kernels/broken.cpp": "int f() { return missing; }\n"},
        "compiling csrc/cpu/kernels/broken.cpp for baseline failed:\n*missing*please report this*",
    ),
    "out of memory": (
        {"CXX": "{tree}/killed"},
        {"csrc/a.cpp": "", "killed": '#!/bin/sh\ncase "$*" in *-MMD*) kill -9 $$;; esac\nexec c++ "$@"\n'},
        "*MAX_JOBS=1*",
    ),
    "MAX_JOBS": ({"MAX_JOBS": "all"}, {}, "MAX_JOBS must be a whole number, but is 'all'\n"),
}


@needs_compiler
@needs_ninja
@pytest.mark.parametrize(("environment", "files", "message"), FAILURES.values(), ids=FAILURES)
def test_build_that_fails(source_tree, environment, files, message):
    write(source_tree, files)
    environment = {name: value.format(tree=source_tree) for name, value in environment.items()}
    error = last_error(build(source_tree, **environment))
    assert fnmatchcase(error, message), error


def without_ninja(tree):
    """The environment of a machine that has compilers, but not ninja."""
    tools = tree / "tools"
    tools.mkdir()
    for name in ("g++", "c++", "as", "ld", "collect2"):
        if path := shutil.which(name):
            (tools / name).symlink_to(path)
    write(tree, {"hidden/ninja.py": "raise ImportError\n"})
    return {"PYTHONPATH": str(tree / "hidden"), "PATH": str(tools)}


@needs_compiler
@pytest.mark.parametrize("ninja", [pytest.param(True, marks=needs_ninja), False])
def test_header_rebuilds_what_includes_it_and_nothing_else(source_tree, ninja):
    environment = {} if ninja else without_ninja(source_tree)
    header = source_tree / "csrc" / "a.h"
    write(source_tree, {"csrc/a.h": "", "csrc/a.cpp": '#include "a.h"\n', "csrc/cpu/kernels/b.cpp": ""})

    first = build(source_tree, **environment)
    assert first.returncode == 0, first.stderr
    assert ("pip install ninja" in first.stdout) == (not ninja)
    assert "compiling csrc/a.cpp\n" in first.stdout and f"linking _C{SUFFIX}\n" in first.stdout
    sets = EXTENSION.build_info()["instruction_sets"]
    for name in set(sets) - {"amx"}:  # which has files of its own
        assert f"compiling csrc/cpu/kernels/b.cpp for {name}\n" in first.stdout
    second = build(source_tree, **environment).stdout
    assert "compiling" not in second and "linking" not in second
    header.write_text("int f() { return missing; }\n")
    error = last_error(build(source_tree, **environment))
    assert error.startswith("compiling csrc/a.cpp failed:\n") and "missing" in error
    header.write_text("int f();\n")
    third = build(source_tree, **environment).stdout
    assert "compiling csrc/a.cpp\n" in third and "linking" in third and "b.cpp" not in third


@needs_compiler
@needs_ninja
def test_build_for_the_cpu_alone(source_tree):
    broken = "#error must not be compiled\n"
    write(source_tree, {"csrc/cuda/kernels/a.cu": broken, "csrc/cuda/a.cpp": broken})
    result = build(source_tree, DENSENET_EXT_CUDA="0")
    assert result.returncode == 0, result.stderr
    assert "CUDA kernels: none, switched off by DENSENET_EXT_CUDA=0\n" in result.stdout
    built = [path.name for path in source_tree.glob("build/lib*/densenet_ext/*.so")]
    assert built == [f"_C{SUFFIX}"]
