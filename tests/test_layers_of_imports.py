"""Imports go downward only and never in a circle; nothing imports a private module; configs import `config` alone."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
LEVELS = (
    "errors axes architecture architectures padding config comparison config_file command_line units environment"
    " host_memory",
    "mesh processes quant kernels packages programs stores",
    "model foundation formats tokenizer chat_template tasks",
    "train evaluate compare plan benchmark setup report results run_folder plot progress",
)
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names.split()}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in (ROOT / "research").rglob("*.py")
}


def imports(path: Path) -> Iterator[str]:
    """Yield what a file imports, as dotted modules, wherever in the file the import stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: write imports from the top, from research.… import …"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else str(node.module)


def test_imports_go_downward_and_not_in_circles() -> None:
    graph = {name: {other for other in imports(path) if other in MODULES} for name, path in MODULES.items()}
    unknown = {name.split(".")[1] for name in MODULES} - set(LEVEL)
    assert not unknown, f"{unknown} have no level yet: add them to LEVELS"
    for name, others in graph.items():
        for other in others:
            importer, imported = name.split(".")[1], other.split(".")[1]
            assert LEVEL[imported] <= LEVEL[importer], f"{name} imports {other}, which lies above it"
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_nothing_private_and_no_flax_in_quant() -> None:
    for folder in ("research", "scripts", "tests", "configs"):
        for path in (ROOT / folder).rglob("*.py"):
            for name in imports(path):
                private = [part for part in name.split(".") if part.startswith("_") and part != "__future__"]
                assert not private, f"{path} imports the private {name}"
    for path in (ROOT / "research" / "quant").rglob("*.py"):
        assert not any(name.split(".")[0] == "flax" for name in imports(path)), f"{path} imports flax"


def test_configs_import_the_schema_only() -> None:
    for path in (ROOT / "configs").glob("*.py"):
        assert set(imports(path)) <= {"research.config", "research.comparison"}, f"{path} imports more than the schema"
