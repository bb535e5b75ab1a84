"""The shape of the package, read from its sources: imports point one way, config fields are used,
names are documented.

Each rule is a function from the sources to a list of complaints; it runs on the package, where the
list must be empty, and on crafted bad sources, where it must complain.
"""

import ast
import collections
import functools
import graphlib
import importlib
import pathlib
import subprocess
import sys
from collections.abc import Iterator
from typing import NamedTuple

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / "llama_jax"

# From the ground up. A module imports lower floors or, inside a package, its neighbours.
FLOORS = (
    ("errors", "axes", "formatting"),
    ("storage",),
    ("text", "config"),
    ("presets", "accounting", "data", "parallel"),
    ("weights", "model"),
    ("generation",),
    ("training",),
    ("planning",),
    ("cli",),
    ("__main__",),
)
HEIGHT = {unit: height for height, units in enumerate(FLOORS) for unit in units}

# What starts without JAX: these modules and all that they import. `--help` and errors in a config
# depend on it.
WITHOUT_JAX = (
    *(
        "errors",
        "storage",
        "config",
        "presets",
        "accounting",
        "text",
        "data",
        "training.config",
        "cli.arguments",
    ),
    *("planning.plan", "planning.speed", "planning.cost_model", "model.remat"),
)
JAX_LIBRARIES = frozenset({"jax", "jaxlib", "flax", "optax", "orbax", "chex"})
# `jaxtyping` brings JAX along when one of these is looked up; its shapes of NumPy arrays do not.
JAX_NAMES = frozenset({"jaxtyping.Array", "jaxtyping.PyTree"})

# Modules that run code found in a file, or bring such a thing along.
BANNED_MODULES = frozenset(
    {
        "pickle",
        "_pickle",
        "cPickle",
        "cloudpickle",
        "dill",
        "joblib",
        "marshal",
        "shelve",
        "torch",
        "transformers",
    }
)
BANNED_CALLS = frozenset(
    {
        "eval",
        "exec",
        "__import__",
        "yaml.load",
        "yaml.load_all",
        "yaml.full_load",
        "yaml.unsafe_load",
        "torch.load",
        "os.system",
        "os.popen",
    }
)
BANNED_KEYWORDS = frozenset({"trust_remote_code", "shell", "allow_pickle"})

# What belongs to `cli` alone: printing, arguments, the environment.
PROGRAM_CALLS = frozenset({"print", "input", "os.getenv", "sys.exit"})
PROGRAM_NAMES = frozenset({"os.environ", "sys.argv", "sys.stdout", "sys.stderr", "sys.stdin"})
PROGRAM_MODULES = frozenset({"argparse", "jsonargparse", "click", "fire"})


class Import(NamedTuple):
    """One imported module or name, as far as the source tells: `from a.b import c` is `a.b.c`."""

    name: str
    line: int


Sources = dict[
    str, ast.Module
]  # module name without "llama_jax." -> its tree; the root package itself is ""


