"""Questions and answers from the standard library's docstrings, as JSON lines of conversations:
data to fine-tune on.

    python examples/docstrings.py docstrings.jsonl

The sources are read, not run, so the result depends on the version of Python alone.
"""

import ast
import inspect
import json
import pathlib
import sys
from collections.abc import Iterator

from llama_jax.data.records import Document, standard_library

_LONGEST = 600  # characters of an answer


def questions(document: Document) -> Iterator[dict[str, str]]:
    """A question about each public function of a module that has a docstring, answered by its first
    paragraph.
    """
    module = document.name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    if any(part.startswith("_") for part in module.split(".")):
        return
    for node in ast.parse(document.text).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith(
            "_"
        ):
            answer = first_paragraph(ast.get_docstring(node) or "")
            if answer:
                yield {"prompt": f"What does `{module}.{node.name}` do?", "completion": answer}


def first_paragraph(docstring: str) -> str:
    """The first paragraph on one line; nothing of one that is too long to be an answer."""
    text = " ".join(inspect.cleandoc(docstring).partition("\n\n")[0].split())
    return text if len(text) <= _LONGEST else ""


def main() -> None:
    """Writes the file that the command line names."""
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/docstrings.py OUTPUT.jsonl")
    found = [question for document in standard_library() for question in questions(document)]
    lines = "".join(json.dumps(question, ensure_ascii=False) + "\n" for question in found)
    pathlib.Path(sys.argv[1]).write_text(lines, encoding="utf-8")
    print(f"{sys.argv[1]}: {len(found)} questions and answers")


if __name__ == "__main__":
    main()