@functools.cache
def package() -> Sources:
    """The sources of llama_jax."""
    trees = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        trees[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(
            path.read_text("utf8"), str(path)
        )
    return trees


def parsed(**texts: str) -> Sources:
    """Crafted sources; `model__llama` stands for the module `model.llama`."""
    return {
        name.replace("__", ".") if not name.startswith("__") else name: ast.parse(text)
        for name, text in texts.items()
    }


# --- reading imports ---


def imports(tree: ast.Module) -> Iterator[Import]:
    """All imports of a module, also those inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = "." * node.level + (node.module or "")
            yield from (
                Import(f"{origin}.{alias.name}" if node.module else origin, node.lineno)
                for alias in node.names
            )


def own_imports(sources: Sources, module: str) -> Iterator[Import]:
    """Modules of the package that `module` imports, named as in `sources`; the root package is
    "".
    """
    for name, line in imports(sources[module]):
        root, _, rest = name.partition(".")
        if root == "llama_jax":
            known = rest in sources or rest.count(".") == 0
            yield Import(rest if known else rest.rpartition(".")[0], line)


def unit(module: str) -> str:
    """The package or top-level module to which a module belongs."""
    return module.partition(".")[0]


def dotted(node: ast.AST) -> str:
    """`a.b.c` for a chain of attributes on a name, else an empty string."""
    if isinstance(node, ast.Attribute):
        owner = dotted(node.value)
        return f"{owner}.{node.attr}" if owner else ""
    return node.id if isinstance(node, ast.Name) else ""


def at(module: str, line: int) -> str:
    """Where, for a reader."""
    return f"llama_jax.{module}:{line}"


# --- rules ---


def relative_imports(sources: Sources) -> list[str]:
    """Imports are absolute, so that a reader (and these rules) can follow them."""
    return [
        at(m, i.line)
        for m, tree in sources.items()
        for i in imports(tree)
        if i.name.startswith(".")
    ]


def homeless_modules(sources: Sources) -> list[str]:
    """A new package or top-level module must be given a floor."""
    return [f"llama_jax.{m} stands on no floor" for m in sources if m and unit(m) not in HEIGHT]


def upward_imports(sources: Sources) -> list[str]:
    """A module imports lower floors or its own package; from the root package nothing but the
    version.
    """
    complaints = []
    for module in filter(None, sources):
        here = unit(module)
        for target, line in own_imports(sources, module):
            there = unit(target)
            allowed = there in (here, "__version__") or HEIGHT.get(there, len(FLOORS)) < HEIGHT.get(
                here, -1
            )
            if not allowed:
                complaints.append(f"{at(module, line)} imports {target}")
    return complaints


def import_rings(sources: Sources) -> list[str]:
    """No module imports itself by way of others."""
    graph = {
        m: {i.name for i in own_imports(sources, m) if i.name in sources} - {m, ""}
        for m in sources
        if m
    }
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return [" -> ".join(error.args[1])]
    return []


def reached(sources: Sources, start: str) -> set[str]:
    """The modules of the package that importing `start` runs, as far as plain imports go."""
    found, todo = set(), {start}
    while todo:
        module = todo.pop()
        found.add(module)
        todo |= {i.name for i in own_imports(sources, module) if i.name in sources} - found
    return found


def jax_where_none_may_be(sources: Sources) -> list[str]:
    """The modules of `WITHOUT_JAX`, and all that they import, leave JAX alone."""
    starts = [m for m in sources if m in WITHOUT_JAX or unit(m) in WITHOUT_JAX]
    modules = set().union(*(reached(sources, m) for m in starts))
    found = [(m, i) for m in sorted(modules) for i in imports(sources[m])]
    return [
        f"{at(m, i.line)} imports {i.name}"
        for m, i in found
        if unit(i.name) in JAX_LIBRARIES or i.name in JAX_NAMES
    ]


def undocumented(sources: Sources) -> list[str]:
    """Public modules, classes, functions and methods without a docstring."""
    return [
        complaint
        for m, tree in sources.items()
        for complaint in _undocumented(tree, f"llama_jax.{m}".rstrip("."))
    ]


def _undocumented(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str
) -> Iterator[str]:
    if not ast.get_docstring(node):
        yield name
    members = node.body if isinstance(node, ast.Module | ast.ClassDef) else []
    for child in members:
        if isinstance(
            child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        ) and not child.name.startswith("_"):
            yield from _undocumented(child, f"{name}.{child.name}")


def dangerous(sources: Sources) -> list[str]:
    """Code that could run what a file contains."""
    return [
        f"{at(m, line)} has {what}"
        for m, tree in sources.items()
        for what, line in _dangerous(tree)
    ]


def _dangerous(tree: ast.Module) -> Iterator[tuple[str, int]]:
    yield from (
        (i.name, i.line)
        for i in imports(tree)
        if unit(i.name) in BANNED_MODULES or i.name in BANNED_CALLS
    )
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            harmless = [
                k.arg
                for k in node.keywords
                if isinstance(k.value, ast.Constant) and k.value.value is False
            ]
            keywords = [
                k.arg for k in node.keywords if k.arg in BANNED_KEYWORDS and k.arg not in harmless
            ]
            yield from ((str(keyword), node.lineno) for keyword in keywords)
            if dotted(node.func) in BANNED_CALLS:
                yield dotted(node.func), node.lineno


def program_manners(sources: Sources) -> list[str]:
    """Printing, arguments and the environment below `cli`."""
    below = [m for m in sources if unit(m) not in ("cli", "__main__")]
    return [
        f"{at(m, line)} has {what}" for m in below for what, line in _program_manners(sources[m])
    ]


def _program_manners(tree: ast.Module) -> Iterator[tuple[str, int]]:
    yield from (
        (i.name, i.line)
        for i in imports(tree)
        if unit(i.name) in PROGRAM_MODULES or i.name in PROGRAM_NAMES
    )
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and dotted(node.func) in PROGRAM_CALLS:
            yield dotted(node.func), node.lineno
        if isinstance(node, ast.Attribute) and dotted(node) in PROGRAM_NAMES:
            yield dotted(node), node.lineno


def dataclasses_of(sources: Sources) -> dict[str, ast.ClassDef]:
    """All dataclasses of the package by name."""
    classes = [
        n for tree in sources.values() for n in ast.walk(tree) if isinstance(n, ast.ClassDef)
    ]
    return {c.name: c for c in classes if any("dataclass" in ast.dump(d) for d in c.decorator_list)}


def config_classes(sources: Sources) -> list[ast.ClassDef]:
    """Dataclasses named `*Config` and those that their fields are made of, the sections of a
    training config.
    """
    known = dataclasses_of(sources)
    found: dict[str, ast.ClassDef] = {}
    todo = [name for name in known if name.endswith("Config")]
    while todo:
        name = todo.pop()
        found[name] = known[name]
        words = {
            w.id
            for _, kind in fields(known[name])
            for w in ast.walk(kind)
            if isinstance(w, ast.Name)
        }
        todo += [word for word in words if word in known and word not in found]
    return list(found.values())


def fields(cls: ast.ClassDef) -> list[tuple[str, ast.expr]]:
    """Names and annotations of a dataclass' fields."""
    return [
        (s.target.id, s.annotation)
        for s in cls.body
        if isinstance(s, ast.AnnAssign) and isinstance(s.target, ast.Name)
    ]


def attribute_reads(node: ast.AST) -> collections.Counter[str]:
    """How often each `x.name` is read."""
    found = (
        n.attr
        for n in ast.walk(node)
        if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)
    )
    return collections.Counter(found)


def unread_fields(sources: Sources) -> list[str]:
    """Config fields that nothing outside their own class looks at: an option without an effect."""
    complaints, everywhere = [], sum(map(attribute_reads, sources.values()), collections.Counter())
    for cls in config_classes(sources):
        read = everywhere - attribute_reads(cls)  # what is read in the class alone is gone
        complaints += [
            f"{cls.name}.{name} is never read" for name, _ in fields(cls) if name not in read
        ]
    return complaints


def always_slow(function: ast.FunctionDef) -> bool:
    """Whether all of a test is marked slow: the function, or every case of one of its lists of
    parameters.
    """
    for decorator in function.decorator_list:
        if dotted(decorator) == "pytest.mark.slow":
            return True
        if (
            isinstance(decorator, ast.Call)
            and dotted(decorator.func) == "pytest.mark.parametrize"
            and len(decorator.args) > 1
        ):
            cases = decorator.args[1]
            if (
                isinstance(cases, ast.List | ast.Tuple)
                and cases.elts
                and all("slow" in ast.unparse(c) for c in cases.elts)
            ):
                return True
    return False


def slow_alone(sources: Sources) -> list[str]:
    """Files of tests of which `make test` runs none: what they promise would be tested by nothing
    that runs for a change.
    """
    complaints = []
    for name, tree in sources.items():
        tests = [
            n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name.startswith("test_")
        ]
        marks = [
            ast.unparse(n.value)
            for n in tree.body
            if isinstance(n, ast.Assign) and ast.unparse(n).startswith("pytestmark")
        ]
        if any("mark.slow" in mark for mark in marks) or all(map(always_slow, tests)):
            complaints.append(f"{name} has no test that is not slow")
    return complaints


# --- the package keeps the rules ---

RULES = (
    relative_imports,
    homeless_modules,
    upward_imports,
    import_rings,
    jax_where_none_may_be,
    undocumented,
    dangerous,
    program_manners,
    unread_fields,
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_package_keeps(rule):
    assert rule(package()) == []


def test_package_is_read_whole():
    assert {"", "config", "presets", "accounting", "model", "text"} <= set(package())
    assert {c.name for c in config_classes(package())} >= {"LlamaConfig", "RopeScaling"}


def test_every_file_of_tests_has_a_quick_one():
    """Those of other machines run apart."""
    tests = PACKAGE.parent / "tests"
    files = [
        path for path in sorted(tests.rglob("test_*.py")) if path.parent.name not in ("gpu", "tpu")
    ]
    assert len(files) > 150
    texts = {str(path.relative_to(tests)): path.read_text("utf8") for path in files}
    assert [name for name, text in texts.items() if "\ndef test_" not in text] == []
    assert (
        slow_alone({name: ast.parse(text) for name, text in texts.items() if "slow" in text}) == []
    )


# --- the rules notice ---

BAD = [
    (relative_imports, {"model__llama": "from . import rope"}),
    (relative_imports, {"model__llama": "from ..config import LlamaConfig"}),
    (homeless_modules, {"utils": ""}),
    (homeless_modules, {"helpers__text": ""}),
    (upward_imports, {"config": "import llama_jax.presets"}),
    (upward_imports, {"presets": "from llama_jax import accounting", "accounting": ""}),
    (
        upward_imports,
        {"weights__gguf": "from llama_jax.model.llama import Llama", "model__llama": ""},
    ),
    (upward_imports, {"model__llama": "from llama_jax.weights import load"}),
    (
        upward_imports,
        {"model__llama": "def f():\n  from llama_jax.generation.sampling import sample"},
    ),
    (upward_imports, {"generation__generate": "import llama_jax.training.step as step"}),
    (upward_imports, {"training__loop": "from llama_jax.cli import program"}),
    (upward_imports, {"text__chat": "from llama_jax.config import LlamaConfig"}),
    (upward_imports, {"model__llama": "from llama_jax import LlamaConfig"}),
    (upward_imports, {"model__llama": "import llama_jax"}),
    (
        import_rings,
        {"model__a": "import llama_jax.model.b", "model__b": "from llama_jax.model import a"},
    ),
    (
        import_rings,
        {
            "model__a": "from llama_jax.model.b import x",
            "model__b": "from llama_jax.model.c import y",
            "model__c": "def f():\n  from llama_jax.model.a import z",
        },
    ),
    (jax_where_none_may_be, {"config": "import jax.numpy as jnp"}),
    (jax_where_none_may_be, {"data__batches": "from jax import Array"}),
    (jax_where_none_may_be, {"text__chat": "def f():\n  import flax"}),
    (
        jax_where_none_may_be,
        {"presets": "from llama_jax.axes import Parameters", "axes": "from jaxtyping import Array"},
    ),
    (undocumented, {"config": "x = 1"}),
    (undocumented, {"config": "'''Doc.'''\ndef f(): pass"}),
    (undocumented, {"config": "'''Doc.'''\nclass A:\n  x: int"}),
    (undocumented, {"config": "'''Doc.'''\nclass A:\n  '''Doc.'''\n  async def f(self): pass"}),
    (
        undocumented,
        {
            "config": "'''Doc.'''\nclass A:\n  '''Doc.'''\n  class B:\n    '''Doc.'''\n    def "
            "f(self): pass"
        },
    ),
    (dangerous, {"weights__meta": "import pickle"}),
    (dangerous, {"weights__meta": "def f():\n  from pickle import Unpickler"}),
    (dangerous, {"weights__meta": "import torch"}),
    (dangerous, {"weights__meta": "x = eval(text)"}),
    (dangerous, {"weights__meta": "exec (text)"}),
    (dangerous, {"cli__train": "config = yaml.load(text, Loader=yaml.SafeLoader)"}),
    (dangerous, {"cli__train": "from yaml import load"}),
    (dangerous, {"cli__train": "subprocess.run(line, shell=True)"}),
    (dangerous, {"cli__train": "subprocess.run(line, shell=choice)"}),
    (dangerous, {"data__tokens": "np.load(path, allow_pickle=True)"}),
    (dangerous, {"text__byte_pair": "load(path, trust_remote_code=True)"}),
    (program_manners, {"training__loop": "def f():\n  print('step')"}),
    (program_manners, {"model__llama": "import os\nfast = os.environ.get('FAST')"}),
    (program_manners, {"model__llama": "from os import environ"}),
    (program_manners, {"model__llama": "import os\nfast = os.getenv('FAST')"}),
    (program_manners, {"training__display": "import sys\nstream = sys.stderr"}),
    (program_manners, {"training__loop": "import argparse"}),
    (program_manners, {"generation__generate": "import sys\nsys.exit(2)"}),
    (
        unread_fields,
        {"config": "@dataclass\nclass TinyConfig:\n  dim: int\n  def f(self): return self.dim"},
    ),
    (unread_fields, {"config": "@dataclass\nclass TinyConfig:\n  dim: int", "model": "x.dim = 3"}),
    (
        unread_fields,
        {
            "training__config": "@dataclass(frozen=True)\nclass Mesh:\n  data: int\n"
            "@dataclasses.dataclass\nclass RunConfig:\n  mesh: Mesh | None",
            "model": "c.mesh",
        },
    ),
    (slow_alone, {"test_a": "def helper(): pass"}),
    (
        slow_alone,
        {"test_a": "@pytest.mark.slow\n@pytest.mark.parametrize('x', [1])\ndef test_b(x): pass"},
    ),
    (slow_alone, {"test_a": "pytestmark = [pytest.mark.slow]\ndef test_b(): pass"}),
    (
        slow_alone,
        {
            "test_a": "@pytest.mark.parametrize('x', [pytest.param(1, "
            "marks=pytest.mark.slow)])\ndef test_b(x): pass"
        },
    ),
]


@pytest.mark.parametrize(
    ("rule", "texts"), BAD, ids=[f"{rule.__name__}-{i}" for i, (rule, _) in enumerate(BAD)]
)
def test_rule_notices(rule, texts):
    assert len(rule(parsed(**texts))) == 1


GOOD = {
    "__main__": "'''Doc.'''\nimport sys\nfrom llama_jax.cli import main\nsys.exit(main())",
    "cli__train": "'''Doc.'''\nimport os\nfrom llama_jax import "
    "__version__\nprint(os.environ['HOME'])",
    "cli": "'''Doc.'''",
    "config": "'''Doc.'''\n@dataclass\nclass TinyConfig:\n  '''Doc.'''\n  dim: int\n  def "
    "_f(self): pass",
    "model__llama": "'''Never a pickle.'''\nfrom llama_jax.config import TinyConfig\ndef _f(c): "
    "return "
    "c.dim + model.eval()",
    "model__rope": "'''Doc.'''\nimport re\nfrom llama_jax.model import llama\nre.compile('x')",
    "data__tokens": "'''Doc.'''\nx = np.load(path, allow_pickle=False)",
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_lets_pass(rule):
    assert rule(parsed(**GOOD)) == []


def test_a_file_with_one_quick_test_is_enough():
    half = (
        "@pytest.mark.parametrize('x', [1, pytest.param(2, marks=pytest.mark.slow)])\ndef "
        "test_b(x): pass"
    )
    assert slow_alone(parsed(test_a=f"@pytest.mark.slow\ndef test_a(): pass\n{half}")) == []


# --- and what is imported in earnest ---


def complaint_of(code: str) -> str:
    """What a fresh interpreter says last when `code` fails in it; empty if all went well."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    return (
        f"exit status {done.returncode}: {done.stderr.strip().splitlines()[-1:]}"
        if done.returncode
        else ""
    )


def test_import_of_the_package_is_light():
    code = """if True:
        import sys, time
        begin = time.process_time()
        import llama_jax
        seconds = time.process_time() - begin
        heavy = {"jax", "flax", "numpy", "rich", "jsonargparse"} & set(sys.modules)
        assert llama_jax.__version__ and not heavy, heavy
        assert seconds < 1, seconds
    """
    assert complaint_of(code) == ""


def test_modules_without_jax_start_without_jax():
    """The rule above reads sources; this runs them, libraries included."""
    modules = [f"llama_jax.{m}" for m in package() if m in WITHOUT_JAX or unit(m) in WITHOUT_JAX]
    code = f"""if True:
        import importlib, sys
        for module in {modules}:
            importlib.import_module(module)
            assert "jax" not in sys.modules, module
    """
    assert complaint_of(code) == ""


def test_public_names_exist():
    """`from llama_jax import *` finds all that it promises."""
    root = importlib.import_module("llama_jax")
    assert [name for name in getattr(root, "__all__", []) if not hasattr(root, name)] == []
